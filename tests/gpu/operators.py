"""Every backend of every operator against its fp64 reference on one device: errors, and speed against torch.

Shape legend: B batch  T time  H heads  K key width
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.core import Docs
from model.ops import linear
from model.ops.attention import attend
from model.ops.conv import causal_conv
from model.ops.select import OPERATORS, BackendError
from model.ops.ssd import ssd

Outputs = tuple[Tensor, ...]
ROUNDS = 5


class Row(NamedTuple):
    """One backend on one operator: errors relative to the largest value, or why it did not run."""

    operator: str
    backend: str
    rows: str
    output: float | None = None
    gradient: float | None = None
    ms: float | None = None
    ratio: float | None = None  # speed relative to the torch form of the same operator
    why: str = ""


class Operator(NamedTuple):
    """call(backend, docs, *leaves) -> outputs; shapes of the leaves; backend: the torch form."""

    call: Callable[..., Outputs]
    shapes: tuple[tuple[int, ...], ...]
    torch_form: str


def _log(x: Tensor) -> Tensor:
    return F.logsigmoid(x.float() + 2) if x.dtype != torch.float64 else F.logsigmoid(x + 2)


def _ssd(backend: str, docs: Docs | None, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Outputs:
    dt, A = F.softplus(dt.double() if dt.dtype == torch.float64 else dt.float()), -a.exp()
    y, _ = ssd(x * dt.to(x.dtype)[..., None], dt * A, b, c, docs=docs, step=(x, dt, A), backend=backend)
    return (y,)


def _delta(gate: Callable[[Tensor], Tensor | None]) -> Callable[..., Outputs]:
    def call(
        backend: str, docs: Docs | None, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor
    ) -> Outputs:
        k = F.normalize(k, dim=-1)
        return linear.delta_rule(q, k, v, beta.sigmoid(), gate(g), docs=docs, backend=backend)

    return call


def _gla(backend: str, docs: Docs | None, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Outputs:
    o, state = linear.gla(q, k, v, _log(g), docs=docs, backend=backend)
    assert state is not None
    return o, state


def _rwkv6(backend: str, docs: Docs | None, r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Outputs:
    return linear.rwkv6(r, k, v, _log(w), u, docs=docs, backend=backend)


def _conv(backend: str, docs: Docs | None, x: Tensor, weight: Tensor, bias: Tensor) -> Outputs:
    return (causal_conv(x, weight, bias, activation="silu", docs=docs, backend=backend)[0],)


def _window(backend: str, docs: Docs | None, q: Tensor, k: Tensor, v: Tensor) -> Outputs:
    return (attend(q, k, v, docs=docs, window=100, backend=backend),)


def operators(B: int, T: int, H: int, K: int) -> dict[str, Operator]:
    """Names are those of the registry, `kda` and the like after a slash."""
    x, head = (B, T, H, K), (B, T, H)
    return {
        "gla": Operator(_gla, (x, x, x, x), "chunked"),
        "rwkv6": Operator(_rwkv6, (x, x, x, x, (H, K)), "chunked"),
        "delta_rule": Operator(_delta(lambda g: None), (x, x, x, head, head), "chunked"),
        "gated_delta_rule": Operator(_delta(_log), (x, x, x, head, head), "chunked"),
        "gated_delta_rule/kda": Operator(_delta(_log), (x, x, x, head, x), "chunked"),
        "ssd": Operator(_ssd, (x, head, (H,), (B, T, 1, K), (B, T, 1, K)), "chunked"),
        "conv": Operator(_conv, ((B, T, H * K), (H * K, 4), (H * K,)), "shifts"),
        "attention": Operator(_window, (x, (B, T, max(H // 2, 1), K), (B, T, max(H // 2, 1), K)), "cpu"),
    }


def compare(
    device: str, dtype: torch.dtype, B: int = 2, T: int = 1024, H: int = 8, K: int = 64
) -> Iterator[Row]:
    """A row for every backend but the reference, whole rows and packed documents."""
    docs = Docs.packed(sorted({0, 1, T // 3, T, B * T - 1, B * T}), rows=B).to(device)
    for name, operator in operators(B, T, H, K).items():
        names = [b.name for b in OPERATORS[name.split("/")[0]] if b.name != "reference"]
        for rows, where in (("whole", None), ("packed", docs)):
            leaves = _leaves(operator.shapes, device)
            true = _run(operator, "reference", where, leaves, torch.float64)
            base = _seconds(operator, operator.torch_form, where, leaves, dtype)
            for backend in names:
                try:
                    got = _run(operator, backend, where, leaves, dtype)
                except BackendError as error:
                    yield Row(name, backend, rows, why=_reason(str(error), backend))
                    continue
                except Exception as error:  # one broken kernel must not hide the others
                    yield Row(name, backend, rows, why=f"FAILED {type(error).__name__}: {error}"[:200])
                    continue
                seconds = _seconds(operator, backend, where, leaves, dtype)
                errors = [max(_off(a, b) for a, b in zip(g, t)) for g, t in zip(got, true)]
                yield Row(name, backend, rows, *errors, 1e3 * seconds, base / seconds)


def _leaves(shapes: tuple[tuple[int, ...], ...], device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator).to(device) for s in shapes]


def _run(
    operator: Operator, backend: str, docs: Docs | None, leaves: list[Tensor], dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and the gradients of the sum of the first output times fixed weights."""
    made = [x.to(dtype).requires_grad_() for x in leaves]
    out = list(operator.call(backend, docs, *made))
    weights = torch.randn(out[0].shape, generator=torch.Generator().manual_seed(1)).to(out[0])
    found = torch.autograd.grad((out[0] * weights).sum(), made, allow_unused=True)
    return out, [torch.zeros_like(x) if g is None else g for g, x in zip(found, made)]


def _seconds(
    operator: Operator, backend: str, docs: Docs | None, leaves: list[Tensor], dtype: torch.dtype
) -> float:
    """The fastest of some rounds of forward and backward, after one to warm up."""
    times = []
    for _ in range(ROUNDS + 1):
        _wait(leaves[0])
        start = time.perf_counter()
        _run(operator, backend, docs, leaves, dtype)
        _wait(leaves[0])
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def _off(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want.double()).abs().max() / want.double().abs().max().clamp_min(1e-6)).item()


def _reason(error: str, backend: str) -> str:
    lines = [line.strip() for line in error.splitlines()]
    return next((line.split(": ", 1)[1] for line in lines if line.startswith(f"{backend}: ")), lines[0])
