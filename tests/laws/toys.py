"""Two honest toy blocks and their broken variants: proof that every law can fail.

`toy` is a decaying sum with positions, `toy_cache` the running mean over all tokens of a document with a
cache that grows. A broken variant `toy@bug` has exactly one defect. They loop over rows and tokens: slow,
plain, and easy to believe.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.core import Block, Cost, Ctx, Docs, Step, at_least_fp32, docs_of


class DecayState(NamedTuple):
    h: Tensor  # [B, D]
    seen: Tensor  # [B] int64


class Decay(Block):
    """h_t = a h_{t-1} + W x_t;  y_t = V h_t + 0.1 sin(position). State: h and the tokens seen."""

    bug = ""

    def __init__(self, dim: int, *, gain: float = 1.0, backend: str = "auto") -> None:
        super().__init__(dim)
        self.gain = gain
        self.decay = nn.Parameter(torch.tensor([-0.3]))
        self.read, self.write = nn.Linear(dim, dim), nn.Linear(dim, dim)
        if self.bug == "dead parameter":
            self.unused = nn.Parameter(torch.ones(3))
        if self.bug == "no_decay typo":
            self.no_decay = ("deacy",)
        if self.bug == "hidden weight":
            self._secret = torch.randn(dim)
        if self.bug == "backend":
            self.gain *= 1.0 if backend == "auto" else 1.001

    def init_state(self, batch: int, like: Tensor, capacity: int | None = None) -> DecayState:
        dtype = at_least_fp32(like.dtype)
        h = torch.zeros(batch, self.dim, dtype=dtype, device=like.device)
        return DecayState(h, torch.zeros(batch, dtype=torch.int64, device=like.device))

    def forward(self, x: Tensor, state: DecayState | None = None, ctx: Ctx | None = None) -> Step:
        B, T, _ = x.shape
        docs = docs_of(ctx) or Docs.whole(B, T)
        start = self.init_state(B, x) if state is None else state
        u = self.gain * self.read(x).to(start.h.dtype)
        a = self.decay.to(u.dtype).exp()
        if self.bug == "detached input":
            u = u.detach() if not self.read.bias.requires_grad else u
        hs, seen, out = list(start.h), list(start.seen), []
        if self.bug == "cut gradient":
            hs = [h.detach() for h in hs]
        for b in range(B):
            out.append(self.row(u, a, hs, seen, docs, b))
        h = torch.stack(out) if T else u
        if self.bug == "future":
            h = h + 0.01 * h.mean(1, keepdim=True)
        if self.bug == "other rows":
            h = h + 0.01 * h.mean(0, keepdim=True)
        y = self.write(h.to(x.dtype)).to(x.dtype)
        pos = self.positions(docs, start.seen)
        y = y + 0.1 * torch.sin(pos.to(x.dtype))[..., None]
        return Step(self.spoil(y, x, ctx), self.end(state, hs, seen, x))

    def row(self, u: Tensor, a: Tensor, hs: list[Tensor], seen: list[Tensor], docs: Docs, b: int) -> Tensor:
        """Run row b; hs[b] and seen[b] become its final state."""
        rows, last = [], int(docs.first_segment()[b])
        if self.bug == "anybody's state" and u.shape[1]:
            last = int(docs.segments[b, 0])
        for t in range(u.shape[1]):
            doc = int(docs.segments[b, t])
            if doc < 0 and self.bug != "reads padding":
                rows.append(torch.zeros_like(u[b, t]))
                continue
            if doc != last and self.bug != "document leak":
                hs[b], seen[b] = torch.zeros_like(hs[b]), torch.zeros_like(seen[b])
            last = doc
            hs[b] = a * hs[b] + u[b, t]
            seen[b] = seen[b] + 1
            rows.append(hs[b] if self.bug != "forgets" else u[b, t])
        return torch.stack(rows) if rows else u[b]

    def positions(self, docs: Docs, seen: Tensor) -> Tensor:
        if self.bug == "positions restart":
            return docs.positions
        return docs.positions + seen[:, None] * (docs.segments == docs.first_segment()[:, None])

    def spoil(self, y: Tensor, x: Tensor, ctx: Ctx | None) -> Tensor:
        """The defects of an output."""
        if self.bug == "packed gain" and ctx is not None:
            return y * 1.001
        if self.bug == "nan at padding" and ctx is not None and ctx.docs is not None:
            return y.masked_fill(~ctx.docs.tokens[..., None], float("nan"))
        if self.bug == "returns fp32":
            return y.float() if y.dtype == torch.bfloat16 else y
        if self.bug == "dropout":
            return nn.functional.dropout(y, 0.1, self.training)
        if self.bug == "wrong gradient":
            return y + 0.1 * (x.detach() ** 2)
        if self.bug == "overflow":
            return y + 0.0 * torch.exp(x)
        if self.bug == "single token":
            return y * 1.001 if x.shape[1] == 1 else y
        if self.bug == "hidden weight":
            return y + self._secret.to(y.dtype)
        if self.bug == "peeks":
            return y + 0.01 * torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)
        return y

    def end(
        self, state: DecayState | None, hs: list[Tensor], seen: list[Tensor], x: Tensor
    ) -> DecayState | None:
        if state is None:
            return self.init_state(x.shape[0], x) if self.bug == "unasked state" else None
        if self.bug == "alias":
            state.h.data.copy_(torch.stack(hs).detach())
            return DecayState(state.h, torch.stack(seen))
        if self.bug == "view":
            return DecayState(torch.stack([*hs, *hs])[: len(hs)], torch.stack(seen))
        if self.bug == "mixes rows":
            return DecayState(torch.stack(hs).flip(0) if len(hs) == 3 else torch.stack(hs), torch.stack(seen))
        if self.bug == "empty resets" and x.shape[1] == 0:
            return self.init_state(x.shape[0], x)
        return DecayState(torch.stack(hs), torch.stack(seen))

    def cost(self, T: int) -> Cost:
        extra = 2.0 * self.dim if self.bug == "flops" else 0.0
        return Cost(flops=extra, state_fixed=4 * self.dim + (0 if self.bug == "bytes" else 8))


class Stateless(Decay):
    """A decaying sum that denies having a state."""

    def init_state(self, batch: int, like: Tensor, capacity: int | None = None):  # type: ignore[override]
        return None

    def forward(self, x: Tensor, state: DecayState | None = None, ctx: Ctx | None = None) -> Step:
        empty = super().init_state(x.shape[0], x)
        return Step(super().forward(x, empty, ctx).y)


class CacheState(NamedTuple):
    rows: Tensor  # [B, capacity, D]
    seen: Tensor  # [B] int64
    fixed: Tensor  # [B] bool: the capacity does not grow


class Cache(Block):
    """y_t = V mean of the document's x up to t. State: all of the document's tokens."""

    bug = ""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.write = nn.Linear(dim, dim)

    def init_state(self, batch: int, like: Tensor, capacity: int | None = None) -> CacheState:
        rows = like.new_zeros(batch, capacity or 0, self.dim)
        fixed = torch.full((batch,), capacity is not None, device=like.device)
        return CacheState(rows, torch.zeros(batch, dtype=torch.int64, device=like.device), fixed)

    def forward(self, x: Tensor, state: CacheState | None = None, ctx: Ctx | None = None) -> Step:
        B, T, _ = x.shape
        docs = docs_of(ctx) or Docs.whole(B, T)
        start = self.init_state(B, x) if state is None else state
        means, kept = [], []
        for b in range(B):
            tokens, last, out = list(start.rows[b, : int(start.seen[b])]), int(docs.first_segment()[b]), []
            for t in range(T):
                doc = int(docs.segments[b, t])
                if doc >= 0:
                    tokens = tokens if doc == last else []
                    tokens.append(x[b, t])
                    last = doc
                out.append(torch.stack(tokens).mean(0) if doc >= 0 else torch.zeros_like(x[b, t]))
            means.append(torch.stack(out) if out else x[b])
            kept.append(tokens)
        y = self.write(torch.stack(means)).to(x.dtype)
        return Step(y, None if state is None else self.end(start, kept, x))

    def end(self, start: CacheState, kept: list[list[Tensor]], x: Tensor) -> CacheState:
        longest = max(map(len, kept))
        capacity = start.rows.shape[1]
        if longest > capacity and bool(start.fixed[0]):
            if self.bug != "forgets on overflow":
                raise ValueError(f"{longest} tokens, capacity {capacity}")
            kept, longest = [tokens[-capacity:] for tokens in kept], capacity
        capacity = max(capacity, longest)
        empty = x.new_zeros(self.dim)
        rows = [torch.stack([*k, *[empty] * (capacity - len(k))]) if capacity else x[0, :0] for k in kept]
        seen = torch.tensor([len(k) for k in kept])
        return CacheState(torch.stack(rows), seen, start.fixed.clone())

    def cost(self, T: int) -> Cost:
        return Cost(state_fixed=8 + 1, state_per_token=4 * self.dim)


# law -> (toy, bug): the defect that this law must find.
BREAKS: dict[str, tuple[type[Block], str]] = {
    "split_equals_whole": (Decay, "positions restart"),
    "split_inside_documents": (Decay, "positions restart"),
    "steps_equal_whole": (Decay, "single token"),
    "packed_equals_separate": (Decay, "document leak"),
    "padding_is_never_read": (Decay, "reads padding"),
    "padding_without_state": (Decay, "nan at padding"),
    "a_state_belongs_to_its_document": (Decay, "anybody's state"),
    "no_look_ahead": (Decay, "future"),
    "documents_are_isolated": (Decay, "document leak"),
    "short_inputs": (Decay, "empty resets"),
    "state_follows_its_rows": (Decay, "mixes rows"),
    "rows_are_independent": (Decay, "other rows"),
    "state_in_state_out": (Decay, "unasked state"),
    "state_aliases_nothing": (Decay, "alias"),
    "gradients_cross_the_cut": (Decay, "cut gradient"),
    "the_past_is_read": (Decay, "forgets"),
    "capacity_is_kept": (Cache, "forgets on overflow"),
    "gradcheck_with_initial_state": (Decay, "wrong gradient"),
    "frozen_stays_frozen": (Decay, "detached input"),
    "every_parameter_learns": (Decay, "dead parameter"),
    "bf16_stays_close": (Decay, "returns fp32"),
    "fp32_stays_exact": (Decay, "overflow"),
    "training_equals_eval": (Decay, "dropout"),
    "flops_equal_the_counter": (Decay, "flops"),
    "state_bytes_are_true": (Decay, "bytes"),
    "state_dict_round_trip": (Decay, "hidden weight"),
    "builds_from_dim_alone": (Decay, "no_decay typo"),
    "backends_agree": (Decay, "backend"),
}
# Further defects, each with the law that must find it.
MORE_BREAKS: list[tuple[str, type[Block], str]] = [
    ("packed_equals_separate", Decay, "packed gain"),
    ("gradcheck_with_initial_state", Decay, "cut gradient"),
    ("state_aliases_nothing", Decay, "view"),
    ("split_equals_whole", Decay, "peeks"),
    ("the_past_is_read", Stateless, ""),
    ("split_equals_whole", Stateless, ""),
]
