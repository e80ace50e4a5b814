"""Making, joining and thinning out the caches that cache-carrying methods keep.

Shape legend: B batch  T time  S slots  G key/value heads  K head width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model.compress.context import CompressedContext, LayerSlots
from model.compress.decoder import Decoder, Run
from model.compress.rows import text_positions


def prefill(
    decoder: Decoder, ids: Tensor, mask: Tensor, state: CompressedContext | None, keep_states: bool = False
) -> tuple[Run, Tensor]:
    """Run packed ids [B, T] through every layer after `state`; also their positions [B, T].

    Raises ValueError when the decoder has too few positions.
    """
    start = torch.zeros_like(mask.sum(1)) if state is None else state.next_position
    positions = text_positions(mask, start)
    past = None if state is None else decoder.lower(state)
    held = 0 if past is None else max(x.keys.shape[2] for x in past)
    decoder.check_length(int(positions.max()) + 1 if positions.numel() else 0, held + ids.shape[1])
    h = decoder.stem(decoder.embed(ids), positions)
    return decoder.run(h, positions, mask, past=past, keep_states=keep_states), positions


def join(
    decoder: Decoder, state: CompressedContext | None, layers: Sequence[LayerSlots]
) -> tuple[LayerSlots, ...]:
    """The slots of `state`, layer by layer, followed by new ones.
    Layers that shared a mask go on sharing one."""
    return tuple(layers) if state is None else joined(decoder.lower(state), layers)


def joined(held: Sequence[LayerSlots], layers: Sequence[LayerSlots]) -> tuple[LayerSlots, ...]:
    """`held` followed by `layers`, layer by layer."""
    masks: dict[tuple[int, int], Tensor] = {}
    out = []
    for old, new in zip(held, layers):
        key = (id(old.mask), id(new.mask))
        masks.setdefault(key, torch.cat([old.mask, new.mask], 1))
        keys, values = torch.cat([old.keys, new.keys], 2), torch.cat([old.values, new.values], 2)
        out.append(LayerSlots(keys, values, masks[key]))
    return tuple(out)


def take(x: Tensor, index: Tensor) -> Tensor:
    """x [B, G, T, K] at index int64 [B, S] or [B, G, S] -> a fresh tensor [B, G, S, K]."""
    if index.dim() == 2:
        index = index[:, None].expand(-1, x.shape[1], -1)
    return x.gather(2, index[..., None].expand(*index.shape, x.shape[3]))


def top_slots(scores: Tensor, mask: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """The `slots` [B] best of each row, in their original order; of equals the earlier.

    scores [..., T], mask bool [B, T] -> index int64 [..., S], keep bool [B, S] with S = slots.max().
    """
    S = int(slots.max()) if slots.numel() else 0
    shape = (scores.shape[0],) + (1,) * (scores.dim() - 2)
    scores = scores.masked_fill(~mask.view(*shape, -1), float("-inf"))
    order = scores.argsort(dim=-1, descending=True, stable=True)[..., :S]
    keep = torch.arange(S, device=scores.device) < slots.minimum(mask.sum(1))[:, None]
    last = scores.shape[-1]
    index = torch.where(keep.view(*shape, S), order, last).sort(-1).values
    return index.clamp_max(max(last - 1, 0)), keep


def window_of(mask: Tensor, slots: Tensor) -> Tensor:
    """int64 [B, T]: which of `slots` [B] equal windows of its row each packed token falls into (padding:
    the last)."""
    lengths = mask.sum(1).clamp_min(1)
    t = torch.arange(mask.shape[1], device=mask.device)
    window = t * slots[:, None] // lengths[:, None]
    return window.minimum((slots - 1).clamp_min(0)[:, None])


def pool(x: Tensor, mask: Tensor, slots: Tensor) -> Tensor:
    """Window means: x [B, ..., T, K], mask [B, T], slots [B] -> [B, ..., S, K]."""
    window = window_of(mask, slots)
    S = int(slots.max()) if slots.numel() else 0
    member = (window[:, None, :] == torch.arange(S, device=x.device)[:, None]) & mask[:, None, :]
    weight = member.to(x.dtype) / member.sum(-1, keepdim=True).clamp_min(1)
    return weight.view(weight.shape[0], *(1,) * (x.dim() - 3), *weight.shape[1:]) @ x
