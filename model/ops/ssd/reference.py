"""The state-space dual recurrence, token by token: what every faster form must equal.

Shape legend: B batch  T time  H heads  P head width  G groups of heads  N state width.

    S_t = exp(log_a_t) S_{t-1} + b_t (x) x_t          y_t = c_t . S_t

with S [N, P] per head. The first token of a document meets an empty state, except that of a row's first
document, which meets the state passed in. Padding neither writes nor decays, and its output is zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.ops.documents import Documents
from model.ops.dtypes import at_least_fp32


def ssd_reference(
    x: Tensor,
    log_a: Tensor,
    b: Tensor,
    c: Tensor,
    state: Tensor | None = None,
    docs: Documents | None = None,
    want_state: bool = True,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """y [B, T, H, P] and the state [B, H, N, P] after the last token; arguments as in `ssd`.

    Sums in fp32, or fp64 when x is fp64. Differentiable in every tensor argument.
    """
    B, T, H, P = x.shape
    G, N = b.shape[2:]
    wide = at_least_fp32(x.dtype)
    xw, a = x.to(wide), log_a.to(wide).exp()
    bw, cw = (t.to(wide).repeat_interleave(H // G, dim=2) for t in (b, c))
    S = x.new_zeros(B, H, N, P, dtype=wide) if state is None else state.to(wide)
    if docs is not None:
        last = docs.first_segment()
    ys = []
    for t in range(T):
        update = bw[:, t, :, :, None] * xw[:, t, :, None, :]
        decayed = a[:, t, :, None, None] * S
        if docs is None:
            S = decayed + update
            ys.append(torch.einsum("bhn,bhnp->bhp", cw[:, t], S))
            continue
        segment = docs.segments[:, t]
        token, same = (m[:, None, None, None] for m in (segment >= 0, segment == last))
        S = torch.where(token, torch.where(same, decayed, 0) + update, S)
        ys.append(torch.where(token[..., 0], torch.einsum("bhn,bhnp->bhp", cw[:, t], S), 0))
        last = torch.where(segment >= 0, segment, last)
    y = torch.stack(ys, 1) if ys else xw
    return y.to(x.dtype), S if T else S.clone()
