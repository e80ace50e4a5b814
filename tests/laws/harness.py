"""What the laws are built from: cases, random layouts of documents, and comparisons of trees of tensors.

Shape legend: B batch  T time  D model width.
A law is a function of one Case that raises AssertionError when the block breaks it; `@law` registers it.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only, tree_structure

from model.core import Block, Ctx, Docs, State
from model.registry import BLOCKS, make_block

LAWS: dict[str, Callable[[Case], None]] = {}
TOL = 1e-9  # fp64, relative to the largest value


def law(fn: Callable[[Case], None]) -> Callable[[Case], None]:
    """Register a law under its function's name."""
    LAWS[fn.__name__] = fn
    return fn


@dataclass(frozen=True)
class Case:
    """One block to judge: its name, width and parameters, and a time longer than its window or chunk.

    around: makes a block of it that the laws can judge, for one that cannot stand alone (`xattn`).
    """

    name: str
    dim: int = 32
    params: dict[str, Any] = field(default_factory=dict)
    T: int = 21
    around: Callable[[Block], Block] | None = None

    def __str__(self) -> str:
        return self.name + "".join(f"-{k}={v}" for k, v in self.params.items())

    def build(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> Block:
        """The block in eval mode, its parameters shaken, so that no zero initialization hides a path."""
        torch.manual_seed(seed)
        made = make_block(self.name, dim=self.dim, **self.params)
        made = self.around(made) if self.around else made
        with torch.no_grad():
            for p in made.parameters():
                spread = p.shape[-1] ** -0.5 if p.dim() > 1 and not p.any() else 0.05
                p.add_(torch.randn_like(p) * spread)
        return made.to(dtype).eval()

    def input(self, B: int, T: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
        return torch.randn(B, T, self.dim, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def registered_cases(table: dict[str, list[dict[str, Any]]]) -> list[Case]:
    """Cases of every registered block; one without an entry in the table is judged with its defaults."""
    return [Case(name, **entry) for name in BLOCKS.names() for entry in table.get(name, [{}])]


# ----------------------------------------------------------------------------- comparisons


def assert_close(got: Tensor, want: Tensor, what: str, tol: float = TOL) -> None:
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, want {tuple(want.shape)}"
    assert got.dtype == want.dtype, f"{what}: dtype {got.dtype}, want {want.dtype}"
    if not want.numel():
        return
    if not want.is_floating_point():
        assert torch.equal(got, want), f"{what}: got {got.tolist()}, want {want.tolist()}"
        return
    off = (got - want).abs().max().item()
    scale = 1 + want.abs().max().item()
    assert off <= tol * scale, f"{what}: off by {off:.3e} at scale {scale:.3g} (allowed {tol:g})"


def leaves(*trees: Any) -> list[Tensor]:
    """The tensors of trees; a stateless part of a composite block stands as None."""
    return [t for t in tree_leaves(trees) if isinstance(t, Tensor)]


def shape_of(state: State) -> Any:
    """The structure of a state, with None told from a tensor."""
    return tree_structure(state), [type(t) for t in tree_leaves(state)]


def assert_same_state(got: State, want: State, what: str, tol: float = TOL) -> None:
    assert shape_of(got) == shape_of(want), f"{what}: another structure"
    for i, (g, w) in enumerate(zip(leaves(got), leaves(want))):
        assert_close(g, w, f"{what}, leaf {i}", tol)


def gradients(loss: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    """d loss / d input, zeros where there is no path."""
    found = torch.autograd.grad(loss, inputs, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(i) if g is None else g for i, g in zip(inputs, found)]


def weights_like(y: Tensor, seed: int = 7) -> Tensor:
    """Fixed random weights that turn an output into a scalar no symmetry can hide in."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(y.shape, dtype=torch.float64, generator=generator).to(y.dtype)


def storages(*trees: Any) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in leaves(*trees) if t.numel()}


# ----------------------------------------------------------------------------- documents

Row = list[int]  # lengths of the runs of a row in order; a negative length is padding


def docs_from(rows: list[Row]) -> Docs:
    """Docs of rows made of documents and padding runs; all rows must be equally long."""
    segments, positions, n = [], [], 0
    for row in rows:
        seg: list[int] = []
        pos: list[int] = []
        for length in row:
            seg += [n if length > 0 else -1] * abs(length)
            pos += list(range(length)) if length > 0 else [0] * -length
            n += length > 0
        segments.append(seg)
        positions.append(pos)
    assert len({len(s) for s in segments}) == 1
    return Docs.from_segments(torch.tensor(segments), torch.tensor(positions))


def random_rows(rng: random.Random, B: int, T: int) -> list[Row]:
    """B rows of T tokens, cut into one to four documents, some of length one."""
    rows = []
    for _ in range(B):
        cuts = sorted(rng.sample(range(1, T), min(T - 1, rng.randint(0, 3))))
        if T > 3 and rng.random() < 0.5:
            cuts = sorted({*cuts, 1})
        rows.append([b - a for a, b in zip([0, *cuts], [*cuts, T])])
    return rows


def padded_rows(rng: random.Random, B: int, T: int) -> list[Row]:
    """B rows of T tokens, one document each with padding left, right or both; the last is all padding."""
    rows = []
    for b in range(B - 1):
        left = rng.randint(0, T // 2) if b % 2 == 0 else 0
        right = rng.randint(1, T // 3) if b != 0 else 0
        rows.append([n for n in (-left, T - left - right, -right) if n])
    return [*rows, [-T]]


def piece_docs(rows: list[Row], start: int, stop: int) -> Docs:
    """Docs of columns start..stop: the positions of a piece count from 0 in the piece."""
    pieces = []
    for row in rows:
        at, piece = 0, []
        for length in row:
            a, b = max(at, start), min(at + abs(length), stop)
            if b > a:
                piece.append((b - a) if length > 0 else (a - b))
            at += abs(length)
        pieces.append(piece)
    return docs_from(pieces)


# ----------------------------------------------------------------------------- running


def run_pieces(
    block: Block, x: Tensor, cuts: Sequence[int], state: State, docs: list[Docs | None] | None = None
):
    """Feed x [B, T, D] in pieces between `cuts`, the state carried; y [B, T, D] and the final state."""
    bounds = [0, *cuts, x.shape[1]]
    ys = []
    for i, (a, b) in enumerate(itertools.pairwise(bounds)):
        ctx = None if docs is None else Ctx(docs=docs[i])
        step = block(x[:, a:b], state, ctx)
        ys.append(step.y)
        state = step.state
    return torch.cat(ys, 1), state


@dataclass
class Run:
    """What a law compares: outputs, the final state, what follows from it, and all gradients."""

    y: Tensor
    state: State
    y_more: Tensor
    grads: list[Tensor]


@dataclass
class Inputs:
    """Leaves that gradients are taken to: x after a carried prefix, and tokens that follow."""

    before: Tensor
    x: Tensor
    more: Tensor

    @staticmethod
    def of(case: Case, B: int, T: int, before: int) -> Inputs:
        parts = [case.input(B, n, seed=s) for s, n in enumerate((before, T, 4), start=11)]
        return Inputs(*[p.requires_grad_() for p in parts])

    def leaves(self, block: nn.Module) -> list[Tensor]:
        return [self.before, self.x, self.more, *block.parameters()]


def run_together(case: Case, block: Block, inputs: Inputs, rows: list[Row]) -> Run:
    """All rows in one call, documents told by ctx."""
    B, T, _ = inputs.x.shape
    docs = docs_from(rows)
    state = block(inputs.before, block.init_state(B, inputs.x, capacity=T + 16)).state
    step = block(inputs.x, state, Ctx(docs=docs))
    follow = block(inputs.more, step.state)
    y = torch.where(docs.tokens[..., None], step.y, 0.0)
    loss = (y * weights_like(y)).sum() + (follow.y * weights_like(follow.y)).sum()
    return Run(y, step.state, follow.y, gradients(loss, inputs.leaves(block)))


def run_separately(case: Case, block: Block, inputs: Inputs, rows: list[Row]) -> Run:
    """Every document alone, one row a call; the reference for `run_together`."""
    T = inputs.x.shape[1]
    ys, follows, states = [], [], []
    for r, row in enumerate(rows):
        state = block(inputs.before[r : r + 1], block.init_state(1, inputs.x, capacity=T + 16)).state
        at, fresh, parts = 0, False, []
        for length in row:
            piece = inputs.x[r : r + 1, at : at + abs(length)]
            at += abs(length)
            if length < 0:
                parts.append(torch.zeros_like(piece))
                continue
            if fresh:
                state = block.init_state(1, inputs.x, capacity=T + 16)
            step = block(piece, state)
            parts.append(step.y)
            state, fresh = step.state, True
        ys.append(torch.cat(parts, 1))
        states.append(state)
        follows.append(block(inputs.more[r : r + 1], state).y)
    y, y_more = torch.cat(ys), torch.cat(follows)
    loss = (y * weights_like(y)).sum() + (y_more * weights_like(y_more)).sum()
    return Run(y, cat_states(states), y_more, gradients(loss, inputs.leaves(block)))


def cat_states(states: list[State]) -> State:
    rows = [iter(leaves(s)) for s in states]
    return tree_map_only(Tensor, lambda _: torch.cat([next(r) for r in rows]), states[0])


def assert_same_run(got: Run, want: Run, block: nn.Module) -> None:
    assert_close(got.y, want.y, "y")
    assert_close(got.y_more, want.y_more, "y of the tokens that follow")
    names = ["prefix", "x", "following tokens", *dict(block.named_parameters())]
    for name, g, w in zip(names, got.grads, want.grads):
        assert_close(g, w, f"gradient of {name}")
    # A block may keep what no later call can see; `comparable` takes it out.
    comparable = getattr(block, "comparable", lambda state: state)
    assert_same_state(comparable(got.state), comparable(want.state), "final state")
