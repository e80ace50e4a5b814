"""Training options that do not go together; each is refused before anything is written."""

from __future__ import annotations

import math
from collections.abc import Iterator

from model.schema import Config, ConfigError
from train.feed import micro_rows
from train.outer import team
from train.world import World

ELEMENTWISE = ("adamw", "stableadamw", "lion", "adan", "schedulefree")  # work on parameters that are cut


def check(config: Config, world: World) -> None:
    """Raises ConfigError with everything that is wrong."""
    rows = micro_rows(config.run, world, team.parts(config, world))
    if errors := [f"{config.name}: {line}" for line in _clashes(config, world, rows)]:
        raise ConfigError(errors)


def _clashes(config: Config, world: World, rows: int) -> Iterator[str]:
    run, optim = config.run, config.optim
    if optim.name == "schedulefree":
        if config.schedule.kind != "constant":
            yield "optim.name: schedulefree replaces the decay; set schedule.kind to constant"
        if run.ema:
            yield "run.ema: schedulefree evaluates and saves an average already"
        if config.nowcast.every:
            yield "nowcast: schedulefree keeps two sets of weights; a jump would move one of them"
        if config.outer.kind != "none":
            yield "outer.kind: an outer loop moves one set of weights, and schedulefree keeps two"
    if config.outer.kind != "none" and config.nowcast.every:
        yield "nowcast: a worker's path has the outer loop's jumps in it; choose one of the two"
    if config.outer.kind == "async" and config.grow.when == "plateau":
        yield "grow.when: plateau: async workers have no common step at which a stage could end; set step"
    if run.parallel != "ddp" and world.size > 1:
        if optim.name not in ELEMENTWISE:
            yield (
                f"optim.name: {optim.name} wants whole parameters; with run.parallel: {run.parallel} one of "
                f"{', '.join(ELEMENTWISE)}"
            )
        if optim.kahan:
            yield f"optim.kahan: not with run.parallel: {run.parallel}, whose groups have one type each"
        if config.outer.kind == "async":
            yield (
                f"run.parallel: {run.parallel}: rank 0 speaks with the server of outer.kind: async, and it "
                f"has only its shard; use ddp, or outer.kind: diloco or streaming"
            )
        if config.nowcast.every:
            yield f"nowcast: not with run.parallel: {run.parallel}; its history is of whole weights"
    if optim.kahan and run.precision != "bf16":
        yield "optim.kahan: weights in bf16 need run.precision: bf16"
    if optim.release:
        if world.size > 1:
            yield "optim.release: on one rank only; gradients that are exchanged must wait for each other"
        if rows < run.batch:
            yield (
                f"optim.release: a gradient is used up at once, but the step is cut into micro batches of "
                f"{rows} of {run.batch} sequences; set run.micro: {run.batch}, or a smaller run.batch"
            )
        if run.spike_sigma:
            yield "run.spike_sigma: with optim.release a step is taken before its gradient norm is known"
        if optim.wiener:
            yield "optim.wiener: with optim.release a step is taken before its gradients are at hand"
    yield from _selection(config, rows)


def _selection(config: Config, rows: int) -> Iterator[str]:
    rho = config.select.rho
    if rho is None:
        return
    if not any(h.kind == "parallel" or (h.kind == "single" and h.shift == 1) for h in config.heads.values()):
        yield "select.rho: the reference predicts the next token, and no single or parallel head here does"
    if rho.unit == "row" and not rho.soften and rho.keep < 1 and math.ceil(rho.keep * rows) >= rows:
        yield (
            f"select.rho: unit: row keeps {rho.keep} of the sequences of a micro batch, which is all {rows}; "
            f"set run.micro to at least {math.ceil(1 / (1 - rho.keep))}, or a smaller keep"
        )
