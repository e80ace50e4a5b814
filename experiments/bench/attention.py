"""The gradient of attention in bf16 on a CPU against that of torch's own kernel, forward pass included.

The shapes are those that training meets: windows and packed documents are cut into short blocks first.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.bench.harness import Candidate, Case
from model.ops.attention import backward

SHAPES = [(64, 8, 64, 32), (8, 9, 160, 64), (8, 8, 256, 64), (8, 8, 512, 64)]  # B, H, T, K
PEER = "torch's SDPA"


def cases() -> list[Case]:
    return [
        _case(*shape, masked)
        for shape in SHAPES
        for masked in (False, True)
        if not masked or shape[2] <= backward.MOST_MASKED
    ]


def _case(B: int, H: int, T: int, K: int, masked: bool) -> Case:
    mask = torch.ones(1, 1, T, T, dtype=torch.bool).tril() if masked else None

    def torchs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return backward.attention(q, k, v, mask, None)

    return Case(
        f"Attention B{B} H{H} T{T} K{K}, {'masked' if masked else 'causal'}, bf16, forward + backward",
        [Candidate(PEER, _step(B, H, T, K, torchs)), Candidate("ours", _step(B, H, T, K, ours))],
        base=PEER,
    )


def _step(B: int, H: int, T: int, K: int, fn: Callable[..., Tensor]) -> Callable[[], object]:
    torch.manual_seed(0)
    # As a block hands them over: heads behind tokens, transposed.
    made = [torch.randn(B, T, H, K, dtype=torch.bfloat16) for _ in range(4)]
    q, k, v, dy = (x.transpose(1, 2) for x in made)
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def run() -> object:
        return torch.autograd.grad(fn(*leaves), leaves, dy)

    return run
