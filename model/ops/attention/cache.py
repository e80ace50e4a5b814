"""Key/value caches: the state of an attention block, and what its queries may look at through it.

Shape legend: B batch  T new tokens  C slots  G key/value heads  K key width  V value width

A cache belongs to the last document of each row. Rows may have seen different numbers of tokens.
  GrowingKV  slot p holds position p; it grows by doubling.
  FixedKV    the same with a fixed number of slots, so that one compiled decode step serves.
  WindowKV   the last W - 1 tokens, right-aligned: slot C - 1 holds the newest.
Empty slots are 0. Without autograd a GrowingKV or FixedKV is written in place: a cache is consumed when
passed on.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from model.ops.attention.places import Places
from model.ops.documents import Documents


class GrowingKV(NamedTuple):
    """k [B, C, G, K], v [B, C, G, V], seen [B] int64: tokens of the row's document so far."""

    k: Tensor
    v: Tensor
    seen: Tensor


class FixedKV(NamedTuple):
    """As GrowingKV with C fixed; more tokens than that raise OverflowError."""

    k: Tensor
    v: Tensor
    seen: Tensor


class WindowKV(NamedTuple):
    """The last C = W - 1 tokens, right-aligned; seen [B] int64 goes on past C."""

    k: Tensor
    v: Tensor
    seen: Tensor


Cache = GrowingKV | FixedKV | WindowKV
C = TypeVar("C", GrowingKV, FixedKV, WindowKV)


class View(NamedTuple):
    """What the queries of a call may look at: `attend(q, **view._asdict(), ...)`."""

    k: Tensor
    v: Tensor
    docs: Documents | None = None
    at: Places | None = None
    key_at: Places | None = None
    span: int | None = None


def empty_cache(
    batch: int,
    like: Tensor,
    *,
    heads: int,
    widths: tuple[int, int],
    window: int | None = None,
    capacity: int | None = None,
) -> Cache:
    """A cache that has seen nothing; heads G, widths (K, V); `window` makes a WindowKV."""
    slots = window - 1 if window is not None else capacity or 0
    k, v = (like.new_zeros(batch, slots, heads, width) for width in widths)
    seen = torch.zeros(batch, dtype=torch.int64, device=like.device)
    if window is not None:
        return WindowKV(k, v, seen)
    return GrowingKV(k, v, seen) if capacity is None else FixedKV(k, v, seen)


def extend(past: C | None, k: Tensor, v: Tensor, docs: Documents | None = None) -> tuple[View, C | None]:
    """Add a call's keys and values to `past` -> (what its queries see, the cache after the call).

    k [B, T, G, K], v [B, T, G, V]; `past` belongs to the first document of each row, the returned cache to
    the last. Raises OverflowError when a FixedKV is full.
    """
    if past is None:
        return View(k, v, docs), None
    run = _last_run(docs, past.seen, k.shape[1])
    _check_room(past, run)
    old = past._replace(k=past.k.to(k.dtype), v=past.v.to(v.dtype))
    if _fresh(past, k):
        view = View(k, v, docs)
    elif docs is None and not isinstance(past, WindowKV):
        new = _store(past, run, k, v, docs)
        return _whole_view(new, past.seen, k), new
    else:
        view = _view(old, k, v, docs)
    return view, _store(past, run, k, v, docs)


# ----------------------------------------------------------------------------- what queries see


def _fresh(past: Cache, k: Tensor) -> bool:
    """A prefill from nothing takes the fast forms. Not asked where the answer would break a graph."""
    if past.k.shape[1] == 0 and not isinstance(past, WindowKV):
        return True
    return k.shape[1] > 1 and not torch.compiler.is_compiling() and not bool(past.seen.any())


def _whole_view(new: GrowingKV | FixedKV, seen: Tensor, k: Tensor) -> View:
    """Whole rows: the written cache holds every key, and slots are positions."""
    B, T = k.shape[:2]
    slots = new.k.shape[1]
    if isinstance(new, GrowingKV):
        slots = int(new.seen.max()) if B else 0
    positions = seen[:, None] + torch.arange(T, device=k.device)
    slot = torch.arange(slots, device=k.device).expand(B, slots)
    # A slot that is still empty lies after every query, so causality hides it.
    at, key_at = (Places(p, torch.zeros_like(p)) for p in (positions, slot))
    return View(new.k[:, :slots].to(k.dtype), new.v[:, :slots].to(k.dtype), None, at, key_at)


def _view(past: Cache, k: Tensor, v: Tensor, docs: Documents | None) -> View:
    """The past in front of the new tokens."""
    B, T = k.shape[:2]
    C = past.k.shape[1]
    slot = torch.arange(C, device=k.device).expand(B, C)
    position = past.seen[:, None] - C + slot if isinstance(past, WindowKV) else slot
    held = (position >= 0) & (position < past.seen[:, None])
    if docs is None:
        at = Places(past.seen[:, None] + torch.arange(T, device=k.device), slot.new_zeros(B, T))
        first = slot.new_zeros(B, 1)
    else:
        first = docs.first_segment()[:, None]
        going_on = docs.segments == first
        at = Places(docs.positions + past.seen[:, None] * going_on, docs.segments)
    keys = torch.cat([past.k, k], dim=1), torch.cat([past.v, v], dim=1)
    key_at = Places(
        torch.cat([position, at.positions], dim=1),
        torch.cat([torch.where(held, first, -1), at.segments], dim=1),
    )
    if not isinstance(past, WindowKV):
        return View(*keys, None, at, key_at)
    if docs is not None and docs.padded:
        keys, key_at = _close_up(keys, key_at, docs, C)
    return View(*keys, None, at, key_at, C + 1)


def _close_up(
    keys: tuple[Tensor, Tensor], key_at: Places, docs: Documents, C: int
) -> tuple[tuple[Tensor, Tensor], Places]:
    """Slide the past over a row's left padding, right up to its first token, so that distance is index."""
    pad = (docs.segments >= 0).int().argmax(1)[:, None]
    slot = torch.arange(key_at.positions.shape[1], device=pad.device).expand(pad.shape[0], -1)
    source = torch.where(slot < C + pad, slot - pad, slot)
    real = source >= 0
    source = source.clamp_min(0)
    k, v = (_rows(x, source) for x in keys)
    segments = torch.where(real, key_at.segments.gather(1, source), -1)
    return (k, v), Places(key_at.positions.gather(1, source), segments)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """x [B, S, G, K], index [B, N] -> [B, N, G, K]."""
    return x.gather(1, index[:, :, None, None].expand(-1, -1, *x.shape[2:]))


# ----------------------------------------------------------------------------- what is kept


class _Run(NamedTuple):
    """The tokens of this call that belong to each row's last document."""

    start: Tensor  # [B] index of the first of them
    first: Tensor  # [B] its position in the document
    seen: Tensor  # [B] tokens of that document after the call


def _last_run(docs: Documents | None, seen: Tensor, T: int) -> _Run:
    if docs is None:
        return _Run(torch.zeros_like(seen), seen, seen + T)
    if T == 0:
        return _Run(torch.zeros_like(seen), seen, seen.clone())
    last = docs.last_segment()
    mine = docs.segments == last[:, None]
    goes_on = last == docs.first_segment()  # a row of padding alone goes on as well
    first = torch.where(goes_on, seen, 0)
    return _Run(mine.int().argmax(1), first, first + mine.sum(1))


def _check_room(past: Cache, run: _Run) -> None:
    if not isinstance(past, FixedKV):
        return
    slots = past.k.shape[1]
    if torch.compiler.is_compiling():
        torch._assert_async((run.seen <= slots).all(), f"the key/value cache of capacity {slots} is full")
    elif run.seen.numel() and (most := int(run.seen.max())) > slots:
        raise OverflowError(
            f"the key/value cache holds {slots} tokens and would need {most}: pass a larger "
            "`capacity` to init_state, or None to let it grow"
        )


def _store(past: C, run: _Run, k: Tensor, v: Tensor, docs: Documents | None) -> C:
    """The cache after the call."""
    window = isinstance(past, WindowKV)
    slots = past.k.shape[1]
    if isinstance(past, GrowingKV):
        slots = doubled(int(run.seen.max()) if run.seen.numel() else 0)
    if docs is None and window:
        T = k.shape[1]
        joined = (torch.cat([o, n.to(o.dtype)], dim=1) for o, n in ((past.k, k), (past.v, v)))
        # Decode compiles once only if every step's state has the same strides.
        new_k, new_v = (x[:, T:].clone(memory_format=torch.contiguous_format) for x in joined)
        return past._replace(k=new_k, v=new_v, seen=run.seen)
    if docs is None and not torch.is_grad_enabled():
        return _write(past, run, k, v, slots)
    B, C = run.seen.shape[0], past.k.shape[1]
    slot = torch.arange(slots, device=k.device).expand(B, slots)
    position = run.seen[:, None] - slots + slot if window else slot
    before = position - past.seen[:, None] + C if window else position
    new = C + run.start[:, None] + position - run.first[:, None]
    held = (position >= 0) & (position < run.seen[:, None])
    source = torch.where(held, torch.where(position >= run.first[:, None], new, before), 0)
    kept = []
    for o, n in ((past.k, k), (past.v, v)):
        both = torch.cat([o, n.to(o.dtype)], dim=1)
        kept.append(_rows(both, source) * held[:, :, None, None] if both.shape[1] else both)
    return past._replace(k=kept[0], v=kept[1], seen=run.seen)


def _write(past: C, run: _Run, k: Tensor, v: Tensor, slots: int) -> C:
    """Whole rows, no autograd: into the cache's own buffers, in place unless they must change size."""
    B, T = k.shape[:2]
    row = torch.arange(B, device=k.device)[:, None]
    position = run.first[:, None] + torch.arange(T, device=k.device)
    buffers = []
    for old, new in ((past.k, k), (past.v, v)):
        buffer = old
        if slots != old.shape[1]:
            keep = min(slots, old.shape[1])
            buffer = old.new_zeros(B, slots, *old.shape[2:])
            buffer[:, :keep] = old[:, :keep]
        buffer[row, position] = new.to(buffer.dtype)
        buffers.append(buffer)
    return past._replace(k=buffers[0], v=buffers[1], seen=run.seen)


def doubled(count: int) -> int:
    """Slots for so many tokens: the next power of two, 16 at least; a function of the count alone."""
    return max(16, 1 << (count - 1).bit_length()) if count else 0
