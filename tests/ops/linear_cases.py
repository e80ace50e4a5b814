"""What the tests of GLA, RWKV-6 and the delta rule share: random calls and the comparison of two runs.

Shape legend: B batch  T time  H heads  K key width  V value width
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.core import Docs
from model.ops.linear import delta_rule, gla, rwkv6

OPS = {
    "gla": gla,
    "retention": gla,
    "rwkv6": rwkv6,
    "delta": delta_rule,
    "gated_delta": delta_rule,
    "kda": delta_rule,
}


@dataclass
class Call:
    """Arguments of one operator, all of them leaves that gradients are taken to."""

    op: str
    args: list[Tensor]
    state: Tensor | None
    docs: Docs | None
    options: dict[str, Any]

    def leaves(self) -> list[Tensor]:
        return [*self.args, *([] if self.state is None else [self.state])]

    def to(self, dtype: torch.dtype) -> Call:
        """The same values as new leaves; a state keeps at least fp32."""
        state = self.state
        if state is not None:
            state = state.detach().to(torch.promote_types(dtype, torch.float32), copy=True).requires_grad_()
        args = [a.detach().to(dtype, copy=True).requires_grad_() for a in self.args]
        return replace(self, args=args, state=state)

    def run(self, backend: str = "chunked") -> tuple[Tensor, Tensor]:
        return OPS[self.op](*self.args, **self.options, state=self.state, docs=self.docs, backend=backend)


def make_call(
    op: str, B: int, T: int, H: int = 2, K: int = 5, V: int = 6, *, decay: float = 0.2, seed: int = 0,
    docs: Docs | None = None, state: bool = True, **options: Any,
) -> Call:  # fmt: skip
    """A random call in fp64; log decays are uniform in [-decay, 0]."""
    torch.manual_seed(seed)
    q, k, v = torch.randn(B, T, H, K), torch.randn(B, T, H, K), torch.randn(B, T, H, V)
    per_head, per_channel = -decay * torch.rand(B, T, H), -decay * torch.rand(B, T, H, K)
    beta = 2 * torch.rand(B, T, H)
    unit = F.normalize(k, dim=-1)
    args = {
        "gla": [q, k, v, per_channel],
        "retention": [q, k, v, per_head],
        "rwkv6": [q, k, v, per_channel, torch.randn(H, K)],
        "delta": [q, unit, v, beta],
        "gated_delta": [q, unit, v, beta, per_head],
        "kda": [q, unit, v, beta, per_channel],
    }[op]
    S = torch.randn(B, H, K, V) if state else None
    return Call(op, args, S, docs, options).to(torch.float64)


def random_docs(B: int, T: int, seed: int) -> Docs | None:
    """None, packed documents, or documents with padding before, between the rows' edges and after."""
    rng = random.Random(seed)
    kind = rng.choice(["whole", "packed", "padded"])
    if kind == "whole" or T == 0:
        return None
    segments, n = torch.empty(B, T, dtype=torch.int64), 0
    for b in range(B):
        cuts = sorted({0, *(rng.randrange(T) for _ in range(rng.randint(0, 4)))})
        for start, stop in zip(cuts, [*cuts[1:], T]):
            segments[b, start:stop] = n
            n += 1
        if kind == "padded":
            segments[b, : rng.randint(0, T // 3)] = -1
            segments[b, T - rng.randint(0, T // 3) :] = -1
    return Docs.from_segments(segments, torch.zeros_like(segments))


def results(call: Call, backend: str = "chunked") -> list[Tensor]:
    """o, final state and every gradient of a fixed random function of both, in fp64."""
    o, last = call.run(backend)
    generator = torch.Generator().manual_seed(5)
    loss = sum(
        (x.double() * torch.randn(x.shape, dtype=torch.float64, generator=generator)).sum() for x in (o, last)
    )
    grads = torch.autograd.grad(loss, call.leaves(), allow_unused=True, materialize_grads=True)
    return [x.double() for x in (o, last, *grads)]


def assert_close(got: list[Tensor], want: list[Tensor], tol: float, floor: float = 1e-3) -> None:
    """Off by at most tol times the largest value (or `floor`, where everything cancels)."""
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        assert g.shape == w.shape and torch.isfinite(g).all(), f"result {i}"
        if w.numel():
            off, scale = (g - w).abs().max().item(), w.abs().max().item()
            assert off <= tol * max(scale, floor), f"result {i}: off by {off:.2e} at scale {scale:.2e}"
