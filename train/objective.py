"""What is minimised in place of the plain cross-entropy: another token loss, or fewer tokens.

Selection (`select.rho`): with l the model's loss of a token and r the reference's, from a sidecar of the
dataset, the share `keep` of the supervised tokens with the largest excess l - r is trained on.

    unit token   Rho-1 (Lin et al. 2024, arXiv 2404.07965)
    unit row     whole rows by their mean excess: RHO-LOSS (Mindermann et al. 2022, arXiv 2206.07137)

The loss is the mean over what is kept, micro batch by micro batch. It costs one more product with the token
table; the backward pass runs through every position all the same. Only readouts of the next token are
selected, since the reference predicts no other. Evaluation counts every token.

Shape legend: N = B*T targets  B rows  T context
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from model.ops.loss import IGNORE, TokenLoss, linear_cross_entropy, linear_token_loss
from model.schema import Config
from model.sections import RhoConfig


class Objective:
    """Called by the model for every supervised reading; see `__call__`. keep: share trained on just now."""

    def __init__(self, config: Config) -> None:
        c = config.loss
        self.form = TokenLoss(c.kind, c.z, c.gamma, c.alpha).settled
        self.rho: RhoConfig | None = config.select.rho
        self.keep = 1.0

    @property
    def plain(self) -> bool:
        """Whether it is the cross-entropy of every token."""
        return self.form.plain and self.rho is None

    def advance(self, step: int, total: int) -> None:
        """Set the share for this step: from 1 to `keep` along a line over the warm-up."""
        if self.rho is None:
            return
        warm = self.rho.warm * total if self.rho.warm < 1 else self.rho.warm
        self.keep = 1 - (1 - self.rho.keep) * min(1.0, step / warm if warm else 1.0)

    def __call__(
        self, h: Tensor, table: Tensor, targets: Tensor, weights: Tensor | None, reference: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(what is minimised, cross-entropy of every target), 0-d sums in nats, the second without gradient.

        h [N, D], table [V, D], targets [N], weights [N] or None. reference: [B, T] nats of the reference for
        the same targets, or None: nothing is selected.
        """
        if self.rho is None or reference is None or self.keep >= 1:
            return linear_token_loss(h, table, targets, weights, form=self.form)
        each = linear_cross_entropy(h.detach(), table.detach(), targets, reduction="none")
        counted = targets != IGNORE if weights is None else (targets != IGNORE) & (weights > 0)
        chosen = choose(each - reference.flatten(), counted, self.keep, self.rho, reference.shape[1])
        share = chosen.sum() / counted.sum().clamp_min(1)
        picked = chosen if weights is None else weights * chosen
        loss, _ = linear_token_loss(h, table, targets, picked, form=self.form)
        ce = (each if weights is None else each * weights).sum()
        return loss / share.clamp_min(1e-9), ce


def choose(excess: Tensor, counted: Tensor, keep: float, rho: RhoConfig, T: int) -> Tensor:
    """[N] weights of the tokens: 1 or 0, or soft; 0 where `counted` [N] is false. excess [N] in nats.

    The ceil(keep * n) largest of the n that count are kept; softened weights have the same sum.
    """
    if rho.unit == "row":
        rows, some = excess.view(-1, T), counted.view(-1, T)
        mean = (rows * some).sum(1) / some.sum(1).clamp_min(1)
        return choose(mean, some.any(1), keep, RhoConfig(rho.ref, soften=rho.soften), 1).repeat_interleave(
            T
        ) * counted.to(excess.dtype)
    kept = math.ceil(keep * int(counted.sum()))
    if not kept:
        return torch.zeros_like(excess)
    scores = torch.where(counted, excess, -torch.inf)
    top = scores.topk(kept)
    if not rho.soften:
        return torch.zeros_like(excess).index_fill_(0, top.indices, 1.0)
    soft = torch.where(counted, torch.sigmoid((excess - top.values[-1]) / rho.soften), 0.0)
    return soft * (kept / soft.sum())
