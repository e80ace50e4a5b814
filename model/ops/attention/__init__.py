"""Softmax attention over documents, windows and caches.

Shape legend: B batch  T queries  S keys  H query heads  G key/value heads  K key width  V value width
"""

from __future__ import annotations

from torch import Tensor

from model.ops.attention.cpu import attend_cpu
from model.ops.attention.flash import attend_flash, supports_flash
from model.ops.attention.flex import attend_flex, supports_flex
from model.ops.attention.places import Places
from model.ops.attention.reference import attend_reference
from model.ops.documents import Documents
from model.ops.select import Backend, choose, package, register

__all__ = ["Places", "attend"]

# "cpu" is torch's SDPA: the best form on a CPU, and on a GPU what serves every call.
register(
    "attention",
    Backend("flash_attn", attend_flash, supports_flash, package("flash_attn")),
    Backend("flex", attend_flex, supports_flex),
    Backend("cpu", attend_cpu),
    Backend("reference", attend_reference),
)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    docs: Documents | None = None,
    at: Places | None = None,
    key_at: Places | None = None,
    window: int | None = None,
    span: int | None = None,
    scale: float | None = None,
    slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    lifetime: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Causal attention -> [B, T, H, V] in q's dtype.

    q [B, T, H, K], k [B, S, G, K], v [B, S, G, V]; H is a multiple of G, and query head h reads key/value
    head h // (H / G).

    A query sees the keys of its own document at positions in [p - window + 1, p]; padding (segment -1) is
    never seen, and a padding query gives 0. Where tokens stand is said in one of three ways:
      nothing        every row is one document, and its last T keys are the queries' own tokens.
      docs           the keys are the queries' own tokens (S = T), in these documents.
      at and key_at  anything else: queries against a cache or a memory.

    window: how many positions back, its own included, a query sees; None is all of them.
    span:   a promise that makes `at`/`key_at` fast: the last T keys are the queries' own tokens, and no
            query sees a key more than span - 1 places before its own in the order of `k`.
    scale:  of the logits; None is K^-1/2.
    slopes: [H] ALiBi: a key at distance d loses slope * d.
    lifetime: [B, S] int64: key s is seen at distances below it; None is no limit.
    sinks:  [H] learned logits that join every softmax and carry no value.
    Raises BackendError when a named backend cannot serve, ValueError on places that do not fit.
    """
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"attention: {q.shape[2]} query heads do not share {k.shape[2]} key/value heads")
    features = {
        "docs": docs,
        "at": at,
        "key_at": key_at,
        "window": window,
        "span": span,
        "scale": scale,
        "slopes": slopes,
        "sinks": sinks,
        "lifetime": lifetime,
    }
    return choose("attention", backend, q, k=k, v=v, **features).fn(q, k, v, **features)
