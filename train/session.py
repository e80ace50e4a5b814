"""From a request to a running fit: folder, weights, optimizer, loop, and the exit code."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from typing import Any

import torch

from dataset.files import DatasetError
from model import grow
from model.ops.allocator import keep_freed_memory
from model.schema import ConfigError
from train import checkpoint, optim, rundir
from train.assembly import assemble
from train.dryrun import dry_run
from train.errors import EXIT_DIVERGED, EXIT_USER, Diverged, UserError, is_disk_full
from train.feed import Feed
from train.hooks import RunHooks, Signals
from train.loop import fit
from train.metrics import Log, peak_flops, rewind
from train.outer import team
from train.sampling import sample
from train.stage import Request, Stage, prepare
from train.state import TrainState
from train.tracing import Tracer
from train.world import World, joined


def run_all(request: Request) -> int:
    """Train every architecture in turn; returns the exit code (see `train.errors`)."""
    keep_freed_memory()
    with ExitStack() as stack:
        try:
            world = stack.enter_context(joined())
            signals = stack.enter_context(Signals(alone=world.size == 1))
            for arch in request.archs:
                if code := run_stage(request, arch, world, signals):
                    return code
            return 0
        except (UserError, ConfigError, DatasetError) as error:
            return _complain(str(error), EXIT_USER)
        except Diverged as error:
            return _complain(str(error), EXIT_DIVERGED)
        except KeyboardInterrupt:
            return _complain("interrupted before the step was saved; go on with --resume", 130)
        except OSError as error:
            if is_disk_full(error):
                return _complain(f"no space left on the disk ({error})", EXIT_USER)
            raise


def _complain(message: str, code: int) -> int:
    """Every rank says it: what went wrong may have gone wrong on one of them alone."""
    rank = os.environ.get("RANK")
    print(f"error{f' (rank {rank})' if rank else ''}: {message}", file=sys.stderr, flush=True)
    return code


def run_stage(request: Request, arch: str, world: World, signals: Signals) -> int:
    """One run from its first step, or from its newest checkpoint, to its end. Returns the exit code."""
    world = team.divide(world, arch, request.sets)
    stage = prepare(request, arch, world)
    if request.dry_run:
        return dry_run(stage, world)
    complete = stage.begun and rundir.status_of(stage.folder)["status"] == "complete"
    if team.everywhere(complete):
        if world.main:
            print(f"{stage.folder}: already complete")
        return 0
    state, growth = assemble(stage, world)
    with ExitStack() as stack:
        world.on_main(lambda: stack.enter_context(rundir.locked(stage.folder)))
        world.on_main(lambda: begin(stage, state))
        log = Log(stage.folder, world.main, state.schedule.total, stage.config.wandb, quiet=world.worker > 0)
        stack.callback(log.close)
        announce(stage, state, growth, log)
        return train(stage, state, log, world, signals, request.profile)


def begin(stage: Stage, state: TrainState) -> None:
    """Make the folder, or bring it back to where the checkpoint stands. On rank 0."""
    checkpoint.tidy(stage.folder)
    checkpoint.set_aside(stage.folder, beyond=stage.saved)
    if not stage.begun:
        origin: dict[str, Any] = {"from": None, "tokens": state.origin}
        if stage.source is not None:
            origin["from"] = str(stage.source.path)
        scales = {n: g["lr_scale"] for g in state.optimizer.param_groups for n in g["names"]}
        origin["lr_scales"] = {n: s for n, s in scales.items() if s != 1.0}
        origin["stage"] = state.plateau.stage
        rundir.create(stage.folder, stage.config, stage.data, origin, sys.argv)
    rewind(stage.folder, None if stage.saved is None else state.step)
    rundir.set_status(stage.folder, "running", step=state.step, total=state.schedule.total)


def announce(stage: Stage, state: TrainState, growth: grow.Growth | None, log: Log) -> None:
    """Say what starts, from what, before any training."""
    parameters = sum(p.numel() for p in state.model.parameters())
    trained = sum(p.numel() for p in optim.parameters(state.optimizer))
    log.say(
        f"{stage.config.name}: {parameters:,} parameters, {trained:,} trained; data {stage.data.path} "
        f"({stage.data.vocab:,} ids); run {stage.folder}"
    )
    if stage.begun:
        log.say(f"resumed at step {state.step} of {state.schedule.total}")
        log.write("event", state.step, event="resume", total=state.schedule.total)
        return
    origin = str(stage.source.path) if stage.source is not None else None
    log.write(
        "event",
        0,
        event="start",
        name=stage.config.name,
        origin=state.origin,
        source=origin,
        total=state.schedule.total,
    )
    if origin is not None:
        log.say(f"weights from {origin}, which had seen {state.origin:,} tokens")
    if growth is not None:
        for line in growth.lines():
            log.say(f"  {line}")
        log.write("event", 0, event="grown", loaded=growth.loaded, fresh=growth.fresh, frozen=growth.frozen)


def train(stage: Stage, state: TrainState, log: Log, world: World, signals: Signals, profile: int = 0) -> int:
    """Fit, with the folder's status kept true. Returns the exit code."""
    config = stage.config
    best = torch.tensor([peak_flops(world.device, config.run.precision)], device=world.device)
    peak = float(world.sum(best)) * world.workers  # tokens, too, are those of all workers
    tracer = Tracer(stage.folder, profile, world.main)
    tokenizer = stage.data.tokenizer
    hooks = RunHooks(stage.folder, config, stage.heldout, log, world, signals, peak, tokenizer, tracer)
    feed = Feed(stage.view, config.run, world, parts=team.parts(config, world))
    where: Any = lambda: {"step": state.step, "total": state.schedule.total, "tokens": state.tokens}  # noqa: E731
    try:
        if stage.saved is None:
            hooks.save(state)  # a full disk shows before hours of work, and growth has its starting point
        state.outer.begin(state, lambda: signals.caught is not None)
        with tracer:
            finished = fit(state, feed, hooks, config, world)
    except Diverged:
        world.on_main(lambda: rundir.set_status(stage.folder, "diverged", **where()))
        raise
    finally:
        feed.close()
        state.outer.close()
    if finished:
        sample(state, config, stage.heldout, tokenizer, log, world)
    event = "done" if finished else "stop"
    log.write("event", state.step, event=event, signal=signals.caught)
    world.on_main(lambda: rundir.set_status(stage.folder, "complete" if finished else "stopped", **where()))
    team.everywhere(finished)  # a next stage grows from the first worker's run, which is closed now
    if finished:
        log.say(f"{stage.folder}: complete after {state.step} steps, {state.tokens:,} tokens")
        return 0
    log.say(f"{stage.folder}: stopped and saved at step {state.step}; go on with --resume")
    return 128 + (signals.caught or 15)
