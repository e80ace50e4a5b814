"""Checkpoints: folders that are complete or not there at all.

    RUN/checkpoints/step_00000200/
        config.yaml         the resolved configuration, so that the folder says what it is on its own
        model.safetensors   every parameter and persistent buffer, by name
        train.safetensors   tensors of the training state (optimizer moments, outer state)
        train.json          the rest of the training state, with places for those tensors
        manifest.json       step, and size and blake3 of each file; written last
    RUN/checkpoints/latest  name of the newest one, for people and scripts
    RUN/checkpoints/step_00000200.aside0   a damaged one, or one that a resume went back behind: never read

A save writes `step_N.tmp`, forces it to the disk and renames it, so a folder with the final name is whole;
an existing folder is never written to. A load checks every hash and falls back to the one before.
Tensors that are cut among ranks are written by all of them (`train.shards`) into the same files, so a
checkpoint does not know how many ranks made it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blake3
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dataset.files import read_json, sync_folder, write_bytes, write_json
from train import shards
from train.errors import CheckpointError, disk_full, is_disk_full
from train.sharding import any_sharded, bytes_of
from train.world import ALONE, World

NAME = re.compile(r"step_(\d{8})")
MODEL, TRAIN, REST, CONFIG, MANIFEST = (
    "model.safetensors",
    "train.safetensors",
    "train.json",
    "config.yaml",
    "manifest.json",
)
PLACE = "$tensor"  # {PLACE: name} stands in train.json for a tensor of train.safetensors
SLACK = 1 << 20  # bytes beyond the tensors that a save needs at most


@dataclass(frozen=True)
class Checkpoint:
    """One loaded checkpoint: model tensors by name, and the training state as it was given."""

    path: Path
    step: int
    model: dict[str, Tensor]
    train: dict[str, Any]


def folder_of(run: Path) -> Path:
    return run / "checkpoints"


def save(
    run: Path,
    step: int,
    model: Mapping[str, Tensor],
    train: Any,
    config: str,
    keep: int,
    world: World = ALONE,
    replace: bool = False,
) -> Path:
    """Write the checkpoint of `step` and drop all but the newest `keep` + 1. Called on every rank.

    replace: also when there is a whole one of this step already, which stays until the new one is whole.
    Raises DiskFull, with everything that was there before untouched.
    """
    root = folder_of(run)
    final, tmp = root / f"step_{step:08d}", root / f"step_{step:08d}.tmp"
    tensors: dict[str, Tensor] = {}
    rest = _split(train, "", tensors)
    need = bytes_of([*model.values(), *tensors.values()]) + SLACK
    try:
        if world.on_main(lambda: _make_room(run, final, tmp, need, replace)):
            return final
        parts = {MODEL: model, TRAIN: tensors}
        if any_sharded([*model.values(), *tensors.values()]):
            for name, part in parts.items():
                shards.write(part, tmp / name, world)
            parts = {}
        world.on_main(lambda: _finish(final, tmp, step, parts, rest, config))
    except Exception as error:
        if world.main:
            shutil.rmtree(tmp, ignore_errors=True)
        if is_disk_full(error):
            raise disk_full(final, need) from error
        raise
    if world.main:
        for old in saved(run)[keep + 1 :]:
            _remove(old)
    return final


def _make_room(run: Path, final: Path, tmp: Path, need: int, replace: bool) -> bool:
    """Whether the checkpoint is there already; otherwise `tmp` is empty and the disk has room for it."""
    if final.is_dir() and not replace:
        with contextlib.suppress(CheckpointError):
            verify(final)
            return True
        _rename(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    tidy(run)
    if shutil.disk_usage(final.parent).free < need:
        raise disk_full(final, need)
    tmp.mkdir()
    return False


def _finish(
    final: Path, tmp: Path, step: int, parts: Mapping[str, Mapping[str, Tensor]], rest: Any, config: str
) -> None:
    """Write what is not written yet, force everything to the disk, and give the folder its name."""
    for name, tensors in parts.items():
        save_file({n: t.detach().contiguous() for n, t in tensors.items()}, tmp / name)
    (tmp / REST).write_text(json.dumps(rest))
    (tmp / CONFIG).write_text(config)
    files = {name: _fingerprint(tmp / name, sync=True) for name in (MODEL, TRAIN, REST, CONFIG)}
    (tmp / MANIFEST).write_text(json.dumps({"step": step, "files": files}, indent=1))
    _sync(tmp / MANIFEST)
    sync_folder(tmp)
    if final.is_dir():
        _remove(final)
    os.rename(tmp, final)
    sync_folder(final.parent)
    write_bytes(final.parent / "latest", final.name.encode())


def saved(run: Path) -> list[Path]:
    """Checkpoint folders of a run, newest first; they may still be damaged."""
    root = folder_of(run)
    found = [p for p in root.iterdir() if NAME.fullmatch(p.name)] if root.is_dir() else []
    return sorted(found, reverse=True)


def verify(path: Path) -> int:
    """Check a checkpoint against its manifest and return its step. Raises CheckpointError."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        files, step = manifest["files"], int(manifest["step"])
        for name in (MODEL, TRAIN, REST, CONFIG):
            if _fingerprint(path / name) != files[name]:
                raise CheckpointError(f"{path / name}: damaged, its content differs from {MANIFEST}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not a complete checkpoint ({error})") from None
    return step


def newest(run: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, and what was wrong with newer ones."""
    complaints = []
    for path in saved(run):
        try:
            verify(path)
        except CheckpointError as error:
            complaints.append(str(error))
        else:
            return path, complaints
    return None, complaints


def load(path: Path) -> Checkpoint:
    """Read one checkpoint folder, every hash checked. Raises CheckpointError."""
    step = verify(path)
    try:
        model, tensors = load_file(path / MODEL), load_file(path / TRAIN)
        return Checkpoint(path, step, model, _join(read_json(path / REST), tensors))
    except (SafetensorError, KeyError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None


def is_weights_alone(folder: Path) -> bool:
    """Whether the folder holds a model and nothing of its training, as `python -m model import` makes it."""
    there = [(folder / name).is_file() for name in (CONFIG, MODEL, MANIFEST)]
    return there == [True, True, False]


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The model's tensors alone, every hash checked where there are hashes. Raises CheckpointError."""
    if not is_weights_alone(path):
        verify(path)
    try:
        return load_file(path / MODEL)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path / MODEL}: cannot be read ({error})") from None


def record(run: Path, name: str, value: Any) -> None:
    """Write a small JSON file of a run in one go. Raises DiskFull."""
    try:
        write_json(run / name, value)
    except Exception as error:
        if is_disk_full(error):
            raise disk_full(run / name) from error
        raise


def tidy(run: Path) -> None:
    """Remove what a killed process left half-written or half-deleted."""
    root = folder_of(run)
    for path in root.iterdir() if root.is_dir() else ():
        if NAME.fullmatch(path.stem) and path.suffix in (".tmp", ".gone"):
            shutil.rmtree(path, ignore_errors=True)


def set_aside(run: Path, beyond: Path | None) -> None:
    """Rename the checkpoints after `beyond` (None: all): a run that goes back saves its own there."""
    for path in saved(run):
        if beyond is None or path.name > beyond.name:
            _rename(path)
    if beyond is not None:
        write_bytes(folder_of(run) / "latest", beyond.name.encode())


def _remove(path: Path) -> None:
    """Delete a checkpoint so that a half-deleted one never carries the name of a whole one."""
    gone = path.with_suffix(".gone")
    os.rename(path, gone)
    shutil.rmtree(gone, ignore_errors=True)


def _rename(path: Path) -> None:
    n = 0
    while (aside := path.with_suffix(f".aside{n}")).exists():
        n += 1
    os.rename(path, aside)


def _fingerprint(path: Path, sync: bool = False) -> dict[str, Any]:
    if sync:
        _sync(path)
    return {"bytes": path.stat().st_size, "blake3": blake3.blake3().update_mmap(path).hexdigest()}


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _split(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Replace every tensor of nested dicts and lists by its place, and collect them by path."""
    if isinstance(value, Tensor):
        tensors[path] = value
        return {PLACE: path}
    if isinstance(value, Mapping):
        return {str(k): _split(v, f"{path}/{k}" if path else str(k), tensors) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_split(v, f"{path}/{i}" if path else str(i), tensors) for i, v in enumerate(value)]
    return value


def _join(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict):
        return (
            tensors[value[PLACE]]
            if set(value) == {PLACE}
            else {k: _join(v, tensors) for k, v in value.items()}
        )
    if isinstance(value, list):
        return [_join(v, tensors) for v in value]
    return value
