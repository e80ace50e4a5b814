"""Product-quantized rows: a row is made of one code from each of G small tables (PQ, Jégou et al. 2011).

    E_v = [C_1[k_v1] ; C_2[k_v2] ; ... ; C_G[k_vG]]

Shape legend: V rows  W width  G groups  K codes of a group  c = W / G channels of a code  N states
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from model.quant.codebook import nearest

ROUNDS = 8  # of Lloyd's algorithm
SAMPLE = 64  # rows a code that it looks at


def lookup(books: Tensor, codes: Tensor) -> Tensor:
    """books [G, K, c], codes [..., G] -> rows [..., W]."""
    G, K, _ = books.shape
    index = codes.long() + torch.arange(G, device=codes.device) * K
    return F.embedding(index, books.flatten(0, 1)).flatten(-2)


def products(h: Tensor, books: Tensor, codes: Tensor) -> Tensor:
    """h [..., W] times every row -> [..., V]: G K products of c channels, then G additions a row.

    Reads V G codes and not V W numbers, which is what decoding waits for.
    """
    parts = torch.einsum("...gc,gkc->...gk", h.unflatten(-1, (books.shape[0], -1)), books.to(h.dtype))
    out = parts[..., 0, :].index_select(-1, codes[:, 0].int())
    for g in range(1, books.shape[0]):
        out = out + parts[..., g, :].index_select(-1, codes[:, g].int())
    return out


def fit(rows: Tensor, groups: int, codes: int) -> tuple[Tensor, Tensor]:
    """Tables [G, K, c] and codes [V, G] nearest to rows [V, W], by k-means in each group.

    With K >= V every row has codes of its own and is exact. Deterministic.
    """
    V, W = rows.shape
    parts = rows.unflatten(1, (groups, -1)).unbind(1)
    if codes >= V:
        pad = rows.new_zeros(codes - V, W // groups)
        own = torch.arange(V)[:, None].expand(V, groups)
        return torch.stack([torch.cat([part, pad]) for part in parts]), own
    generator = torch.Generator().manual_seed(0)
    sample = torch.randperm(V, generator=generator)[: SAMPLE * codes]
    books, found = [], []
    for part in parts:
        book = _lloyd(part[sample], codes)
        books.append(book)
        found.append(torch.cat([nearest(some, book) for some in part.split(1 << 14)]))
    return torch.stack(books), torch.stack(found, 1)


def _lloyd(points: Tensor, codes: int) -> Tensor:
    """points [M, c] in random order, M >= K -> centres [K, c]. A centre that nobody chose stays."""
    centres = points[:codes].clone()
    for _ in range(ROUNDS):
        chosen = nearest(points, centres)
        count = torch.bincount(chosen, minlength=codes)[:, None]
        total = torch.zeros_like(centres).index_add_(0, chosen, points)
        centres = torch.where(count > 0, total / count.clamp_min(1), centres)
    return centres


def assign(vocab: int, groups: int, codes: int) -> Tensor:
    """Codes [V, G] for rows that nobody has trained yet: at random, but no two rows the same.

    Raises ValueError when there are fewer combinations than rows.
    """
    digits = math.ceil(math.log(vocab) / math.log(codes) - 1e-9) if vocab > 1 else 0
    if digits > groups:
        raise ValueError(
            f"embed.vq: {groups} groups of {codes} codes name {codes**groups} rows, and the vocabulary has"
            f" {vocab}: take more groups or codes"
        )
    generator = torch.Generator().manual_seed(0)
    out = torch.randint(codes, (vocab, groups), generator=generator, device="cpu")
    number = torch.randperm(vocab, generator=generator, device="cpu")
    for g in range(digits):
        out[:, g] = number % codes
        number = number // codes
    return out


def smallest(codes: Tensor, size: int) -> Tensor:
    """Codes in the smallest type that holds `size` of them."""
    kind = torch.uint8 if size <= 1 << 8 else torch.int16 if size <= 1 << 15 else torch.int32
    return codes.to(kind)
