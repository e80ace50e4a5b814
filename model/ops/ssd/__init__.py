"""The state-space dual (Mamba-2): one interface, several implementations.

Shape legend: B batch  T time  H heads  P head width  G groups of heads  N state width.
"""

from __future__ import annotations

from torch import Tensor

from model.ops.documents import Documents
from model.ops.select import Backend, choose, package, register
from model.ops.ssd import fla, mamba
from model.ops.ssd.cpu import ssd_chunked, ssd_flops
from model.ops.ssd.reference import ssd_reference

__all__ = ["ssd", "ssd_flops"]

register(
    "ssd",
    Backend("fla", fla.ssd_fla, supports=fla.refusal, available=package("fla")),
    Backend("mamba_ssm", mamba.ssd_mamba, supports=mamba.refusal, available=package("mamba_ssm")),
    Backend("chunked", ssd_chunked),
    Backend("reference", ssd_reference),
)


def ssd(
    x: Tensor,
    log_a: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    state: Tensor | None = None,
    docs: Documents | None = None,
    want_state: bool = False,
    chunk: int = 64,
    step: tuple[Tensor, Tensor, Tensor] | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """S_t = exp(log_a_t) S_{t-1} + b_t (x) x_t,  y_t = c_t . S_t  (Dao & Gu 2024, arXiv 2405.21060).

    x:     [B, T, H, P], already multiplied by the step size dt.
    log_a: [B, T, H], at most 0: dt * A.
    b, c:  [B, T, G, N]; head h reads group h // (H // G).
    state: [B, H, N, P] in fp32 (fp64 for fp64), of each row's first document; None is empty.
    docs:  where documents start and padding lies; None: every row is one document.

    Returns y [B, T, H, P] in x's dtype, and the state after each row's last document when wanted, else
    None. Every tensor argument has a gradient, the state too. A document that starts meets an empty
    state; padding neither writes nor decays, and its output is zero.

    chunk:   tokens of a chunk, for the `chunked` form alone; speed, not meaning.
    step:    (u [B, T, H, P], dt [B, T, H], A [H]) with x = u dt and log_a = dt A, for kernels that multiply
             themselves; no other backend looks at it.
    backend: `auto`, `fla` or `mamba_ssm` (CUDA), `chunked` (torch matmuls, any device) or `reference`.
    Raises BackendError when the named backend cannot serve, ValueError on shapes that do not fit.
    """
    _check(x, log_a, b, c, state)
    chosen = choose("ssd", backend, x, docs=docs, state=state, want_state=want_state, step=step)
    more = {"step": step} if chosen.fn is mamba.ssd_mamba else {}
    y, last = chosen.fn(x, log_a, b, c, state=state, docs=docs, want_state=want_state, chunk=chunk, **more)
    return y, (last if want_state else None)


def _check(x: Tensor, log_a: Tensor, b: Tensor, c: Tensor, state: Tensor | None) -> None:
    B, T, H, P = x.shape
    G, N = b.shape[2:]
    wanted = [("log_a", log_a, (B, T, H)), ("b", b, (B, T, G, N)), ("c", c, (B, T, G, N))]
    if state is not None:
        wanted.append(("state", state, (B, H, N, P)))
    for name, tensor, shape in wanted:
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"ssd: {name} must be {shape} beside x {tuple(x.shape)}, got {tuple(tensor.shape)}"
            )
    if H % G:
        raise ValueError(f"ssd: {H} heads do not divide into {G} groups")
