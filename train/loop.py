"""The training loop. One optimizer step is: accumulate micro batches, clip, guard, step.

Shape legend: B sequences of a micro batch  T context.

The loss of every micro batch is divided by the *global* batch's count of supervised tokens, head by head,
so gradients do not depend on how the batch is cut into ranks and micro batches.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from model.quant.base import upkeep
from model.schema import Config
from train import optim
from train.errors import Diverged
from train.feed import Feed, Micro
from train.meter import StepResult
from train.sharding import whole
from train.state import TrainState
from train.world import World, autocast, no_sync, seed_step

PATIENCE = 20  # skipped steps in a row after which training has diverged


class Hooks(Protocol):
    """What happens around the steps. Each is called on every rank."""

    def after_step(self, state: TrainState, result: StepResult) -> None: ...
    def evaluate(self, state: TrainState) -> None: ...
    def save(self, state: TrainState) -> None: ...
    def stopping(self) -> bool: ...


def fit(state: TrainState, data: Feed, hooks: Hooks, config: Config, world: World) -> bool:
    """Train until the schedule ends (True), or until the hooks want to stop (False), which saves.

    Raises Diverged after PATIENCE steps in a row that were not finite.
    """
    run = config.run
    if state.step == 0:
        hooks.evaluate(state)  # a grown model must start where the smaller one ended
    while state.step < state.schedule.total:
        began = time.perf_counter()
        result = train_step(state, data.micros(state.step), config, world)
        state.outer.maybe_sync(state)
        hooks.after_step(state, _timed(result, began))
        ended = state.step >= state.schedule.total
        if ended or _due(state.step, run.eval_every):
            hooks.evaluate(state)  # may find a plateau, and bring the end nearer
        if _due(state.step, run.save_every) and state.step < state.schedule.total:
            hooks.save(state)
        if hooks.stopping() and state.step < state.schedule.total:
            hooks.save(state)
            return False
    hooks.save(state)
    return True


def train_step(state: TrainState, micros: Sequence[Micro], config: Config, world: World) -> StepResult:
    """One optimizer step. micros: this rank's share of the global batch."""
    lm, scale = state.model, 1.0 / config.run.batch
    lm.advance(state.step, state.step / state.schedule.total)
    seed_step(config.run.seed, state.step, world.rank)
    norms = global_counts(state, micros, world)
    divisors = {head: max(count, 1e-9) for head, count in norms.items()}
    sums = torch.zeros(len(norms) + 1, dtype=torch.float64, device=world.device)
    for i, micro in enumerate(micros):
        with no_sync(state.forward, last=i == len(micros) - 1):
            with autocast(world.device, config.run.precision):
                out = state.forward(
                    micro.tokens,
                    labels=micro.labels,
                    weights=micro.weights,
                    docs=micro.docs,
                    norms=divisors,
                    aux_scale=len(micro.tokens) * scale,
                )
            (out.loss * world.size).backward()  # the wrapper averages over ranks; we want the sum
        aux = [v.detach().double() * len(micro.tokens) * scale for v in out.aux.losses.values()]
        sums += torch.stack([*(out.sums[head][0].double() for head in norms), sum(aux, sums.new_zeros(()))])
    *nats, aux_loss = world.sum(sums).tolist()
    lr = config.optim.lr * state.schedule.factor(state.step)
    grad_norm = clip(optim.parameters(state.optimizer), config.optim.clip)
    loss = aux_loss + sum(
        lm.readouts[head].weight * total / divisors[head] for head, total in zip(norms, nats)
    )
    applied = math.isfinite(loss) and math.isfinite(grad_norm)
    step_or_skip(state, lr, applied)
    upkeep(lm)
    tokens = config.run.batch * config.run.context
    state.step += 1
    state.tokens += tokens
    return StepResult(
        loss, dict(zip(norms, zip(nats, norms.values()))), aux_loss, grad_norm, lr, applied, tokens
    )


def global_counts(state: TrainState, micros: Sequence[Micro], world: World) -> dict[str, float]:
    """{head: weight of supervised tokens in the global batch}."""
    counts = [state.model.head_counts(m.labels, m.docs, m.weights) for m in micros]
    heads = list(counts[0])
    mine = torch.stack(
        [sum((c[h].double() for c in counts), torch.zeros((), dtype=torch.float64)) for h in heads]
    )
    return dict(zip(heads, world.sum(mine.to(world.device)).tolist()))


def clip(params: list[torch.nn.Parameter], limit: float) -> float:
    """Scale gradients down to a global norm of `limit` (0: leave them); returns the norm before."""
    grads: list[Tensor] = [p.grad for p in params if p.grad is not None]
    norm = whole(torch.nn.utils.get_total_norm(grads))
    if limit:
        torch.nn.utils.clip_grads_with_norm_(params, limit, norm)
    return float(norm)


def step_or_skip(state: TrainState, lr: float, applied: bool) -> None:
    """Apply the gradients, or drop them: one bad batch must not put a NaN into every weight."""
    if applied:
        optim.set_lr(state.optimizer, lr)
        state.optimizer.step()
        state.skipped_in_a_row = 0
    else:
        state.skipped += 1
        state.skipped_in_a_row += 1
    state.optimizer.zero_grad(set_to_none=True)
    if state.skipped_in_a_row >= PATIENCE:
        raise Diverged(
            f"step {state.step}: loss or gradients were not finite for {PATIENCE} steps in a row; "
            f"lower optim.lr, lengthen schedule.warmup, or use run.precision=fp32, and start from an "
            f"earlier checkpoint with --init-from"
        )


def _timed(result: StepResult, began: float) -> StepResult:
    return replace(result, seconds=time.perf_counter() - began)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
