"""The definition of the loss: all logits at once, in fp32 or fp64.

Shape legend: N tokens  D model width  V vocabulary
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_cross_entropy_reference(
    h: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    z_loss: float = 0.0,
    ignore: int = -100,
    reduction: str = "sum",
) -> Tensor:
    """See `linear_cross_entropy`; differentiable in either reduction."""
    work = torch.float64 if h.dtype == torch.float64 else torch.float32
    logits = F.linear(h.to(work), weight.to(work), None if bias is None else bias.to(work))
    loss = F.cross_entropy(logits, targets, ignore_index=ignore, reduction="none")
    loss = loss + z_loss * logits.logsumexp(-1).square() * (targets != ignore)
    if weights is not None:
        loss = loss * weights.to(work)
    return loss.sum() if reduction == "sum" else loss
