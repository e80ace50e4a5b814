"""`--dry-run`: what a run would take, from a few real steps. Nothing is written."""

from __future__ import annotations

import time

from train import optim
from train.assembly import assemble
from train.feed import Feed
from train.hooks import duration
from train.loop import train_step
from train.metrics import Log, memory_mb, peak_flops
from train.outer import team
from train.stage import Stage
from train.world import World

STEPS = 3


def dry_run(stage: Stage, world: World) -> int:
    log = Log(None, world.main, STEPS)
    config = stage.config
    before = memory_mb(world.device)
    state, growth = assemble(stage, world)
    for line in growth.lines() if growth else ():
        log.say(f"  {line}")
    parts = team.parts(config, world)
    feed = Feed(stage.view, config.run, world, parts=parts)
    times = []
    try:
        for step in range(STEPS):
            began = time.perf_counter()
            train_step(state, feed.micros(step, state.outer.place(step).part), config, world)
            times.append(time.perf_counter() - began)
    finally:
        feed.close()
        log.close()
    parameters = sum(p.numel() for p in state.model.parameters())
    trained = sum(p.numel() for p in optim.parameters(state.optimizer))
    kept = (4 * parameters + 12 * trained) / 1e6  # fp32 weights; gradients and two moments of the trained
    per_step = min(times[1:])  # the first step pays for allocation and compilation
    tokens = config.run.batch * config.run.context
    speed = tokens // parts * world.workers / per_step  # of all workers; under async this one alone
    utilisation = state.model.flops_per_token(config.run.context) * speed
    peak = peak_flops(world.device, config.run.precision) * world.size * world.workers
    steps = state.schedule.total
    seconds = steps * tokens / speed
    log.say(f"{config.name}: {parameters:,} parameters, {trained:,} trained")
    log.say(
        f"memory     {memory_mb(world.device):,.0f} MB at most on a rank, {before:,.0f} MB of it before the"
    )
    log.say(f"           model; weights, gradients and moments take {kept:,.0f} MB")
    log.say(f"micro      {feed.rows} rows of {config.run.context} tokens a rank")
    log.say(f"speed      {speed:,.0f} tokens/s, {per_step:.3f} s a step, MFU {utilisation / peak:.1%}")
    log.say(f"run        {steps:,} steps, {steps * tokens:,} tokens, about {duration(seconds)}")
    return 0
