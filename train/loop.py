"""The training loop. One optimizer step is: accumulate micro batches, clip, guard, step, average.

Shape legend: B sequences of a micro batch  T context.

The loss of every micro batch is divided by the *global* batch's count of supervised tokens, head by head,
so gradients do not depend on how the batch is cut into ranks and micro batches.
"""

from __future__ import annotations

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
from train.guard import NOT_FINITE
from train.meter import StepResult
from train.optim.wiener import shrink
from train.sharding import whole
from train.state import TrainState
from train.world import World, autocast, no_sync, seed_step

PATIENCE = 20  # refused steps in a row after which training has diverged


class Hooks(Protocol):
    """What happens around the steps. Each is called on every rank."""

    def refused(self, state: TrainState, micros: Sequence[Micro], result: StepResult) -> None: ...
    def after_step(self, state: TrainState, result: StepResult) -> None: ...
    def score(self, state: TrainState, tokens: int) -> tuple[float, int]: ...
    def evaluate(self, state: TrainState) -> None: ...
    def save(self, state: TrainState, replace: bool = False) -> None: ...
    def stopping(self) -> bool: ...


def fit(state: TrainState, data: Feed, hooks: Hooks, config: Config, world: World) -> bool:
    """Train until the schedule ends (True), or until the hooks want to stop (False), which saves.

    Raises Diverged after PATIENCE steps in a row that the guard refused.
    """
    run = config.run
    if state.step == 0:
        hooks.evaluate(state)  # a grown model must start where the smaller one ended
    while not state.outer.finished(state):
        if state.outer.agree(hooks.stopping()):  # also before the first step: it may be long in coming
            hooks.save(state)
            return False
        began = time.perf_counter(), time.process_time()
        place = state.outer.place(state.step)
        micros = data.micros(place.step, place.part)
        result = train_step(state, micros, config, world)
        if result.refused:
            hooks.refused(state, micros, result)
        state.outer.maybe_sync(state)
        if state.nowcast is not None:
            state.nowcast.maybe_jump(state, hooks.score)
        hooks.after_step(state, _timed(result, began))
        ended = state.outer.finished(state)
        if ended or due(state.step, run.eval_every):
            hooks.evaluate(state)  # may find a plateau, and bring the end nearer
        if due(state.step, run.save_every) and not ended:
            hooks.save(state)
    hooks.save(state, replace=True)  # a worker back after the end has new weights at an old step
    return True


def train_step(state: TrainState, micros: Sequence[Micro], config: Config, world: World) -> StepResult:
    """One optimizer step. micros: this rank's share of the global batch."""
    lm = state.model
    sequences = world.size * sum(len(m.tokens) for m in micros)
    part, at = state.outer.place(state.step)
    lr = config.optim.lr * state.schedule.factor(at)
    lm.advance(at, at / state.schedule.total)
    state.begin_step(lr)
    seed_step(config.run.seed, at, part * world.size + world.rank)
    norms = global_counts(state, micros, world)
    divisors = {head: max(count, 1e-9) for head, count in norms.items()}
    sums = accumulate(state, micros, divisors, 1.0 / sequences, config, world)
    *pairs, aux_loss = world.sum(sums).tolist()
    nats, aims = pairs[: len(norms)], pairs[len(norms) :]
    grad_norm = clip(optim.parameters(state.optimizer), config.optim.clip)
    if state.release is not None:
        grad_norm = state.release.norm()
    loss = aux_loss + sum(
        lm.readouts[head].weight * total / divisors[head] for head, total in zip(norms, aims)
    )
    refused = state.guard.refuses(loss, grad_norm)
    step_or_skip(state, lr, refused, config)
    upkeep(lm, world.ranks)
    tokens = sequences * world.workers * config.run.context  # the other workers take as many
    state.step += 1
    state.tokens += tokens
    by_head = dict(zip(norms, zip(nats, norms.values())))
    return StepResult(loss, by_head, aux_loss, grad_norm, lr, refused, tokens)


def accumulate(
    state: TrainState,
    micros: Sequence[Micro],
    divisors: dict[str, float],
    scale: float,
    config: Config,
    world: World,
) -> Tensor:
    """Forward and backward of every micro batch. scale: 1 / sequences of the global batch.

    fp64 sums over this rank: nats by readout, what is minimised by readout, the auxiliary losses.
    """
    sums = torch.zeros(2 * len(divisors) + 1, dtype=torch.float64, device=world.device)
    for i, micro in enumerate(micros):
        share = len(micro.tokens) * scale
        with no_sync(state.forward, last=i == len(micros) - 1):
            with autocast(world.device, config.run.precision):
                out = state.forward(
                    micro.tokens,
                    labels=micro.labels,
                    weights=micro.weights,
                    docs=micro.docs,
                    norms=divisors,
                    aux_scale=share,
                    reference=micro.reference,
                )
            if state.release is None or bool(out.loss.isfinite()):  # released gradients act at once
                (out.loss * world.size).backward()  # the wrapper averages over ranks; we want the sum
        parts = [out.sums[head][0].double() for head in divisors]
        parts += [out.aims[head].double() for head in divisors]
        aux = [v.detach().double() * share for v in out.aux.losses.values()]
        sums += torch.stack([*parts, sum(aux, sums.new_zeros(()))])
    return sums


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


def step_or_skip(state: TrainState, lr: float, refused: str | None, config: Config) -> None:
    """Apply the gradients, or drop them: one bad batch must not put a NaN into every weight."""
    if refused is None:
        optim.set_lr(state.optimizer, lr)
        if config.optim.wiener:
            shrink(state.optimizer)
        if state.release is None:
            state.optimizer.step()
        state.ema.update()
        state.skipped_in_a_row = 0
    else:
        state.skipped += 1
        state.skipped_in_a_row += 1
    state.optimizer.zero_grad(set_to_none=True)
    if state.skipped_in_a_row >= PATIENCE:
        why = "not finite" if refused == NOT_FINITE else f"far above those before (the last: {refused})"
        raise Diverged(
            f"step {state.step}: loss or gradients were {why} for {PATIENCE} steps in a row; "
            f"lower optim.lr, lengthen schedule.warmup, or use run.precision=fp32, and start from an "
            f"earlier checkpoint with --init-from"
        )


def _timed(result: StepResult, began: tuple[float, float]) -> StepResult:
    wall, cpu = began
    return replace(result, seconds=time.perf_counter() - wall, cpu_seconds=time.process_time() - cpu)


def due(step: int, every: int) -> bool:
    """Whether something happens after `step`; every 0: never."""
    return every > 0 and step % every == 0
