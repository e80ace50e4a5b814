"""The contracts of the lab: what goes into a block, what comes out, and what documents are.

Shape legend: B batch  T time  D model width  N documents in the batch.

This module knows no concrete block. Everything else is built from these types.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from model.docs import Docs, count_tokens, positions_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

State = Any  # a pytree (NamedTuple, tuple, dict) of tensors whose first dimension is the batch


__all__ = [
    "NO_AUX", "Aux", "Block", "Bottleneck", "Cost", "Ctx", "Docs", "Entered", "Memory", "State", "Step",
    "at_least_fp32", "count_tokens", "detach", "docs_of", "fork", "merge_aux", "positions_of", "reorder",
    "rotary_positions", "state_bytes", "state_map",
]  # fmt: skip

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


# ----------------------------------------------------------------------------- context


class Memory(NamedTuple):
    """Keys and values of an enclosing `yoco`, and where this call's queries stand among them.

    k [B, S, G, K], v [B, S, G, V]: everything that a query of this call may see, and perhaps more.
    docs, at, key_at: documents and places of queries and keys, as `ops.attention.attend` takes them.
    turn: (cos, sin), each [B or 1, T, 1, K/2], that rotate the queries; None where positions do not count.
    span, lifetime [B, S]: as `attend` takes them.
    """

    k: Tensor
    v: Tensor
    docs: Docs | None = None
    at: Any = None
    key_at: Any = None
    turn: tuple[Tensor, Tensor] | None = None
    span: int | None = None
    lifetime: Tensor | None = None


@dataclass(frozen=True)
class Ctx:
    """What a block may know beyond its input.

    docs:     None means that every row is one unpadded document (the fast path).
    memory:   the one key/value memory of an enclosing `yoco`, else None.
    places:   [B, T] int64, where the tokens stand in their documents for rotary encodings, inside a
              bracket that keeps some of them; None: where `docs` and the state say. Windows, taps and
              masks count kept tokens.
    visit:    of a block that is a bank of several sites' layers, which one this is.
    progress: 0-d fp32 tensor in [0, 1], share of the run that is done; a tensor, so that
              annealing never recompiles.
    """

    docs: Docs | None = None
    memory: Memory | None = None
    progress: Tensor = field(default_factory=lambda: torch.zeros(()))
    places: Tensor | None = None
    visit: int = 0

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


def rotary_positions(ctx: Ctx | None, seen: Tensor | None, B: int, T: int, device: torch.device) -> Tensor:
    """Positions [B, T] by which rotary encodings turn; seen: as for `positions_of`."""
    if ctx is not None and ctx.places is not None:
        return ctx.places
    return positions_of(docs_of(ctx), seen, B, T, device)


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


class Block(nn.Module, ABC):
    """A map [B, T, D] -> [B, T, D] with a state that goes in and comes out.

    Every block builds from `dim` alone; every other parameter is keyword-only with a default.

    State law. None in, None out. A state in (from `init_state` or an earlier call), a state out.
    Gradients flow through both. Any split of T, inside a document too, gives the same y and final
    state. A returned state is freshly laid out, aliases nothing, and is consumed when passed on.

    bare:       the block has its own norms and residuals, so the combinator adds none.
    no_decay:   names of own parameters that take no weight decay besides those of dimension < 2.
    row_groups: {name of an own matrix: equal blocks of its rows that belong together}, like heads.
    """

    bare: bool = False
    no_decay: tuple[str, ...] = ()
    row_groups: Mapping[str, int] = MappingProxyType({})

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def init_state(self, batch: int, like: Tensor, capacity: int | None = None) -> State | None:
        """An empty state for `batch` rows on `like`'s device, in `like`'s dtype where it may be.

        capacity: None grows by doubling; a number is fixed, and overflow raises.
        A stateless block returns None.
        """
        return None

    @abstractmethod
    def forward(self, x: Tensor, state: State | None = None, ctx: Ctx | None = None) -> Step:
        """x [B, T, D] -> y [B, T, D]."""

    def cost(self, T: int) -> Cost:
        """Cost of one visit over T tokens of one document, beyond the Linears'."""
        return Cost()


class Bottleneck(nn.Module, ABC):
    """A bracket that changes width or length: `enter` ... `exit`; siblings never see another T or D.

    It is called with the half's name, `q("enter", x, ...)`, because FSDP2 hooks `__call__` alone.

    dim:   width outside.  code_dim: width inside.
    merge: how many outside positions make one inside, on average (1: the length is kept).
    """

    code_dim: int
    merge: float = 1
    no_decay: tuple[str, ...] = ()

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def init_state(self, batch: int, like: Tensor, capacity: int | None = None) -> State | None:
        """State before the first token of `batch` rows, on the device of `like`; None: it keeps none."""
        return None

    def forward(self, half: str, *args: Any, **kwargs: Any) -> Any:
        if half == "enter":
            return self.enter(*args, **kwargs)
        if half == "exit":
            return self.exit(*args, **kwargs)
        raise ValueError(f"a bottleneck has the halves 'enter' and 'exit', not {half!r}")

    @abstractmethod
    def enter(self, x: Tensor, state: State | None = None, ctx: Ctx | None = None) -> Entered:
        """x [B, T, D] -> the code, and what `exit` needs."""

    @abstractmethod
    def exit(
        self, code: Tensor, saved: Any = None, state: State | None = None, ctx: Ctx | None = None
    ) -> Step:
        """code -> y [B, T, D]; saved: from `enter`."""

    def upkeep(self, ranks: ProcessGroup | None = None) -> None:
        """What it needs after the optimizer's step; called on every rank. Nothing by default.

        ranks: the process group that trains this one model; None: this process alone.
        """

    def cost(self, T: int) -> Cost:
        """Both halves over one row of T outside tokens; linear layers are counted by the caller."""
        return Cost()
