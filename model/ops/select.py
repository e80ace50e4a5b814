"""Which implementation of an operator runs: chosen per call, by device, dtype and shape.

An operator registers its backends once, best first:

    register("ssd",
        Backend("mamba_ssm", ssd_cuda, supports=needs_cuda, available=package("mamba_ssm")),
        Backend("cpu", ssd_chunked, supports=...),
        Backend("reference", ssd_stepwise))

and each call picks one:

    backend = choose("ssd", requested, x, docs=docs, state=state)
    return backend.fn(x, ...)

`requested="auto"` takes the first backend that supports the call and is available. A *named* backend is
used or refused with `BackendError`: it never falls back silently. A package that fails to import is no
error until somebody names its backend.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Reason = str | None  # why a backend cannot serve; None when it can


class BackendError(RuntimeError):
    """The named backend does not exist, is not available here, or cannot serve this call."""


def _always(*_: Any, **__: Any) -> Reason:
    return None


@dataclass(frozen=True)
class Backend:
    """One implementation of an operator.

    fn:        the implementation; an adapter of a GPU package imports that package inside.
    supports:  `supports(x, **features)` -> why this call cannot be served, or None. Looks at device,
               dtype, shape and the operator's own features, never at what is installed.
    available: `available()` -> why it cannot run on this machine at all, or None. Asked after `supports`.
    """

    name: str
    fn: Callable[..., Any]
    supports: Callable[..., Reason] = _always
    available: Callable[[], Reason] = _always


OPERATORS: dict[str, tuple[Backend, ...]] = {}


def register(op: str, *backends: Backend) -> None:
    """Give the operator `op` its backends, in the order in which `auto` tries them."""
    OPERATORS[op] = backends


def known_backend(op: str, requested: str) -> str:
    """`requested`; a block that is built asks, so that a misspelt name does not wait for the first call.

    Raises ValueError unless it is `auto` or a backend of `op`. Whether it can run here is not asked.
    """
    names = ["auto", *(backend.name for backend in OPERATORS[op])]
    if requested not in names:
        raise ValueError(f"no backend of {op} is called {requested!r}: must be one of {', '.join(names)}")
    return requested


def choose(op: str, requested: str, x: Tensor, **features: Any) -> Backend:
    """The backend of `op` for the input `x`: the named one, or the first that can serve (`auto`).

    Raises BackendError, with every backend and what speaks against it, when none can.
    """
    for backend in OPERATORS[op]:
        if requested in ("auto", backend.name) and not refusal(backend, x, **features):
            return backend
    why = "\n".join(f"  {b.name}: {refusal(b, x, **features) or 'can serve'}" for b in OPERATORS[op])
    problem = (
        f"no backend called {requested!r}"
        if requested not in ("auto", *(b.name for b in OPERATORS[op]))
        else "no backend can serve this call"
        if requested == "auto"
        else f"backend {requested!r} cannot serve this call"
    )
    raise BackendError(f"{op}: {problem} ({x.dtype} on {x.device}); use 'auto' or one of\n{why}")


def refusal(backend: Backend, x: Tensor, **features: Any) -> Reason:
    """Why `backend` cannot serve `x`, or None."""
    return backend.supports(x, **features) or backend.available()


def needs_cuda(x: Tensor, **_: Any) -> Reason:
    """A `supports` for GPU kernels: CUDA tensors in fp32, fp16 or bf16."""
    if not x.is_cuda:
        return f"needs CUDA tensors, got {x.device.type}"
    return None if x.element_size() < 8 else f"needs fp32, fp16 or bf16, got {x.dtype}"


def package(name: str) -> Callable[[], Reason]:
    """An `available` that asks whether the package can be found, without importing it."""

    @functools.cache
    def available() -> Reason:
        found = importlib.util.find_spec(name) is not None
        return None if found else f"the package {name} is not installed (see requirements-cuda.txt)"

    return available
