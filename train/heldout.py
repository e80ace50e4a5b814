"""Held-out loss of every head, in nats and in bits per byte, on rows that never change.

Shape legend: B rows of a group  T context.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dataset.views import View
from model.heads import IGNORE, shift_targets, shift_weights
from model.lm import LanguageModel
from model.sections import RunConfig
from train.feed import Micro, cut
from train.sharding import settle, sharded
from train.world import World, autocast

GROUP_TOKENS = 4096  # tokens scored at once; also the groups that the plateau rule pairs


@dataclass(frozen=True)
class Scores:
    """loss: weighted over heads, as in training. losses: {head: nats per token}. bpb: {head: bits per byte
    of the text that it predicts}. groups: weighted loss of every group of rows. tokens: of the rows that were
    scored. stats: the model's own."""

    loss: float
    losses: dict[str, float]
    bpb: dict[str, float]
    groups: list[float]
    tokens: int
    stats: dict[str, Any] = field(default_factory=dict)


def evaluate(lm: LanguageModel, view: View, run: RunConfig, world: World) -> Scores:
    """Score the first `run.eval_tokens` tokens of the held-out view (less if it is shorter).

    Rows are cut into groups of equal size whatever the number of ranks, so the result does not depend on it;
    rows that are left over are not scored.
    """
    rows = max(1, min(view.rows, run.eval_tokens // run.context))
    size = max(1, min(rows, GROUP_TOKENS // run.context))
    groups = rows // size
    heads = list(lm.readouts)
    sums = torch.zeros(groups, len(heads), 3, dtype=torch.float64, device=world.device)
    stats: dict[int, dict[str, Tensor]] = {}
    was_training = lm.training
    lm.eval()
    try:
        for g in shares(groups, world, together=sharded(lm)):
            micro = cut(view.batch(g, size).to(world.device), size)[0]
            with torch.no_grad(), autocast(world.device, run.precision):
                out = lm(micro.tokens, labels=micro.labels, weights=micro.weights, docs=micro.docs)
            if g in stats or g % world.size != world.rank:
                continue  # scored to keep the others company
            for h, head in enumerate(heads):
                nats, weight = out.sums[head]
                sums[g, h, 0], sums[g, h, 1] = nats.double(), weight.double()
                sums[g, h, 2] = target_bytes(micro, lm.readouts[head].shift, view)
            stats[g] = {name: value.double().cpu() for name, value in out.aux.stats.items()}
    finally:
        lm.train(was_training)
        settle(lm)
    return _scores(lm, world.sum(sums).cpu(), mean_stats(world.gather(stats)), groups * size * run.context)


def shares(groups: int, world: World, together: bool) -> list[int]:
    """The groups that this rank scores: every `size`-th. Together: all ranks go through as many, because a
    sharded model needs them all at every pass; who has none left repeats the last."""
    mine = list(range(world.rank, groups, world.size))
    if together:
        mine += [groups - 1] * (-(-groups // world.size) - len(mine))
    return mine


def _scores(lm: LanguageModel, sums: Tensor, stats: dict[str, Any], tokens: int) -> Scores:
    losses, bpb = {}, {}
    groups = torch.zeros(len(sums), dtype=torch.float64)
    for h, (head, c) in enumerate(lm.readouts.items()):
        nats, weight, size = sums[:, h].sum(0).tolist()
        losses[head] = nats / weight if weight else math.nan
        bpb[head] = nats / math.log(2) / size if size else math.nan
        groups += c.weight * sums[:, h, 0] / sums[:, h, 1].clamp_min(1e-9)
    loss = sum(lm.readouts[head].weight * value for head, value in losses.items())
    return Scores(loss, losses, bpb, groups.tolist(), tokens, stats)


def target_bytes(micro: Micro, shift: int, view: View) -> int:
    """UTF-8 bytes of the tokens that a head with this shift predicts, and that count in the loss."""
    targets = shift_targets(micro.labels, shift, micro.docs)
    if micro.weights is not None:
        targets = targets.masked_fill(shift_weights(micro.weights, shift) == 0, IGNORE)
    targets = targets.cpu()
    sizes = torch.from_numpy(view.bytes_per_token)
    return int(sizes[targets[targets != IGNORE]].sum())


def mean_stats(parts: list[dict[int, dict[str, Tensor]]]) -> dict[str, Any]:
    """Mean over groups of every statistic, a number or a list; the same whoever scored which group."""
    groups = {g: found for part in parts for g, found in part.items()}
    out: dict[str, Tensor] = {}
    for g in sorted(groups):
        for name, value in groups[g].items():
            out[name] = out[name] + value if name in out else value
    return {name: (total / len(groups)).tolist() for name, total in out.items()}
