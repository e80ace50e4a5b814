"""Prediction heads: of the token itself, the next, the one after it; all read off one table.

Shape legend: B batch  T time  D model width  V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.combine import Residual
from model.core import Ctx, Docs, State, Step
from model.ops.norm import RMSNorm
from model.registry import make_block
from model.schema import HeadConfig

IGNORE = -100


class Head(nn.Module):
    """One head: an optional residual MLP of its own, a norm, then the shared unembedding.

    shift:  it predicts the token `shift` places on (0: reconstruction).
    weight: its share of the training loss.
    """

    def __init__(self, dim: int, config: HeadConfig, norm_eps: float = 1e-5) -> None:
        super().__init__()
        self.shift, self.weight = config.shift, config.weight
        self.ffn = None if config.ffn is None else Residual(make_block("mlp", dim, **config.ffn), norm_eps)
        self.norm = RMSNorm(dim, norm_eps)

    def init_state(self, batch: int, like: Tensor, capacity: int | None = None) -> State | None:
        return None if self.ffn is None else self.ffn.init_state(batch, like, capacity)

    def forward(self, x: Tensor, state: State | None = None, ctx: Ctx | None = None) -> Step:
        """x [B, T, D] -> the normalised [B, T, D] whose product with the table is the logits."""
        step = Step(x, state) if self.ffn is None else self.ffn(x, state, ctx)
        return step._replace(y=self.norm(step.y))


def shift_targets(labels: Tensor, shift: int, docs: Docs | None) -> Tensor:
    """What a head should predict at each position: [B, T] ids, -100 where there is nothing to predict.

    labels: [B, T], unshifted, -100 ignored. The last `shift` positions of every document (and of every
    row) have no target, and padding has none.
    """
    if shift == 0:
        return labels if docs is None or not docs.padded else labels.masked_fill(~docs.tokens, IGNORE)
    out = torch.full_like(labels, IGNORE)
    n = labels.shape[1] - shift
    if n <= 0:
        return out
    out[:, :n] = labels[:, shift:]
    if docs is not None:
        same = docs.segments[:, shift:] == docs.segments[:, :n]
        if docs.padded:
            same = same & docs.tokens[:, :n]
        out[:, :n] = torch.where(same, out[:, :n], IGNORE)
    return out


def shift_weights(weights: Tensor, shift: int) -> Tensor:
    """Loss weights [B, T] belong to tokens: move them to the positions that predict those tokens."""
    if shift == 0:
        return weights
    out = torch.zeros_like(weights)
    out[:, : max(weights.shape[1] - shift, 0)] = weights[:, shift:]
    return out
