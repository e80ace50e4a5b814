"""The token before each one, across documents, padding and calls.

Shape legend: B batch  T time  D width
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.ops.documents import Documents


def token_before(x: Tensor, state: Tensor | None, docs: Documents | None) -> Tensor:
    """[B, T, D]: the token before each one in its document; `state` [B, D], or 0, before the first."""
    before = torch.zeros_like(x[:, :1]) if state is None else state[:, None].to(x.dtype)
    shifted = torch.cat([before, x], dim=1)[:, :-1]
    if docs is None or x.shape[1] == 0:
        return shifted
    starts = (docs.positions == 0)[..., None]
    # Padding may stand between a document's tokens of the last call and of this one.
    goes_on = (docs.segments == docs.first_segment()[:, None])[..., None]
    return torch.where(starts, before * goes_on, shifted)


def last_token(x: Tensor, state: Tensor, docs: Documents | None) -> Tensor:
    """[B, D]: the last token that is not padding, in the state's dtype; `state` where there is none."""
    T = x.shape[1]
    if T == 0:
        return state.clone()
    if docs is None or not docs.padded:
        return x[:, -1].to(state.dtype, copy=True)
    index = torch.arange(T, device=x.device)
    last = torch.where(docs.segments >= 0, index, -1).amax(1)
    token = x.gather(1, last.clamp_min(0)[:, None, None].expand(-1, 1, x.shape[2]))[:, 0]
    return torch.where((last >= 0)[:, None], token.to(state.dtype), state)
