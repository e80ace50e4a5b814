"""The contracts of the lab: what goes into a block, what comes out, and what documents are.

Shape legend: B batch  T time  D model width  N documents in the batch.

This module knows no concrete block. Everything else is built from these types.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

State = Any  # a pytree (NamedTuple, tuple, dict) of tensors whose first dimension is the batch


# ----------------------------------------------------------------------------- results


class Aux(NamedTuple):
    """Named by-products of a forward pass, returned and never collected by side effect.

    losses: 0-d tensors, already weighted, added to the training loss.
    stats:  detached tensors to look at (code counts, gate means); never trained on.
    """

    losses: dict[str, Tensor] = {}
    stats: dict[str, Tensor] = {}

    def under(self, prefix: str) -> Aux:
        """The same values with `prefix/` before every name."""
        if not self.losses and not self.stats:
            return self
        return Aux(
            {f"{prefix}/{k}": v for k, v in self.losses.items()},
            {f"{prefix}/{k}": v for k, v in self.stats.items()},
        )


NO_AUX = Aux()


def merge_aux(parts: Iterable[Aux]) -> Aux:
    """Join by-products. A name that occurs twice has its values added."""
    losses: dict[str, Tensor] = {}
    stats: dict[str, Tensor] = {}
    for part in parts:
        for into, values in ((losses, part.losses), (stats, part.stats)):
            for name, value in values.items():
                into[name] = into[name] + value if name in into else value
    return Aux(losses, stats) if losses or stats else NO_AUX


class Step(NamedTuple):
    """What a block returns: y [B, T, D], its state after the last token, and by-products."""

    y: Tensor
    state: State | None = None
    aux: Aux = NO_AUX


class Entered(NamedTuple):
    """What `Bottleneck.enter` returns.

    code:  [B, T', C], what lies inside the bracket; T' and C are the bottleneck's own.
    ctx:   the context that the inside sees (its documents have length T').
    saved: whatever `exit` needs from `enter` (boundaries, residual), or None.
    """

    code: Tensor
    ctx: Ctx | None = None
    saved: Any = None
    state: State | None = None
    aux: Aux = NO_AUX


# ----------------------------------------------------------------------------- documents


@dataclass(frozen=True)
class Docs:
    """Where documents lie in a batch: one truth, several views of it.

    positions:  [B, T] int64, place of a token within its document, from 0.
    segments:   [B, T] int64, number of the document, counted over the whole batch and never
                decreasing along a row; -1 is padding: never read, never supervised.
    cu_seqlens: [N+1] int32, document ends over the flattened B*T, padding runs included as runs of
                their own; starts at 0, strictly increasing, ends at B*T; every row start is in it.
    max_len:    length of the longest document (padding runs not counted).
    padded:     whether any segment is -1.
    carried:    [B] int64, the document that a state belongs to that comes with a call; None: the first
                of each row. An id that is not in the row (a shortened document may have no position
                left in this call): every document starts anew.

    The carried document's positions go on from the state's own count; every other one starts anew.
    """

    positions: Tensor
    segments: Tensor
    cu_seqlens: Tensor
    max_len: int
    padded: bool = False
    carried: Tensor | None = None

    @staticmethod
    def packed(cu_seqlens: Tensor | Sequence[int], rows: int = 1) -> Docs:
        """Documents from their boundaries over `rows` rows of equal length.

        cu_seqlens: int [N+1], starts at 0 and ends at rows*T; repeated values (empty documents) are
        dropped, row starts are added.
        Raises ValueError when it does not start at 0, decreases, or does not divide into rows.
        """
        cu = torch.as_tensor(cu_seqlens)
        if cu.dim() != 1 or cu.numel() < 1 or (cu.numel() and int(cu[0]) != 0) or bool((cu.diff() < 0).any()):
            raise ValueError(f"cu_seqlens must start at 0 and never decrease, got {cu.tolist()}")
        total = int(cu[-1])
        if rows < 1 or total % rows:
            raise ValueError(f"cu_seqlens ends at {total}, which does not divide into {rows} rows")
        T = total // rows
        starts = torch.arange(rows, device=cu.device, dtype=torch.int64) * T
        bounds = torch.unique(
            torch.cat([cu.to(torch.int64), starts, cu.new_tensor([total], dtype=torch.int64)])
        )
        lengths = bounds.diff()
        n = lengths.numel()
        segments = torch.repeat_interleave(torch.arange(n, device=cu.device), lengths, output_size=total)
        positions = torch.arange(total, device=cu.device) - bounds[:-1][segments] if total else segments
        longest = int(lengths.max()) if n else 0
        return Docs(positions.view(rows, T), segments.view(rows, T), bounds.to(torch.int32), longest)

    @staticmethod
    def from_mask(mask: Tensor) -> Docs:
        """One document a row, padded: mask [B, T], nonzero where there is a token.

        The tokens of a row must be one unbroken run (left or right padding, or both).
        Raises ValueError otherwise.
        """
        keep = mask.to(torch.bool)
        B, T = keep.shape
        if T and bool(((keep[:, 1:] & ~keep[:, :-1]).sum(1) + keep[:, 0] > 1).any()):
            raise ValueError("a row's mask must be one unbroken run of tokens (left and right padding only)")
        rows = torch.arange(B, device=mask.device)[:, None].expand(B, T)
        segments = torch.where(keep, rows, -1)
        positions = (keep.long().cumsum(1) - 1).clamp_min(0) * keep
        return Docs.from_segments(segments, positions)

    @staticmethod
    def from_segments(segments: Tensor, positions: Tensor) -> Docs:
        """From the two [B, T] views alone (segment -1 is padding)."""
        B, T = segments.shape
        new = torch.ones_like(segments, dtype=torch.bool)
        if T:
            new[:, 1:] = segments[:, 1:] != segments[:, :-1]
        starts = new.flatten().nonzero().flatten()
        cu = torch.cat([starts, starts.new_tensor([B * T])]) if T else starts.new_zeros(1)
        real = segments.flatten()[starts] >= 0
        lengths = cu.diff()[real] if T else cu[:0]
        longest = int(lengths.max()) if lengths.numel() else 0
        return Docs(positions, segments, cu.to(torch.int32), longest, padded=bool((segments < 0).any()))

    @staticmethod
    def whole(batch: int, time: int, device: torch.device | str | None = None) -> Docs:
        """Every row one document: what `ctx=None` means, spelled out."""
        seg = torch.arange(batch, device=device)[:, None].expand(batch, time)
        pos = torch.arange(time, device=device).expand(batch, time)
        cu = torch.arange(batch + 1 if time else 1, device=device, dtype=torch.int32) * time
        return Docs(pos, seg, cu, time)

    @property
    def tokens(self) -> Tensor:
        """[B, T] bool: not padding."""
        return self.segments >= 0

    def first_segment(self) -> Tensor:
        """[B] segment id of the document that a passed-in state belongs to; -2 if there is none."""
        return self._edge(first=True) if self.carried is None else self.carried

    def last_segment(self) -> Tensor:
        """[B] segment id of each row's last document (what the final state belongs to); -2 if none."""
        return self._edge(first=False)

    def _edge(self, first: bool) -> Tensor:
        B, T = self.segments.shape
        if T == 0:
            return self.segments.new_full((B,), -2)
        if not self.padded:
            return self.segments[:, 0 if first else -1]
        ids = self.segments if first else self.segments.flip(1)
        found = ids.gather(1, (ids >= 0).int().argmax(1, keepdim=True))[:, 0]
        return torch.where(found < 0, -2, found)

    def to(self, device: torch.device | str) -> Docs:
        return replace(
            self,
            positions=self.positions.to(device),
            segments=self.segments.to(device),
            cu_seqlens=self.cu_seqlens.to(device),
            carried=None if self.carried is None else self.carried.to(device),
        )


@dataclass(frozen=True)
class Ctx:
    """What a block may know beyond its input.

    docs:     None means that every row is one unpadded document (the fast path).
    memory:   the one KV memory of an enclosing `yoco` or `recall`, else None.
    progress: 0-d fp32 tensor in [0, 1], share of the run that is done; a tensor, so that
              annealing never recompiles.
    """

    docs: Docs | None = None
    memory: Any = None
    progress: Tensor = field(default_factory=lambda: torch.zeros(()))

    @staticmethod
    def packed(cu_seqlens: Tensor | Sequence[int], rows: int = 1, **rest: Any) -> Ctx:
        """A context for packed documents; see `Docs.packed`."""
        return Ctx(docs=Docs.packed(cu_seqlens, rows), **rest)

    @staticmethod
    def masked(mask: Tensor, **rest: Any) -> Ctx:
        """A context for padded rows; see `Docs.from_mask`."""
        return Ctx(docs=Docs.from_mask(mask), **rest)


def docs_of(ctx: Ctx | None) -> Docs | None:
    """The documents of a context; None stands for whole rows."""
    return None if ctx is None else ctx.docs


def positions_of(docs: Docs | None, seen: Tensor | None, B: int, T: int, device: torch.device) -> Tensor:
    """Positions [B, T] int64 in each document, going on from a state.

    seen: [B] int64 tokens that the row's first document has already had, or None.
    """
    if docs is None:
        base = torch.arange(T, device=device).expand(B, T)
        return base if seen is None else base + seen[:, None]
    if seen is None:
        return docs.positions
    going_on = docs.segments == docs.first_segment()[:, None]
    return docs.positions + seen[:, None] * going_on


def count_tokens(docs: Docs | None, seen: Tensor | None, B: int, T: int, device: torch.device) -> Tensor:
    """[B] int64: tokens that each row's last document has had after this call (the next position)."""
    if docs is None:
        base = torch.full((B,), T, device=device, dtype=torch.int64)
        return base if seen is None else base + seen
    last = docs.last_segment()[:, None]
    n = (docs.segments == last).sum(1) if T else torch.zeros(B, device=device, dtype=torch.int64)
    if seen is None:
        return n
    return n + seen * ((last == docs.first_segment()[:, None]) | (last == -2))[:, 0]


# ----------------------------------------------------------------------------- state


def state_map(fn: Callable[[Tensor], Tensor], state: State) -> State:
    """Apply `fn` to every tensor of a state; structure and types are kept."""
    return torch.utils._pytree.tree_map_only(torch.Tensor, fn, state)


def fork(state: State) -> State:
    """A copy to keep: a state is consumed when passed to `forward`."""
    return state_map(torch.clone, state)


def detach(state: State) -> State:
    """The same values with no history: the cut of truncated back-propagation through time."""
    return state_map(torch.Tensor.detach, state)


def reorder(state: State, rows: Tensor) -> State:
    """Select batch rows (int [B']): beam search, dropping finished rows, repeating a prefix."""
    return state_map(lambda t: t.index_select(0, rows), state)


def state_bytes(state: State) -> int:
    """Bytes of all tensors of a state."""
    leaves = torch.utils._pytree.tree_leaves(state)
    return sum(t.numel() * t.element_size() for t in leaves if isinstance(t, Tensor))


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a recurrent state for inputs of `dtype`: fp32, or fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# ----------------------------------------------------------------------------- cost


@dataclass(frozen=True)
class Cost:
    """What one visit costs beyond its Linear layers' weight matmuls, which are counted from the modules.

    flops:           forward floating-point operations (a multiply-add is 2) of one row of T tokens.
    state_fixed:     state bytes per row that do not depend on T (at the model's compute dtype).
    state_per_token: state bytes per row and token.
    """

    flops: float = 0.0
    state_fixed: float = 0.0
    state_per_token: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.flops + other.flops,
            self.state_fixed + other.state_fixed,
            self.state_per_token + other.state_per_token,
        )


# ----------------------------------------------------------------------------- modules


class Block(nn.Module):
    """A map [B, T, D] -> [B, T, D] with a state that goes in and comes out.

    Every block builds from `dim` alone; every other parameter is keyword-only with a default.

    State law. None in, None out. A state in (from `init_state` or an earlier call), a state out.
    Gradients flow through both. Any split of T, inside a document too, gives the same y and final
    state. A returned state is freshly laid out, aliases nothing, and is consumed when passed on.

    bare:     the block has its own norms and residuals, so the combinator adds none.
    no_decay: names of own parameters that take no weight decay besides those of dimension < 2.
    """

    bare: bool = False
    no_decay: tuple[str, ...] = ()

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def init_state(self, batch: int, like: Tensor, capacity: int | None = None) -> State | None:
        """An empty state for `batch` rows on `like`'s device, in `like`'s dtype where it may be.

        capacity: None grows by doubling; a number is fixed, and overflow raises.
        A stateless block returns None.
        """
        return None

    def forward(self, x: Tensor, state: State | None = None, ctx: Ctx | None = None) -> Step:
        raise NotImplementedError(f"{type(self).__name__}.forward")

    def cost(self, T: int) -> Cost:
        """Cost of one visit over T tokens of one document, beyond the Linears'."""
        return Cost()


class Bottleneck(nn.Module):
    """A bracket that changes width or length: `enter` ... `exit`; siblings never see another T or D.

    It is called with the half's name, `q("enter", x, ...)`, because FSDP2 hooks `__call__` alone.

    dim:   width outside.  code_dim: width inside.
    merge: how many outside positions make one inside (1: the length is kept).
    """

    code_dim: int
    merge: int = 1
    no_decay: tuple[str, ...] = ()

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def init_state(self, batch: int, like: Tensor, capacity: int | None = None) -> State | None:
        return None

    def forward(self, half: str, *args: Any, **kwargs: Any) -> Any:
        if half == "enter":
            return self.enter(*args, **kwargs)
        if half == "exit":
            return self.exit(*args, **kwargs)
        raise ValueError(f"a bottleneck has the halves 'enter' and 'exit', not {half!r}")

    def enter(self, x: Tensor, state: State | None = None, ctx: Ctx | None = None) -> Entered:
        raise NotImplementedError(f"{type(self).__name__}.enter")

    def exit(
        self, code: Tensor, saved: Any = None, state: State | None = None, ctx: Ctx | None = None
    ) -> Step:
        raise NotImplementedError(f"{type(self).__name__}.exit")

    def cost(self, T: int) -> Cost:
        return Cost()
