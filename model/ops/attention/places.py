"""Who may see whom: the document law of attention, stated once.

Shape legend: B batch  T queries  S keys

A query at position p of document d sees the keys of d at positions in [p - window + 1, p]. Segment -1 is
padding: nobody sees it, and it sees nobody (its output is 0).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from model.ops.documents import Documents


class Places(NamedTuple):
    """Where tokens stand: positions [B, T] in their documents, segments [B, T] (document ids, -1 padding)."""

    positions: Tensor
    segments: Tensor

    @staticmethod
    def of(docs: Documents) -> Places:
        return Places(docs.positions, docs.segments)


def resolve(
    q: Tensor, k: Tensor, docs: Documents | None, at: Places | None, key_at: Places | None
) -> tuple[Places, Places]:
    """Places of queries and keys, spelled out: from `docs`, from the pair, or whole rows.

    Whole rows: the last T keys are the queries' own tokens, what stands before them is their past.
    Raises ValueError when `docs` and the pair are mixed, or the number of keys does not fit.
    """
    B, T, S = q.shape[0], q.shape[1], k.shape[1]
    if at is not None and key_at is not None and docs is None:
        return at, key_at
    if at is not None or key_at is not None:
        raise ValueError("attention: give `docs`, or both `at` and `key_at`, or none of them")
    if docs is not None:
        if S != T:
            raise ValueError(f"attention: with docs, keys are the queries' own tokens; got T={T}, S={S}")
        return Places.of(docs), Places.of(docs)
    if S < T:
        raise ValueError(f"attention: fewer keys than queries (T={T}, S={S})")
    index = torch.arange(S, device=q.device).expand(B, S)
    zero = torch.zeros_like(index)
    return Places(index[:, S - T :], zero[:, S - T :]), Places(index, zero)


def visible(at: Places, key_at: Places, window: int | None, lifetime: Tensor | None = None) -> Tensor:
    """[..., T, S] bool: query t may see key s. Places may carry any leading dimensions.

    lifetime: [..., S] how many positions on, its own included, each key is seen; None: for ever.
    """
    distance = at.positions[..., :, None] - key_at.positions[..., None, :]
    same = (at.segments[..., :, None] == key_at.segments[..., None, :]) & (at.segments >= 0)[..., :, None]
    seen = same & (distance >= 0)
    if lifetime is not None:
        seen = seen & (distance < lifetime[..., None, :])
    return seen if window is None else seen & (distance < window)
