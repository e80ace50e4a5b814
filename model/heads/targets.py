"""What a head should predict where: labels and loss weights, shifted inside their documents.

Shape legend: B batch  T time
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.core import Docs

IGNORE = -100


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
