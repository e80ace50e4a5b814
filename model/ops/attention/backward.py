"""The gradient of attention in bf16 on a CPU, by batched matmuls over blocks that fit the cache.

Shape legend: B batch  T queries  S keys  H query heads  G key/value heads  r = H / G  K key width
              V value width  n = B G rows of a matmul  m queries of a block

torch's own CPU kernel makes the forward pass well and its gradient badly in bf16: up to 512 causal queries,
or 256 masked ones, the same products as batched matmuls take less time (experiments/bench/attention.py).
This is that gradient, with the scores made anew, block by block (FlashAttention, 2205.14135, section 3.1):

    P = softmax(scale Q K^T)    dV = P^T dY    dP = dY V^T    dS = P (dP - rowsum(P dP))
    dQ = scale dS K             dK = scale dS^T Q

Products accumulate in fp32 inside a matmul; softmax and its gradient are computed in fp32 and stored in bf16,
as the operands of the next product. Whole causal rows go in blocks of ROWS queries against the keys up to
them, so dK and dV are rounded to bf16 once a block: MOST / ROWS times.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

ROWS = 128  # queries of a block under the causal mask
CHUNK = 1 << 20  # scores at a time: what a core's cache holds
MOST, MOST_MASKED = 512, 256  # queries above which the kernel's own gradient is as fast
MOST_KEYS = 2048  # a masked block holds all its keys at once
HIDDEN = -1e30  # finite, so that a row that sees nothing has no NaN; its gradient is put to 0


def serves(q: Tensor, k: Tensor, mask: Tensor | None) -> bool:
    """Whether this gradient is the faster one. mask: None (causal) or bool [1 or B, 1, T, S]."""
    needed = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    small = 0 < q.shape[2] <= (MOST if mask is None else MOST_MASKED) and 0 < k.shape[2] <= MOST_KEYS
    plain = mask is None or (mask.dtype == torch.bool and mask.shape[1] == 1)
    return needed and small and plain and q.device.type == "cpu" and q.dtype == torch.bfloat16


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """SDPA with the gradient of this file: q [B, H, T, K], k [B, G, S, K], v [B, G, S, V] -> [B, H, T, V].

    mask: bool [1 or B, 1, T, S], True where a key is seen; None: causal, T = S. Not twice differentiable.
    """
    return _Attention.apply(q, k, v, mask, q.shape[-1] ** -0.5 if scale is None else scale)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        ctx.save_for_backward(q, k, v, mask)
        ctx.scale = scale
        gqa = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=gqa
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask = ctx.saved_tensors
        return *gradient(dy, q, k, v, mask, ctx.scale), None, None


@torch.library.custom_op("latent_lab::attention_backward", mutates_args=())
def gradient(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv). One opaque operator, so that a compiled model runs the same loop."""
    B, H, T, _ = q.shape
    G, S = k.shape[1:3]
    r = H // G
    hidden = None
    if mask is not None:
        dy = dy.masked_fill(~mask.any(-1, keepdim=True), 0.0)
        hidden = ~mask.expand(B, 1, T, S)
    keys, values = k.flatten(0, 1).contiguous(), v.flatten(0, 1).contiguous()
    dq = torch.empty(B, H, T, q.shape[-1], dtype=q.dtype)
    dk, dv = torch.zeros_like(keys), torch.zeros_like(values)
    rows, drows, out = (x.unflatten(1, (G, r)) for x in (q, dy, dq))
    with torch.autocast("cpu", enabled=False):
        for i, j, s in blocks(T, S, mask is None):
            some = max(1, CHUNK // (H * (j - i) * s))
            for b in range(0, B, some):
                e = min(B, b + some)
                qi, dyi = (x[b:e, :, :, i:j].flatten(2, 3).flatten(0, 1) for x in (rows, drows))
                at = slice(b * G, e * G)
                veil = None if hidden is None else hidden[b:e]
                p = _weights(qi, keys[at, :s], scale, j - i, G, veil)
                dv[at, :s].baddbmm_(p.transpose(1, 2), dyi)
                dp = torch.bmm(dyi, values[at, :s].transpose(1, 2))
                ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)
                dk[at, :s].baddbmm_(ds.transpose(1, 2), qi, alpha=scale)
                made = torch.baddbmm(qi.new_empty(1), ds, keys[at, :s], beta=0, alpha=scale)
                out[b:e, :, :, i:j] = made.unflatten(1, (r, j - i)).unflatten(0, (e - b, G))
    return dq, dk.unflatten(0, (B, G)), dv.unflatten(0, (B, G))


def blocks(T: int, S: int, causal: bool) -> list[tuple[int, int, int]]:
    """(first query, end, keys that they may see) of every block."""
    if not causal:
        return [(0, T, S)]
    ends = [*range(ROWS, T, ROWS), T]
    return [(i, j, j) for i, j in zip([0, *ends], ends)]


def _weights(q: Tensor, k: Tensor, scale: float, m: int, G: int, hidden: Tensor | None) -> Tensor:
    """Softmax of a block's scores [n, r m, s]. hidden: [B, 1, m, s]; None: the last m keys are causal."""
    scores = torch.baddbmm(q.new_empty(1), q, k.transpose(1, 2), beta=0, alpha=scale)
    each = scores.unflatten(1, (-1, m))
    if hidden is None:
        each[..., -m:].masked_fill_(torch.ones(m, m, dtype=torch.bool).triu(1), HIDDEN)
    else:
        each.unflatten(0, (-1, G)).masked_fill_(hidden[:, :, None], HIDDEN)
    return torch.softmax(scores, -1)


@gradient.register_fake
def _(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


@register_flop_formula(torch.ops.latent_lab.attention_backward)
def _flops(dy: tuple, q: tuple, k: tuple, v: tuple, mask: tuple | None, *_: object, **__: object) -> int:
    """Scores again, dp, dv, dq, dk: every product that is made."""
    B, H, T, K = q
    seen = sum((j - i) * s for i, j, s in blocks(T, k[2], mask is None))
    return 2 * B * H * seen * (3 * K + 2 * v[3])
