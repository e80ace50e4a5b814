"""The definition of the loss: all logits at once, in fp32 or fp64.

Shape legend: N tokens  D model width  V vocabulary
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model.ops.dtypes import at_least_fp32
from model.ops.loss.forms import TokenLoss


def linear_cross_entropy_reference(
    h: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    form: TokenLoss = TokenLoss(),  # noqa: B008
    ignore: int = -100,
    reduction: str = "sum",
) -> Tensor:
    """See `linear_token_loss` and `forms`; differentiable in either reduction."""
    work = at_least_fp32(h.dtype)
    logits = F.linear(h.to(work), weight.to(work), None if bias is None else bias.to(work))
    loss = F.cross_entropy(logits, targets, ignore_index=ignore, reduction="none")
    if form.kind == "mile":
        log_p = logits.detach().log_softmax(-1)
        loss = loss * (1 - (log_p.exp() * log_p).sum(-1)) ** form.gamma
    elif form.kind == "alpha" and form.alpha != 1:
        power = torch.exp((form.alpha - 1) * loss)  # p_target ** (1 - alpha)
        loss = (power - 1) / (form.alpha * (form.alpha - 1))
    loss = loss + form.z * logits.logsumexp(-1).square() * (targets != ignore)
    if weights is not None:
        loss = loss * weights.to(work)
    return loss.sum() if reduction == "sum" else loss
