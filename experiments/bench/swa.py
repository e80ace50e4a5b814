"""Sliding-window attention, forward and backward, against torch's SDPA with the full band as its mask.

T4096 B1 H8 K64, bf16. The mask of the peer is made once, outside the clock. Causal SDPA without any window
is shown as well: it does other work, but it is what one would use instead.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.bench.harness import Candidate, Case
from model.core import Docs
from model.ops.attention import attend

B, T, H, K = 1, 4096, 8, 64


def cases() -> list[Case]:
    return [_window(W) for W in (256, 512, 1024)] + [_documents()]


def _forward_backward(fn: Callable[..., Tensor], T: int = T) -> Callable[[], object]:
    torch.manual_seed(0)
    leaves = [torch.randn(B, T, H, K, dtype=torch.bfloat16).requires_grad_() for _ in range(3)]
    dy = torch.randn(B, T, H, K, dtype=torch.bfloat16)

    def run() -> object:
        return torch.autograd.grad(fn(*leaves), leaves, dy)

    return run


def _sdpa(mask: Tensor | None) -> Callable[..., Tensor]:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None).transpose(1, 2)

    return fn


def _window(W: int) -> Case:
    index = torch.arange(T)
    distance = index[:, None] - index
    band = (distance >= 0) & (distance < W)
    base = "SDPA, band mask"
    return Case(
        f"Sliding window {W}, B{B} T{T} H{H} K{K}, bf16, forward + backward",
        [
            Candidate(base, _forward_backward(_sdpa(band))),
            Candidate("SDPA, causal, no window", _forward_backward(_sdpa(None))),
            Candidate("ours", _forward_backward(lambda *x: attend(*x, window=W))),
        ],
        base=base,
        bars={"ours": 2.6} if W == 512 else {},
    )


def _documents() -> Case:
    """Packed documents of 10 to 600 tokens, no window: attention reaches no further than the longest."""
    gen = torch.Generator().manual_seed(0)
    cuts = torch.randint(10, 600, (64,), generator=gen).cumsum(0)
    docs = Docs.packed([0, *cuts[cuts < T].tolist(), T])
    same = docs.segments[0][:, None] == docs.segments[0]
    mask = same.tril()
    base = "SDPA, document mask"
    return Case(
        f"{docs.cu_seqlens.numel() - 1} packed documents, B{B} T{T} H{H} K{K}, bf16, forward + backward",
        [
            Candidate(base, _forward_backward(_sdpa(mask))),
            Candidate("ours", _forward_backward(lambda *x: attend(*x, docs=docs))),
        ],
        base=base,
    )
