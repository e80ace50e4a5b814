"""Training data from plain settings (a path, or what a YAML file holds): views, mixtures, schedules.

data/pystdlib                                        one dataset

sources: {web: data/web, code: {path: data/code, max_tokens: 4096}}
stages:                                              # optional; default: in proportion to their ids
  - {at: 0, weights: {web: 9, code: 1}}
  - {at: 0.8, weights: {web: 1, code: 1}}            # at: fraction of the run, or a whole step
lengths: [{at: 0, context: 512}, {at: 0.5, context: 2048}]
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from typing import Any

from dataset.files import DatasetError
from dataset.format import Dataset, open_dataset
from dataset.mixture import Mixture
from dataset.views import LengthSchedule, Samples, View

KEYS = ("sources", "stages", "lengths")
VIEW_KEYS = ("packing", "shuffle", "sidecar", "min_tokens", "max_tokens", "byte_budget")


def build(
    settings: str | os.PathLike | Mapping[str, Any],
    *,
    context: int,
    seed: int = 0,
    split: str = "train",
    total_steps: int | None = None,
    global_batch: int | None = None,
    **view: Any,
) -> Samples:
    """The view, mixture or schedule that `settings` describe.

    context: ids a row; with `lengths`, of the longest. total_steps, global_batch: needed by stages. view:
    defaults for every source (packing, shuffle, ...).
    Raises DatasetError naming the key that is wrong.
    """
    if not isinstance(settings, Mapping):
        return _open("data", settings).view(context=context, seed=seed, split=split, **view)
    _known("data", settings, KEYS)
    if not isinstance(settings.get("sources"), Mapping) or not settings["sources"]:
        raise DatasetError("data.sources: a mapping of names to dataset folders is needed")
    views = {
        name: _source(f"data.sources.{name}", one, view | {"context": context, "seed": seed, "split": split})
        for name, one in settings["sources"].items()
    }
    stages = settings.get("stages") or [{"at": 0, "weights": {n: v.split.tokens for n, v in views.items()}}]
    found: Samples
    if len(views) == 1 and "stages" not in settings:
        found = next(iter(views.values()))
    else:
        steps = _at("stages", stages, total_steps)
        batch = global_batch if global_batch is not None else (1 if len(steps) == 1 else None)
        starts = [(at * _need(batch, "global_batch"), stage["weights"]) for at, stage in steps]
        found = Mixture(views, starts)
    if lengths := settings.get("lengths"):
        found = LengthSchedule(found, [(at, s["context"]) for at, s in _at("lengths", lengths, total_steps)])
    return found


def _source(where: str, one: Any, defaults: dict[str, Any]) -> View:
    if not isinstance(one, Mapping):
        return _open(where, one).view(**defaults)
    _known(where, one, ("path", *VIEW_KEYS))
    if "path" not in one:
        raise DatasetError(f"{where}: 'path' is missing")
    return _open(where, one["path"]).view(**(defaults | {k: v for k, v in one.items() if k != "path"}))


def _open(where: str, path: Any) -> Dataset:
    if not isinstance(path, str | os.PathLike):
        raise DatasetError(f"{where}: {path!r} is no path of a dataset folder")
    return open_dataset(path)


def _at(where: str, stages: Any, total_steps: int | None) -> list[tuple[int, Mapping[str, Any]]]:
    """(first step, stage): fractions of the run become steps."""
    needed = "weights" if where == "stages" else "context"
    if not isinstance(stages, list | tuple):
        raise DatasetError(f"data.{where}: a list of stages is needed, got {stages!r}")
    found = []
    for i, stage in enumerate(stages):
        label = f"data.{where}[{i}]"
        if not isinstance(stage, Mapping) or needed not in stage:
            raise DatasetError(f"{label}: a mapping with 'at' and '{needed}' is needed, got {stage!r}")
        _known(label, stage, ("at", needed))
        at = stage.get("at", 0)
        allowed = 0 <= at < 1 if isinstance(at, float) else type(at) is int and at >= 0
        if not allowed:
            raise DatasetError(
                f"{label}.at: {at!r} is neither a fraction of the run in [0, 1) nor a whole step"
            )
        if isinstance(at, float):
            at = round(at * _need(total_steps, "total_steps")) if at else 0
        found.append((at, stage))
    return found


def _need(value: int | None, name: str) -> int:
    if value is None:
        raise DatasetError(f"data: stages at a fraction of the run need {name}")
    return value


def _known(where: str, given: Mapping[str, Any], allowed: tuple[str, ...]) -> None:
    for key in given:
        if key not in allowed:
            near = difflib.get_close_matches(str(key), allowed, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise DatasetError(f"{where}: unknown key {key!r}{hint} Allowed: {', '.join(allowed)}")
