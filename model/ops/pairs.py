"""Pairwise compression with selective expansion: the mathematics, without loops and differentiable.

A stream of T tokens is a memory of L tokens and a window of the last T_w. The memory's pairs (2i, 2i+1) each
become one vector; the n most important pairs come back as their two originals, in order:

    n = min(floor(r P + M (1 - r) / 2), P),  P = L / 2,  length P + n + T_w, about T - (1 - r)(L - M) / 2

r = 1 or M >= L gives the stream back. An odd memory hands its last token to the window: nothing is lost.

`attend_pairs` is the causal form for models trained from scratch: every query has a window and a memory of
its own, and chooses for itself.

Shape legend: B batch  T time  S keys  P pairs  n selected pairs  d width  H heads  G key/value heads
              W window (rows of queries)  K head width
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.ops.attention.places import Places, visible
from model.ops.dtypes import at_least_fp32

EPSILON = 1e-6  # r P + M (1 - r) / 2 may fall just short of a whole number in floating point


def window_length(length: Tensor, T_w: int) -> Tensor:
    """Window of rows of `length` [B]: the last T_w, one more if the memory would be odd; short rows whole."""
    memory = (length - T_w).clamp_min(0)
    return length - memory + memory % 2


def selected_count(pairs: Tensor, r: float, M: float) -> Tensor:
    """n for `pairs` [B]. Raises ValueError unless 0 <= r <= 1 and M >= 0."""
    if not 0 <= r <= 1 or M < 0:
        raise ValueError(f"r={r}, M={M}: r lies between 0 and 1, M is not negative")
    wanted = (pairs * r + M * (1 - r) / 2 + EPSILON).floor().long()
    return torch.minimum(wanted, pairs)


def pair_up(x: Tensor) -> Tensor:
    """Memory [..., 2P, d] -> [..., P, 2, d]."""
    return x.unflatten(-2, (-1, 2))


class PairMerge(nn.Module):
    """Two tokens into one: a mean with learned weights, plus a SwiGLU of both at learned places in the pair.

    y = a x_0 + b x_1 + W_down(silu(W_gate p) * W_up p),  p = [x_0 + pos_0; x_1 + pos_1],  a = b = 1/2 first.
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.tensor([0.5, 0.5]))
        self.positions = nn.Parameter(torch.zeros(2, dim))
        self.gate = nn.Linear(2 * dim, hidden_dim, bias=False)
        self.up = nn.Linear(2 * dim, hidden_dim, bias=False)
        self.down = nn.Linear(hidden_dim, dim, bias=False)
        nn.init.normal_(self.down.weight, std=0.02 / hidden_dim**0.5)

    def merge(self, pairs: Tensor) -> Tensor:
        """[..., P, 2, d] -> [..., P, d], in the dtype of the pairs, whatever that of the weights."""
        p = (pairs + self.positions.to(pairs.dtype)).flatten(-2).to(self.gate.weight.dtype)
        mean = (pairs * self.mix.to(pairs.dtype)[:, None]).sum(-2)
        return mean + self.down(nn.functional.silu(self.gate(p)) * self.up(p)).to(pairs.dtype)


def attention_paid(q: Tensor, k: Tensor, scale: float, there: Tensor) -> Tensor:
    """Softmax over pairs, fp32 (fp64 for fp64) [B, H, W, P]; there bool [B, 1 or W, P].

    Rows with no pair are of no meaning.
    """
    dtype = at_least_fp32(q.dtype)
    with torch.autocast(q.device.type, enabled=False):
        logits = (q.to(dtype) @ k.to(dtype).transpose(-1, -2)) * scale
        return logits.masked_fill(~there[:, None], torch.finfo(logits.dtype).min).softmax(-1)


def importance(q: Tensor, k: Tensor, scale: float, asking: Tensor, there: Tensor) -> Tensor:
    """How much the window attends to each pair: softmax over pairs, summed over queries, averaged over heads.

    q [B, H, W, K] window queries, k [B, H, P, K] keys of the pairs, asking bool [B, W], there bool [B, P]
    -> [B, P]; pairs that are not there get 0.
    """
    weights = attention_paid(q, k, scale, there[:, None])
    return (weights * asking[:, None, :, None]).sum(2).mean(1) * there


def select(scores: Tensor, n: Tensor, there: Tensor) -> Tensor:
    """The n [B] best pairs of each row as bool [B, P]; of equals the earlier."""
    order = scores.masked_fill(~there, float("-inf")).argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )
    return (rank < n[:, None]) & there


def expand(pairs: Tensor, compressed: Tensor, selected: Tensor, gate: Tensor | None = None) -> Tensor:
    """Originals where selected, the compressed vector elsewhere, on the grid of places.

    pairs [B, ..., P, 2, d], compressed [B, ..., P, d], selected bool [B, P] -> [B, ..., 2P, d]; the second
    place of a pair that is not selected holds nothing of use (`places` leaves it out).
    gate: [B, P] in place of the hard 0 / 1, for straight-through scores.
    """
    shape = (selected.shape[0], *(1,) * (compressed.dim() - 3), selected.shape[1], 1)
    chosen = selected.view(shape)
    if gate is None:
        first = torch.where(chosen, pairs[..., 0, :], compressed)
    else:
        first = compressed + gate.view(shape).to(compressed.dtype) * (pairs[..., 0, :] - compressed)
    return torch.stack([first, pairs[..., 1, :]], -2).flatten(-3, -2)


def places(selected: Tensor, there: Tensor) -> Tensor:
    """bool [B, 2P]: which places of the grid are used."""
    return torch.stack([there, selected & there], -1).flatten(-2)


def compact(keep: Tensor) -> tuple[Tensor, Tensor]:
    """Gather index int64 [B, S] of the kept places of [B, N], in order, and mask bool [B, S].

    S is the most that any row keeps.
    """
    counts = keep.sum(1)
    S = int(counts.max()) if counts.numel() else 0
    order = (~keep).long().argsort(dim=1, stable=True)[:, :S]
    return order, torch.arange(S, device=keep.device) < counts[:, None]


def straight_through(scores: Tensor, selected: Tensor, there: Tensor) -> Tensor:
    """[B, P]: the hard selection, with the gradient of sigmoid(log-score minus its cut).

    The cut lies halfway between the last pair selected and the first one left out.
    """
    log = scores.clamp_min(1e-9).log()
    inside = log.masked_fill(~selected, float("inf")).amin(1, keepdim=True)
    outside = log.masked_fill(selected | ~there, float("-inf")).amax(1, keepdim=True)
    cut = torch.where(inside.isinf(), outside, torch.where(outside.isinf(), inside, (inside + outside) / 2))
    soft = torch.sigmoid(log - torch.where(cut.isinf(), 0.0, cut).detach()) * there
    return selected.to(soft.dtype) + (soft - soft.detach())


def attend_pairs(
    q: Tensor, k: Tensor, v: Tensor, at: Places, key_at: Places,
    merged_k: Tensor, merged_v: Tensor, ends: Places, *, window: int, r: float, M: float,
) -> Tensor:  # fmt: skip
    """Causal attention over a window and a memory of pairs -> [B, T, H, K].

    A query at place p of its document sees the pairs (2i, 2i+1) with 2i + 1 <= p - window through their
    merged key and value, and every later token as it is. Of its P pairs it opens the n (see above) to which
    it itself pays most attention, the mean over heads: those it sees as their two tokens.

    q [B, T, H, K], k, v [B, S, G, K] at `at` and `key_at`; merged_k, merged_v [B, P, G, K], in order, whose
    second tokens stand at `ends` (segment -1: no pair). Padding queries give 0.
    """
    scale, H, P = q.shape[-1] ** -0.5, q.shape[2], merged_k.shape[1]
    reach = (at.positions - window)[:, :, None]
    seen = visible(at, key_at, None)
    mask = seen & ((key_at.positions | 1)[:, None] > reach)
    if P:
        far = (at.segments[:, :, None] == ends.segments[:, None]) & (at.segments >= 0)[:, :, None]
        far = far & (ends.positions[:, None] <= reach)
        opened = _opened(q, merged_k, far, scale, r, M) if r or M else torch.zeros_like(far)
        pair = _pair_of(key_at, ends)[:, None].expand_as(seen)
        mask = torch.cat([mask | (seen & opened.gather(2, pair)), far & ~opened], -1)
        k, v = torch.cat([k, merged_k], 1), torch.cat([v, merged_v], 1)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    gqa = k.shape[1] != H
    y = nn.functional.scaled_dot_product_attention(q, k, v, mask[:, None], scale=scale, enable_gqa=gqa)
    return y.transpose(1, 2)


@torch.no_grad()
def _opened(q: Tensor, merged_k: Tensor, far: Tensor, scale: float, r: float, M: float) -> Tensor:
    """bool [B, T, P]: the pairs that each query opens. The choice takes no gradient."""
    k = merged_k.repeat_interleave(q.shape[2] // merged_k.shape[2], 2)
    paid = attention_paid(q.transpose(1, 2), k.transpose(1, 2), scale, far).mean(1)
    n = selected_count(far.sum(-1), r, M)
    return select(paid.flatten(0, 1), n.flatten(), far.flatten(0, 1)).view_as(far)


def _pair_of(key_at: Places, ends: Places) -> Tensor:
    """int64 [B, S]: the index of each key's pair among `ends`, which stand in order.

    Of no meaning for a key whose pair is not there.
    """
    stride = 1 << 40  # places in a document, which is what tells segments apart

    def code(segments: Tensor, positions: Tensor) -> Tensor:
        return (segments + 2) * stride + positions

    there = code(ends.segments, ends.positions).masked_fill(ends.segments == -1, torch.iinfo(torch.int64).max)
    keys = code(key_at.segments, key_at.positions | 1)
    found = torch.searchsorted(there, keys.expand(there.shape[0], -1).contiguous())
    return found.clamp_max(there.shape[1] - 1)
