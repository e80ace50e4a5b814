"""The ring in batched matmuls: tokens of a segment read the same slots, so they go together.

Shape legend: B batch  T time  H heads  P head width  G groups of heads  N state width  R slots
              C runs of a call  Q tokens of the longest run

A run is the part of a segment that lies in this call. Its first part may stand in the state.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from model.ops.attention.places import Places
from model.ops.dtypes import LOG2_E, at_least_fp32
from model.ops.ring.state import RingState


def ring_cpu(
    x: Tensor, log_a: Tensor, b: Tensor, c: Tensor, u: Tensor, *, slots: int, stride: int, at: Places,
    state: RingState | None = None,
) -> tuple[Tensor, RingState | None]:  # fmt: skip
    """See `ring_read`."""
    B, T, H, P = x.shape
    G, N = b.shape[2:]
    wide = at_least_fp32(x.dtype)
    runs = _runs(at, stride) if x.numel() else None
    if runs is None or runs.start.shape[1] == 0:
        same = None if state is None else RingState(*(t.clone() for t in state))
        return x.new_zeros(B, T, H, P, dtype=wide), same
    with torch.autocast(x.device.type, enabled=False):
        start = RingState.empty(x, B, slots, H, P, G, N) if state is None else state
        written, keys = _write(runs, x.to(wide), log_a.to(wide), b.to(wide), start)
        table = torch.cat([start.past.to(wide), written], 1)
        means = torch.cat([start.keys.to(wide), keys / stride], 1)
        reach = slots if state is not None else min(slots, runs.start.shape[1] - 1)
        y = _read(runs, table, means, c.to(wide), u.to(wide), slots, reach, H)
        after = None if state is None else _after(runs, table, means, keys, start, slots, at)
        return y, after


def ring_flops(T: int, H: int, P: int, G: int, N: int, slots: int, stride: int) -> int:
    """Forward FLOPs of one row of T tokens without a state."""
    Q = min(T, stride)
    C = -(-T // stride)
    reach = min(slots, C - 1)
    write = Q > 1  # einsum multiplies a sum over one token elementwise, which is not counted
    return 2 * C * Q * (H * N * P * (write + reach) + G * N * reach)


class _Runs(NamedTuple):
    """start, number of the segment, first place in it, length: each [B, C]; used [B, C] bool.

    of [B, T]: run of each token, and place [B, T] in it; real [B, T]: not padding. tokens [B, C, Q]: indices
    of each run's, inside [B, C, Q]: which of them are the run's. finished [B, C]: the segment ends with it.
    """

    start: Tensor
    number: Tensor
    first: Tensor
    length: Tensor
    used: Tensor
    of: Tensor
    place: Tensor
    tokens: Tensor
    inside: Tensor
    real: Tensor
    finished: Tensor


def _runs(at: Places, stride: int) -> _Runs:
    positions, segments = at
    B, T = positions.shape
    real = segments >= 0
    before = torch.cat([segments.new_full((B, 1), -1), segments[:, :-1]], 1)
    new = real & ((positions % stride == 0) | (segments != before))
    count = new.sum(1)
    C = int(count.max())
    of = new.cumsum(1) - 1
    time = torch.arange(T, device=segments.device).expand(B, T)
    start = time.new_zeros(B, C + 1).scatter_(1, torch.where(new, of, C), time)[:, :C]
    slot = torch.where(real, of, C)
    length = time.new_zeros(B, C + 1).scatter_add_(1, slot, torch.ones_like(time))[:, :C]
    used = torch.arange(C, device=segments.device) < count[:, None]
    place = positions.gather(1, start)
    within = torch.arange(min(T, stride), device=segments.device)
    index = (start[..., None] + within).clamp_max(T - 1)
    of = of.clamp(0, max(C - 1, 0))
    first = place % stride
    return _Runs(
        start, place // stride, first, length, used, of,
        (time - start.gather(1, of)).clamp(0, len(within) - 1) if C else time,
        index, within < length[..., None], real, used & (first + length == stride),
    )  # fmt: skip


def _gather(runs: _Runs, t: Tensor) -> Tensor:
    """t [B, T, ...] -> [B, C, Q, ...], 0 outside a run."""
    row = torch.arange(t.shape[0], device=t.device)[:, None, None]
    return torch.where(runs.inside.view(*runs.inside.shape, *[1] * (t.dim() - 2)), t[row, runs.tokens], 0)


def _write(runs: _Runs, x: Tensor, log_a: Tensor, b: Tensor, start: RingState) -> tuple[Tensor, Tensor]:
    """What each run's segment has written by its end [B, C, H, N, P], and its keys' sum [B, C, G, N]."""
    G = b.shape[2]
    xr, ar, br = (_gather(runs, t) for t in (x, log_a, b))
    later = torch.cat([ar[:, :, 1:], torch.zeros_like(ar[:, :, :1])], 2)
    # Summed from the end: what matters is near it, and there the sums are small.
    tail = later.flip(2).cumsum(2).flip(2)
    weighted = (xr * (tail * LOG2_E).exp2()[..., None]).unflatten(3, (G, -1))
    written = torch.einsum("bcqgn,bcqgrp->bcgrnp", br, weighted).flatten(2, 3)
    keys = br.sum(2)
    # Only a row's first run can be a segment's second part.
    goes_on = (runs.first[:, :1] > 0) & runs.used[:, :1]
    kept = (ar[:, 0].sum(1).exp() * goes_on)[..., None, None]
    first = written[:, :1] + (kept * start.open.to(kept.dtype))[:, None]
    first_key = keys[:, :1] + (goes_on[..., None] * start.open_key.to(kept.dtype))[:, None]
    return torch.cat([first, written[:, 1:]], 1), torch.cat([first_key, keys[:, 1:]], 1)


def _read(
    runs: _Runs, table: Tensor, means: Tensor, c: Tensor, u: Tensor, slots: int, reach: int, H: int
) -> Tensor:
    """[B, T, H, P]. The slot i before run n stands at slots + n - i of the table [B, slots + C, ...]."""
    C = runs.start.shape[1]
    if reach == 0:
        return table.new_zeros(*c.shape[:2], H, table.shape[-1])
    cr, ur = _gather(runs, c), _gather(runs, u)  # [B, C, Q, G, N]
    back = range(1, reach + 1)
    windows = torch.stack([means[:, slots - i : slots - i + C] for i in back], 2)  # [B, C, reach, G, N]
    logits = torch.einsum("bcqgn,bcsgn->bcgqs", ur, windows) * u.shape[-1] ** -0.5
    there = runs.number[..., None] >= torch.arange(1, reach + 1, device=c.device)
    logits = logits.masked_fill(~there[:, :, None, None], -torch.inf)
    rho = torch.cat([torch.zeros_like(logits[..., :1]), logits], -1).softmax(-1)[..., 1:]
    G = u.shape[2]
    parts = []
    for s, i in enumerate(back):
        slot = table[:, slots - i : slots - i + C].unflatten(2, (G, -1))  # [B, C, G, H/G, N, P]
        asked = cr * rho[..., s].transpose(2, 3)[..., None]
        parts.append(torch.einsum("bcqgn,bcgrnp->bcqgrp", asked, slot))
    y = sum(parts[1:], parts[0]).flatten(3, 4)  # [B, C, Q, H, P]
    row = torch.arange(len(c), device=c.device)[:, None]
    return torch.where(runs.real[..., None, None], y[row, runs.of, runs.place], 0)


def _after(
    runs: _Runs, table: Tensor, means: Tensor, keys: Tensor, start: RingState, slots: int, at: Places
) -> RingState:
    last = runs.used.sum(1) - 1  # [B], -1 in a row without tokens
    some, at_last = last >= 0, last.clamp_min(0)[:, None]
    done = runs.finished.gather(1, at_last)[:, 0] & some
    newest = last - (some & ~done).long()
    number = runs.number.gather(1, at_last)[:, 0] - (~done).long()
    slot = torch.arange(slots, device=last.device)
    held = (number[:, None] >= slots - 1 - slot) | ~some[:, None]
    index = (newest[:, None] + 1 + slot).clamp_min(0)
    row = torch.arange(len(last), device=last.device)
    past = torch.where(held[..., None, None, None], table[row[:, None], index], 0)
    mean = torch.where(held[..., None, None], means[row[:, None], index], 0)

    def opened(now: Tensor, before: Tensor) -> Tensor:
        shape = (-1, *[1] * (before.dim() - 1))
        now = torch.where(done.view(shape), 0, now[row, at_last[:, 0]])
        return torch.where(some.view(shape), now, before.to(now.dtype))

    position = torch.where(runs.real, at.positions, -1)
    final = runs.start.gather(1, at_last)[:, 0] + runs.length.gather(1, at_last)[:, 0] - 1
    seen = torch.where(some, position.gather(1, final.clamp_min(0)[:, None])[:, 0] + 1, start.seen)
    return RingState(past, mean, opened(table[:, slots:], start.open), opened(keys, start.open_key), seen)
