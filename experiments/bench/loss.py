"""Output layer and cross-entropy, forward and backward, against plain logits in fp32.

4096 rows, D512, V32000, bf16 operands, fp32 weight. Ours is for memory (it never holds the logits of the
batch: 128 MiB of a chunk instead of 500 MiB, thrice); it should not cost much time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.bench.harness import Candidate, Case
from model.ops.loss import linear_cross_entropy

N, D, V = 4096, 512, 32_000


def cases() -> list[Case]:
    return [_case(V), _case(8192)]


def _case(V: int) -> Case:
    torch.manual_seed(0)
    h, weight, targets = torch.randn(N, D).bfloat16(), 0.02 * torch.randn(V, D), torch.randint(V, (N,))

    def plain(h: Tensor, w: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h, w.bfloat16()).float(), targets, reduction="sum")

    def half(h: Tensor, w: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h, w.bfloat16()), targets, reduction="sum")

    def ours(chunk: int | None) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda h, w: linear_cross_entropy(h, w, targets, chunk=chunk)

    def timed(fn: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], object]:
        leaves = h.clone().requires_grad_(), weight.clone().requires_grad_()
        return lambda: torch.autograd.grad(fn(*leaves) / N, leaves)

    base = "logits in fp32"
    return Case(
        f"Linear + cross-entropy, {N} rows, D{D} V{V}, bf16, forward + backward",
        [
            Candidate(base, timed(plain)),
            Candidate("logits in bf16", timed(half)),
            Candidate("ours", timed(ours(None))),
            Candidate("ours, chunk 256", timed(ours(256))),
        ],
        base=base,
    )
