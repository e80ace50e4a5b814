"""Linear attention with a decaying state, the whole family: one interface an operator.

Shape legend: B batch  T time  H heads  K key width  V value width.

`gla` decays per channel or per head, `rwkv6` reads before it writes, `delta_rule` corrects what the state
already says about a key. All take a state [B, H, K, V] in fp32 (fp64 for fp64) of each row's first document
(None is empty) and return o [B, T, H, V] in v's dtype and the state after each row's last document. A
document that starts meets an empty state; padding neither writes nor decays, and its output is zero.
Every tensor argument has a gradient, the state too.

backend: `auto`, `fla` (CUDA), `chunked` (torch matmuls, any device) or `reference` (token by token).
Raises BackendError when the named backend cannot serve, ValueError on shapes that do not fit.
"""

from __future__ import annotations

from torch import Tensor

from model.ops.documents import Documents
from model.ops.linear import fla
from model.ops.linear.delta import delta_chunked, delta_flops
from model.ops.linear.gla import gla_chunked, gla_flops, rwkv6_chunked
from model.ops.linear.reference import gla_reference, recurrence
from model.ops.select import Backend, choose, package, register
from model.ops.ssd import ssd, ssd_flops

__all__ = ["delta_flops", "delta_rule", "gla", "gla_flops", "rwkv6", "simple_gla_flops"]

_HAS_FLA = package("fla")

register(
    "gla",
    Backend("fla", fla.gla_fla, supports=fla.refusal, available=_HAS_FLA),
    Backend("chunked", gla_chunked),
    Backend("reference", gla_reference),
)
register(
    "rwkv6",
    Backend("fla", fla.rwkv6_fla, supports=fla.refusal, available=_HAS_FLA),
    Backend("chunked", rwkv6_chunked),
    Backend("reference", gla_reference),
)
register(
    "delta_rule",
    Backend("fla", fla.delta_fla, supports=fla.delta_refusal, available=_HAS_FLA),
    Backend("chunked", delta_chunked),
    Backend("reference", recurrence),
)
register(
    "gated_delta_rule",
    Backend("fla", fla.delta_fla, supports=fla.gated_delta_refusal, available=_HAS_FLA),
    Backend("chunked", delta_chunked),
    Backend("reference", recurrence),
)


def gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    state: Tensor | None = None,
    docs: Documents | None = None,
    floor: float | None = None,
    want_state: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """S_t = diag(exp g_t) S_{t-1} + k_t v_t^T,  o_t = scale q_t^T S_t  (Yang et al., arXiv 2312.06635).

    q, k:  [B, T, H, K].  v: [B, T, H, V].
    g:     [B, T, H, K], at most 0; or [B, T, H], one decay a head: then it is gated retention, and the
           state-space dual's operator serves it.
    scale: K^-1/2 by default.
    floor: a bound that the caller guarantees, g >= floor; from -60 / 64 on the fast form is chosen without a
           look.
    want_state: False saves making the final state, where it costs something, and gives None.
    """
    scale = _check("gla", q, k, v, scale, state, g=g)
    if g.dim() == 3:
        return ssd(v, g, k, q * scale, state=state, docs=docs, want_state=want_state, backend=backend)
    chosen = choose("gla", backend, v, docs=docs)
    o, last = chosen.fn(q, k, v, g, scale=scale, state=state, docs=docs, floor=floor)
    return o, (last if want_state else None)


def rwkv6(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    *,
    scale: float = 1.0,
    state: Tensor | None = None,
    docs: Documents | None = None,
    floor: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """o_t = scale r_t^T (S_{t-1} + diag(u) k_t v_t^T),  S_t = diag(exp w_t) S_{t-1} + k_t v_t^T.

    r, k, w: [B, T, H, K], the log decay w at most 0.  v: [B, T, H, V].  u: [H, K], the bonus of the
    token itself.  floor: w >= floor is guaranteed.  (Peng et al., arXiv 2404.05892.)
    """
    _check("rwkv6", r, k, v, scale, state, w=w)
    if w.dim() != 4 or u.shape != r.shape[2:]:
        raise ValueError(
            f"rwkv6: w must be {tuple(r.shape)} and u {tuple(r.shape[2:])}, "
            f"got {tuple(w.shape)} and {tuple(u.shape)}"
        )
    chosen = choose("rwkv6", backend, v, docs=docs)
    return chosen.fn(r, k, v, w, u=u, scale=scale, state=state, docs=docs, floor=floor)


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    *,
    scale: float | None = None,
    state: Tensor | None = None,
    docs: Documents | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """S' = diag(exp g_t) S_{t-1},  S_t = S' + beta_t k_t (v_t - k_t^T S')^T,  o_t = scale q_t^T S_t.

    q, k: [B, T, H, K]; keys of norm 1 keep the state bounded for beta up to 2.  v: [B, T, H, V].
    beta: [B, T, H].
    g:    None: DeltaNet (arXiv 2406.06484); [B, T, H]: Gated DeltaNet (2412.06464);
          [B, T, H, K]: Kimi Delta Attention (2510.26692). At most 0.
    scale: K^-1/2 by default.
    """
    scale = _check("delta_rule", q, k, v, scale, state, g=g)
    if beta.shape != q.shape[:3]:
        raise ValueError(f"delta_rule: beta must be {tuple(q.shape[:3])}, got {tuple(beta.shape)}")
    op = "delta_rule" if g is None else "gated_delta_rule"
    chosen = choose(op, backend, v, docs=docs, width=q.shape[-1])
    return chosen.fn(q, k, v, g, beta=beta, scale=scale, state=state, docs=docs)


def simple_gla_flops(T: int, H: int, K: int, V: int) -> int:
    """Forward matmul flops of one row of `gla` with one decay a head."""
    return ssd_flops(T, H, V, H, K)


def _check(
    op: str, q: Tensor, k: Tensor, v: Tensor, scale: float | None, state: Tensor | None, **gate: Tensor | None
) -> float:
    B, T, H, K = q.shape
    V = v.shape[-1]
    allowed: dict[str, list[tuple[int, ...]]] = {
        "k": [(B, T, H, K)],
        "v": [(B, T, H, V)],
        "state": [(B, H, K, V)],
    }
    for name in gate:
        allowed[name] = [(B, T, H, K), (B, T, H)]
    for name, x in {"k": k, "v": v, "state": state, **gate}.items():
        if x is not None and tuple(x.shape) not in allowed[name]:
            want = " or ".join(map(str, allowed[name]))
            raise ValueError(f"{op}: {name} must be {want} beside q {tuple(q.shape)}, got {tuple(x.shape)}")
    return K**-0.5 if scale is None else scale
