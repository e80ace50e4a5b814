"""Linear attention with a decaying state, token by token: the definition that fast forms are held to.

Shape legend: B batch  T time  H heads  K key width  V value width.

One recurrence covers every member of the family. With S [K, V] the state of a head:

    S <- diag(exp g_t) S                                 g: none, a scalar, or one value per channel
    S <- S + beta_t k_t (v_t - k_t^T S)^T                the delta rule, when beta is given
    S <- S + k_t v_t^T                                   otherwise
    o_t = scale q_t^T S                                  after the update, or for RWKV-6
    o_t = scale q_t^T (S_before + diag(u) k_t v_t^T)     before it, with a bonus u for the token itself
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.ops.documents import Documents, zero_padding
from model.ops.dtypes import at_least_fp32


def recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    *,
    beta: Tensor | None = None,
    u: Tensor | None = None,
    scale: float,
    state: Tensor | None = None,
    docs: Documents | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """o [B, T, H, V] in v's dtype and the state [B, H, K, V] after each row's last document.

    q, k [B, T, H, K]; v [B, T, H, V]; g None, [B, T, H] or [B, T, H, K], at most 0; beta [B, T, H];
    u [H, K]: RWKV-6. Computed in `dtype`, by default fp32, or fp64 for fp64 inputs.
    """
    B, T, H, K = q.shape
    dtype = dtype or at_least_fp32(v.dtype)
    S = q.new_zeros(B, H, K, v.shape[-1], dtype=dtype) if state is None else state.to(dtype, copy=True)
    if g is not None and g.dim() == 3:
        g = g[..., None]
    q, k, v = zero_padding(docs, q, k, v)
    g, beta = (None if x is None else zero_padding(docs, x)[0] for x in (g, beta))
    owner = None if docs is None else docs.first_segment()
    outputs = []
    for t in range(T):
        qt, kt, vt = (x[:, t, :, :, None].to(dtype) for x in (q, k, v))
        gt = (
            None if g is None else (g[:, t, :, None, None] if g.dim() == 3 else g[:, t, :, :, None]).to(dtype)
        )
        start, token = S, None
        if docs is not None and owner is not None:
            segment = docs.segments[:, t]
            token = (segment >= 0)[:, None, None, None]
            start = torch.where((segment == owner)[:, None, None, None], S, 0)
            owner = torch.where(segment >= 0, segment, owner)
        decayed = start if gt is None else gt.exp() * start
        if beta is not None:
            bt = beta[:, t, :, None, None].to(dtype)
            update = bt * kt * (vt.mT - kt.mT @ decayed)
        else:
            update = kt * vt.mT
        new = decayed + update
        read = new if u is None else start + u[:, :, None].to(dtype) * update
        o = scale * (qt.mT @ read)[:, :, 0]
        outputs.append(o if token is None else torch.where(token[..., 0], o, 0))
        S = new if token is None else torch.where(token, new, S)
    o = torch.stack(outputs, 1) if outputs else v.to(dtype, copy=True)
    return o.to(v.dtype), S


def gla_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    scale: float,
    u: Tensor | None = None,
    state: Tensor | None = None,
    docs: Documents | None = None,
    floor: float | None = None,
) -> tuple[Tensor, Tensor]:
    """GLA, or with u RWKV-6; what is promised of the decays (`floor`) is of no use here."""
    return recurrence(q, k, v, g, u=u, scale=scale, state=state, docs=docs)
