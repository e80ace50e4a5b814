"""The state-space dual, forward and backward, against transformers' Mamba-2 scan; and its convolution.

B4 T1024 H16 P64 N64, one group. The peer gets dt and A apart and multiplies them itself; we get the
products, which is 1 to 2 % of the work. Its default chunk is 256; 64 is shown because it suits it better.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.bench.harness import Candidate, Case
from model.core import Docs
from model.ops.conv import causal_conv
from model.ops.ssd import ssd

B, T, H, P, N = 4, 1024, 16, 64, 64


def cases() -> list[Case]:
    return [_scan(), _conv()]


def _forward_backward(fn: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], object]:
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    dy = torch.randn_like(fn(*leaves))

    def run() -> object:
        return torch.autograd.grad(fn(*leaves), leaves, dy)

    return run


def _scan() -> Case:
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    torch.manual_seed(0)
    u, b, c = torch.randn(B, T, H, P), torch.randn(B, T, 1, N), torch.randn(B, T, 1, N)
    dt, A = F.softplus(torch.randn(B, T, H) - 4), -torch.arange(1.0, H + 1)
    x, log_a = u * dt[..., None], dt * A
    docs = Docs.packed([0, 300, 310, 1500, 2048, 3000, B * T], rows=B)

    def theirs(chunk: int) -> Callable[[], object]:
        return _forward_backward(lambda *t: mamba2_chunk_scan(t[0], t[1], A, t[2], t[3], chunk), u, dt, b, c)

    def ours(dtype: torch.dtype, compiled: bool = False, docs: Docs | None = None) -> Callable[[], object]:
        def fn(*t: Tensor) -> Tensor:
            return ssd(*t, docs=docs, backend="chunked")[0]

        run = torch.compile(fn) if compiled else fn
        return _forward_backward(run, x.to(dtype), log_a, b.to(dtype), c.to(dtype))

    half = torch.bfloat16
    return Case(
        f"SSD forward + backward, B{B} T{T} H{H} P{P} N{N}",
        [
            Candidate("transformers, chunk 256 (default)", theirs(256)),
            Candidate("transformers, chunk 64", theirs(64)),
            Candidate("ours fp32", ours(torch.float32)),
            Candidate("ours bf16", ours(half)),
            Candidate("ours bf16, 9 documents", ours(half, docs=docs)),
            Candidate("ours bf16 compiled", ours(half, compiled=True)),
            Candidate("ours bf16 compiled, 9 documents", ours(half, compiled=True, docs=docs)),
        ],
        base="transformers, chunk 256 (default)",
        bars={"ours bf16 compiled": 6.5},
    )


def _conv() -> Case:
    C, W = 1152, 4
    torch.manual_seed(0)
    x, w, bias = torch.randn(B, T, C), 0.3 * torch.randn(C, W), torch.randn(C)
    inputs = [t.bfloat16() for t in (x, w, bias)]

    def peer(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
        z = F.conv1d(x.transpose(1, 2), w[:, None], bias, padding=W - 1, groups=C)[..., :T]
        return F.silu(z).transpose(1, 2)

    def ours(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
        return causal_conv(x, w, bias, activation="silu")[0]

    docs = Docs.packed([0, 300, 310, 1500, 2048, 3000, B * T], rows=B)

    def packed(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
        return causal_conv(x, w, bias, activation="silu", docs=docs)[0]

    return Case(
        f"Causal convolution + SiLU, B{B} T{T} C{C} W{W}, bf16, forward + backward",
        [
            Candidate("F.conv1d + silu", _forward_backward(peer, *inputs)),
            Candidate("F.conv1d + silu compiled", _forward_backward(torch.compile(peer), *inputs)),
            Candidate("ours", _forward_backward(ours, *inputs)),
            Candidate("ours compiled", _forward_backward(torch.compile(ours), *inputs)),
            Candidate("ours, 9 documents", _forward_backward(packed, *inputs)),
            Candidate("ours compiled, 9 documents", _forward_backward(torch.compile(packed), *inputs)),
        ],
        base="F.conv1d + silu",
    )
