"""Model, weights, optimizer and counters of a stage, as of its newest checkpoint or of its source."""

from __future__ import annotations

import torch

import model
from dataset.files import read_json
from model import grow
from model.config import arch_digest
from model.lm import LanguageModel
from model.schema import Config
from train import checkpoint, optim, outer, rundir
from train.optim import mup
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
    saved = checkpoint.newest(stage.folder)[0] if stage.begun else None
    loaded = checkpoint.load(saved) if saved is not None else None
    lm = model.build(config, vocab=stage.data.vocab, rows=stage.data.tokenizer.rows)
    growth, scales, origin = None, {}, 0
    if loaded is None and stage.source is not None:
        growth = take_weights(lm, stage.source)
        scales = head_scales(config, growth)
        origin = tokens_behind(stage.source)
    elif loaded is not None:
        scales = rundir.about_of(stage.folder)["origin"].get("lr_scales", {})
    lm.to(world.device)
    if config.run.compile:
        lm.compile_blocks()
    if config.optim.kahan:
        optim.narrow(lm)
    width, decay = mup.scales(lm, config)
    forward = parallel(lm, config.run, world)  # the optimizer must get the parameters as they are cut here
    assert config.run.steps is not None  # settled
    rates = {n: scales.get(n, 1.0) * width.get(n, 1.0) for n in scales.keys() | width.keys()}
    optimizer = optim.build(lm, config.optim, lm.no_decay(), rates, decay)
    trainable = sum(p.numel() for p in optim.parameters(optimizer))
    state = TrainState(
        lm,
        forward,
        optimizer,
        Schedule(config.schedule, config.run.steps),
        Plateau.of(config.grow, trainable),
        outer.make(config.outer),
        origin=origin,
    )
    if loaded is not None:
        state.load(loaded)
    return state, growth


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
