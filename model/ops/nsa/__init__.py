"""Two branches of native sparse attention (Yuan et al., arXiv 2502.11089): pooled blocks and selected blocks.

Shape legend: B batch  T queries  S keys  C pooled keys  H query heads  G key/value heads  K key width
              V value width  n blocks that a query reads
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from model.ops.attention.places import Places
from model.ops.nsa.cpu import nsa_cpu, nsa_flops
from model.ops.nsa.grid import Grid
from model.ops.nsa.reference import nsa_reference
from model.ops.select import Backend, choose, register

__all__ = ["Grid", "Pooled", "nsa", "nsa_flops"]

register("nsa", Backend("cpu", nsa_cpu), Backend("reference", nsa_reference))


class Pooled(NamedTuple):
    """k [B, C, G, K], v [B, C, G, V]; at: Places [B, C] of each one's last token; number
    [B, C] in its document."""

    k: Tensor
    v: Tensor
    at: Places
    number: Tensor


def nsa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pooled: Pooled,
    *,
    grid: Grid,
    at: Places,
    key_at: Places,
    base: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(pooled branch, selected branch), each [B, T, H, V] in q's dtype.

    Pooled:    softmax attention over the pooled keys of the query's own document whose last token is at most
               the query's own.
    Selected:  a block's score is the weight that the pooled branch gave, summed over the group's query heads,
               to pooled keys, each counted by the share of it that lies in the block. A query reads the
               tokens up to itself of n blocks: the first, the one before its own, its own, and those of
               the highest scores (of equals the earliest).

    q [B, T, H, K], k [B, S, G, K], v [B, S, G, V]; H a multiple of G. at, key_at: Places of queries and keys.
    base: [B, T] promise that the key at position p of a query's document is at index base + p; None: unknown.
    The selection has no gradient. Padding (segment -1) is never read, and its output is 0.
    Raises BackendError when the named backend does not exist.
    """
    chosen = choose("nsa", backend, q)
    return chosen.fn(q, k, v, pooled, grid=grid, at=at, key_at=key_at, base=base)
