"""Model, weights, optimizer and counters of a stage, as of its newest checkpoint or of its source."""

from __future__ import annotations

from typing import Any

import torch

import model
from dataset.files import read_json
from model import grow
from model.config import arch_digest
from model.lm import LanguageModel
from model.schema import Config
from train import activations, checkpoint, optim, rundir
from train.checkpoint import Checkpoint
from train.ema import Ema
from train.errors import UserError
from train.guard import Guard
from train.nowcast import Nowcast
from train.objective import Objective
from train.optim import mup
from train.optim.release import Release
from train.outer import team
from train.plateau import Plateau
from train.rundir import Source
from train.schedule import Schedule
from train.sharding import parallel
from train.stage import Stage
from train.state import TrainState, load_model
from train.world import World


def assemble(stage: Stage, world: World) -> tuple[TrainState, grow.Growth | None]:
    """Model, weights, optimizer and counters, as of the newest checkpoint or of the source."""
    config = stage.config
    torch.manual_seed(config.run.seed)
    loaded, about = taken_over(stage)
    lm = model.build(config, vocab=stage.data.vocab, rows=stage.data.tokenizer.rows)
    growth, origin, number = None, 0, 1
    width, decay = mup.scales(lm, config)
    rates = dict(width)
    if loaded is not None:
        rates, number = about.get("lr_scales", rates), about.get("stage", 1)
    elif stage.source is not None:
        growth = take_weights(lm, stage.source)
        rates |= {n: f * width.get(n, 1.0) for n, f in head_scales(config, growth).items()}
        origin = tokens_behind(stage.source)
        number = stage.source.about.get("origin", {}).get("stage", 1) + (growth is not None)
    lm.to(world.device)
    noise = activations.install(lm, config.activations, world.device)
    if config.run.compile:
        lm.compile_blocks()
    if config.optim.kahan:
        optim.narrow(lm)
    objective = Objective(config)
    lm.objective = None if objective.plain else objective
    forward = parallel(lm, config.run, world)  # the optimizer must get the parameters as they are cut here
    assert config.run.steps is not None  # settled
    optimizer = optim.build(lm, config.optim, lm.no_decay(), rates, decay)
    trainable = sum(p.numel() for p in optim.parameters(optimizer))
    state = TrainState(
        lm,
        forward,
        optimizer,
        Schedule(config.schedule, config.run.steps),
        Plateau.of(config.grow, trainable, number),
        team.make(config, lm, world, stage.folder, stage.view.id),
        Guard(config.run),
        Ema(lm, config.run.ema),
        None if objective.plain else objective,
        Release(optimizer) if config.optim.release else None,
        Nowcast(config.nowcast, lm, world.device) if config.nowcast.every else None,
        noise,
        origin=origin,
    )
    if loaded is not None:
        state.load(loaded)
    if stage.decay_now:
        decay_now(stage, state)
    return state, growth


def taken_over(stage: Stage) -> tuple[Checkpoint | None, dict[str, Any]]:
    """The checkpoint of which everything is taken over (weights, moments, rates, the place in the data) and
    its run's origin: the folder's own or, with `--decay-now`, the source's. None: there is none."""
    if stage.saved is not None:
        return checkpoint.load(stage.saved), rundir.about_of(stage.folder)["origin"]
    if stage.decay_now and stage.source is not None:
        return checkpoint.load(stage.source.path), stage.source.about.get("origin", {})
    return None, {}


def decay_now(stage: Stage, state: TrainState) -> None:
    """`--decay-now`: the decay begins where the checkpoint stands that was taken over. Raises UserError."""
    fresh, where = Schedule(stage.config.schedule, stage.config.run.steps or 1), state.step
    if where >= state.schedule.decay_at or where >= fresh.total:
        raise UserError(
            f"--decay-now: the checkpoint stands at step {where}, and the decay began at step "
            f"{state.schedule.decay_at} of {state.schedule.total}; take an earlier checkpoint"
        )
    if where < state.schedule.warmup:
        raise UserError(
            f"--decay-now: the checkpoint stands at step {where}, in the warm-up of "
            f"{state.schedule.warmup} steps, whose rate still rises; take a later checkpoint"
        )
    state.schedule.planned = fresh.planned
    state.schedule.start_decay(where)


def take_weights(lm: LanguageModel, source: Source) -> grow.Growth | None:
    """The same architecture's weights as they are; a smaller one's by growth. Raises ConfigError."""
    tensors = checkpoint.load_tensors(source.path)
    if arch_digest(source.config) == arch_digest(lm.config):
        load_model(lm, tensors, str(source.path))
        return None
    return grow.load_into(lm, source.config, tensors)


def head_scales(config: Config, growth: grow.Growth | None) -> dict[str, float]:
    """Loaded heads learn at `grow.head_lr` times the rate: they are trained already."""
    if growth is None or config.grow.head_lr == 1.0:
        return {}
    return {name: config.grow.head_lr for name in growth.loaded if name.startswith("heads.")}


def tokens_behind(source: Source) -> int:
    if checkpoint.is_weights_alone(source.path):
        return 0
    counters = read_json(source.path / checkpoint.REST).get("counters", {})
    return int(counters.get("tokens", 0)) + int(counters.get("origin", 0))
