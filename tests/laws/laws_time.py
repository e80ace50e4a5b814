"""Laws about time: splitting, documents, padding, causality, and what state may and may not do."""

from __future__ import annotations

import random
from dataclasses import replace

import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from model.core import Block, Ctx, fork, reorder

from .harness import (
    Case,
    Inputs,
    assert_close,
    assert_same_run,
    assert_same_state,
    docs_from,
    gradients,
    law,
    leaves,
    padded_rows,
    piece_docs,
    random_rows,
    run_pieces,
    run_separately,
    run_together,
    shape_of,
    storages,
    weights_like,
)


@law
def split_equals_whole(case: Case) -> None:
    """Any split of T gives the same y and the same final state, with and without documents."""
    block = case.build()

    @settings(max_examples=6, phases=[Phase.generate])
    @given(st.integers(1, case.T), st.lists(st.integers(0, case.T), max_size=4), st.integers(0, 2**16))
    def check(T: int, cuts: list[int], seed: int) -> None:
        cuts = sorted(min(c, T) for c in cuts)
        x = case.input(2, T, seed=seed)
        whole = block(x, block.init_state(2, x, capacity=T + 4))
        assert_close(whole.y, block(x).y, "with an empty state against without")
        y, state = run_pieces(block, x, cuts, block.init_state(2, x, capacity=T + 4))
        assert_close(y, whole.y, f"y of T={T} cut at {cuts}")
        assert_same_state(state, whole.state, f"state of T={T} cut at {cuts}")
        y, _ = run_pieces(block, x, cuts, block.init_state(2, x))
        assert_close(y, whole.y, f"y of T={T} cut at {cuts}, growing capacity")

    check()


@law
def split_inside_documents(case: Case) -> None:
    """A cut that falls inside a document of every row changes nothing."""
    block, T = case.build(), case.T
    rng = random.Random(5)
    for _ in range(4):
        cut = rng.randint(2, T - 2)
        # A cut at a boundary would need a fresh state in that row, so boundaries keep clear of it.
        rows = [[cut - 1, T - cut + 1], [rng.randint(1, cut - 1)]]
        rows[1] += [T - rows[1][0]]
        if rng.random() < 0.5:
            rows[0] = [1, *[n for n in (cut - 2,) if n], T - cut + 1]
        x = case.input(2, T, seed=cut)
        whole = block(x, block.init_state(2, x, capacity=T), Ctx(docs=docs_from(rows)))
        pieces = [piece_docs(rows, 0, cut), piece_docs(rows, cut, T)]
        y, state = run_pieces(block, x, [cut], block.init_state(2, x, capacity=T), pieces)
        assert_close(y, whole.y, f"y of rows {rows} cut at {cut}")
        assert_same_state(state, whole.state, f"state of rows {rows} cut at {cut}")


@law
def steps_equal_whole(case: Case) -> None:
    """Token by token equals one call, outputs and final state."""
    block, T = case.build(), case.T
    x = case.input(2, T)
    whole = block(x, block.init_state(2, x, capacity=T))
    y, state = run_pieces(block, x, list(range(1, T)), block.init_state(2, x, capacity=T))
    assert_close(y, whole.y, "y by steps")
    assert_same_state(state, whole.state, "state by steps")


@law
def packed_equals_separate(case: Case) -> None:
    """Packed rows equal their documents run alone: outputs, final states and every gradient."""
    block = case.build()

    @settings(max_examples=5, phases=[Phase.generate])
    @given(st.integers(2, case.T), st.integers(0, 6), st.integers(0, 2**16))
    def check(T: int, before: int, seed: int) -> None:
        rows = random_rows(random.Random(seed), 2, T)
        inputs = Inputs.of(case, 2, T, before)
        got = run_together(case, block, inputs, rows)
        assert_same_run(got, run_separately(case, block, inputs, rows), block)

    check()


@law
def padding_is_never_read(case: Case) -> None:
    """Left and right padding: content irrelevant, no gradient, equal to rows without it, state kept."""
    block, T = case.build(), case.T
    for seed, before in ((0, 0), (1, 5)):
        rows = padded_rows(random.Random(seed), 3, T)
        pad = ~docs_from(rows).tokens[..., None]
        inputs = Inputs.of(case, 3, T, before)
        got = run_together(case, block, inputs, rows)
        assert_same_run(got, run_separately(case, block, inputs, rows), block)
        assert not (got.grads[1] * pad).any(), "a gradient reaches padding"
        noise = torch.where(pad, 50.0 * case.input(3, T, seed=99), 0.0)
        noisy = Inputs(inputs.before, (inputs.x + noise).detach().requires_grad_(), inputs.more)
        assert_same_run(run_together(case, block, noisy, rows), got, block)


@law
def padding_without_state(case: Case) -> None:
    """In plain training too (no state), padding changes nothing, and what stands in its place is finite."""
    block, T = case.build(), case.T
    rows = padded_rows(random.Random(3), 3, T)
    docs, x = docs_from(rows), case.input(3, T)
    y = block(x, None, Ctx(docs=docs)).y
    assert torch.isfinite(y).all(), "y is not finite at padding"
    for r in range(2):
        real = docs.tokens[r]
        assert_close(y[r : r + 1, real], block(x[r : r + 1, real]).y, f"row {r} of {rows}")


@law
def a_state_belongs_to_its_document(case: Case) -> None:
    """Where `Docs.carried` says whose a state is, another document meets an empty one, from its only token on
    too; a row of padding alone keeps it."""
    block = case.build()
    for T in (1, 4):
        warm, x, more = (case.input(3, n, seed=s) for s, n in ((2, 7), (3, T), (4, 5)))
        docs = replace(docs_from([[T], [T], [-T]]), carried=torch.zeros(3, dtype=torch.int64))
        step = block(x, block(warm, block.init_state(3, x, capacity=T + 12)).state, Ctx(docs=docs))
        follow = block(more, step.state).y
        for r, (before, here) in enumerate(
            [(warm[:1], x[:1]), (warm[:0, :0], x[1:2]), (warm[2:], x[2:, :0])]
        ):
            state = block.init_state(1, x, capacity=T + 12)
            state = block(before, state).state if len(before) else state
            alone = block(here, state)
            assert_close(step.y[r : r + 1, : here.shape[1]], alone.y, f"row {r}, T={T}")
            want = block(more[r : r + 1], alone.state).y
            assert_close(follow[r : r + 1], want, f"what follows row {r}, T={T}")


@law
def no_look_ahead(case: Case) -> None:
    """Perturbing token t leaves earlier outputs as they were, and they have no gradient to it."""
    block, T = case.build(), case.T
    x = case.input(2, T).requires_grad_()
    y = block(x).y
    for t in sorted({1, T // 3, T // 2, T - 1}):
        other = x.detach().clone()
        other[:, t] += 3.0
        assert_close(block(other).y[:, :t], y[:, :t], f"y before t={t}", tol=1e-12)
        (leak,) = gradients((y[:, :t] * weights_like(y[:, :t])).sum(), [x])
        assert not leak[:, t:].any(), f"a gradient flows from before t={t} into its future"


@law
def documents_are_isolated(case: Case) -> None:
    """Perturbing one document leaves every other one equal, and no gradient crosses between them."""
    block, T = case.build(), case.T
    rows = [[T // 3, 1, T - T // 3 - 1], [T // 2, T - T // 2]]
    docs = docs_from(rows)
    x = case.input(2, T)
    y = block(x, None, Ctx(docs=docs)).y
    for i in range(5):
        mine = (docs.segments == i)[..., None]
        other = torch.where(mine, x + 3.0, x).requires_grad_()
        moved = block(other, None, Ctx(docs=docs)).y
        assert_close(torch.where(mine, 0.0, moved), torch.where(mine, 0.0, y), f"outside document {i}", 1e-12)
        assert not torch.equal(moved, y), f"document {i} does not even move itself"
        (leak,) = gradients((moved * weights_like(moved) * mine).sum(), [other])
        assert not (leak * ~mine).any(), f"a gradient leaves document {i}"


@law
def short_inputs(case: Case) -> None:
    """T = 0 returns nothing and keeps the state; T = 1 works, also as packed documents of one token."""
    block = case.build()
    x = case.input(2, 5)
    assert block(x[:, :0]).y.shape == (2, 0, case.dim), "T=0 without a state"
    state = block(x, block.init_state(2, x, capacity=8)).state
    empty = block(x[:, :0], None if state is None else fork(state))
    assert empty.y.shape == (2, 0, case.dim), "T=0 with a state"
    assert_same_state(empty.state, state, "state after T=0")
    fresh = block(x[:, :0], block.init_state(2, x, capacity=8)).state
    assert_same_state(fresh, block.init_state(2, x, capacity=8), "empty state after T=0")
    one = block(x[:, :1]).y
    assert one.shape == (2, 1, case.dim) and torch.isfinite(one).all(), "T=1"
    ones = block(x, None, Ctx(docs=docs_from([[1] * 5, [1] * 5]))).y
    assert_close(ones, torch.cat([block(x[:, t : t + 1]).y for t in range(5)], 1), "documents of one token")


@law
def state_follows_its_rows(case: Case) -> None:
    """Selecting rows of a state (permuted, repeated, dropped) equals selecting rows of the batch."""
    block, T = case.build(), case.T
    x, more = case.input(3, T), case.input(4, 3, seed=2)
    rows = torch.tensor([2, 0, 2, 1])
    state = block(x, block.init_state(3, x, capacity=T + 3)).state
    want = block(more, block(x[rows], block.init_state(4, x, capacity=T + 3)).state)
    got = block(more, None if state is None else reorder(state, rows))
    assert_close(got.y, want.y, "y after reorder")
    assert_same_state(got.state, want.state, "state after reorder")


@law
def rows_are_independent(case: Case) -> None:
    """What stands in one row never changes another."""
    block = case.build()
    x = case.input(3, case.T)
    other = x.clone()
    other[1] += 5.0
    assert_close(block(other).y[[0, 2]], block(x).y[[0, 2]], "the other rows", tol=1e-12)


@law
def state_in_state_out(case: Case) -> None:
    """None in, None out; a State in, a State of the same structure out, batch first, from init on."""
    block = case.build()
    x = case.input(3, case.T)
    assert block(x).state is None, "None in, but a state out"
    start = block.init_state(3, x, capacity=case.T)
    if start is None:
        return
    end = block(x, start).state
    assert shape_of(end) == shape_of(start), "the state changes its structure"
    again = block.init_state(3, x.new_empty(()), capacity=case.T)
    for a, b in zip(leaves(again), leaves(end)):
        assert a.shape[0] == 3, "a leaf without the batch as first dimension"
        assert (a.shape, a.dtype) == (b.shape, b.dtype), "a leaf changes shape or dtype at fixed capacity"


@law
def state_aliases_nothing(case: Case) -> None:
    """A returned state owns its storage: nothing else moves when it is written to."""
    block = case.build()
    for T, capacity in ((case.T, None), (case.T, case.T + 8), (1, None), (1, 16), (0, None)):
        x, warm = case.input(2, T), case.input(2, 3, seed=4)
        start = block.init_state(2, x, capacity=capacity)
        if start is None:
            return
        assert len(storages(start)) == sum(t.numel() > 0 for t in leaves(start)), "init_state shares storage"
        start = block(warm, start).state
        kept = fork(start)
        y, end, _ = block(x, start)
        owned = storages(end)
        assert len(owned) == sum(t.numel() > 0 for t in leaves(end)), "two leaves share a storage"
        alive = storages(x, y, start, list(block.parameters()), list(block.buffers()))
        assert not owned & alive, f"T={T}: the state shares storage with x, y, a parameter or the old state"
        for t in leaves(end):
            size = t.numel() * t.element_size()
            assert t.is_contiguous() and t.untyped_storage().nbytes() == size, f"T={T}: a leaf is a view"
        assert_same_state(start, kept, f"T={T}: the old state after the call", tol=0)


@law
def gradients_cross_the_cut(case: Case) -> None:
    """Gradients flow into and out of states: two calls have the gradients of one."""
    block, T = case.build(), case.T
    x = case.input(2, T).requires_grad_()
    inputs = [x, *block.parameters()]
    w = weights_like(x)
    want = gradients((block(x).y * w).sum(), inputs)
    y, _ = run_pieces(block, x, [T // 2, T - 3], block.init_state(2, x))
    for name, got, ref in zip(["x", *dict(block.named_parameters())], gradients((y * w).sum(), inputs), want):
        assert_close(got, ref, f"gradient of {name} through two cuts")


@law
def the_past_is_read(case: Case) -> None:
    """A block with a state uses it, one without never mixes positions: else the laws above are idle."""
    block, T = case.build(), case.T
    x = case.input(1, T).requires_grad_()
    y = block(x).y
    (g,) = gradients((y[:, -1] * weights_like(y[:, -1])).sum(), [x])
    if block.init_state(1, x) is None:
        assert not g[:, :-1].any(), "no state, yet the last output reads earlier tokens"
    else:
        assert g[:, -2].any(), "a state, yet the last output reads nothing before its own token"


@law
def capacity_is_kept(case: Case) -> None:
    """A fixed capacity gives what a growing one gives, and overflow raises instead of forgetting."""
    block = case.build()
    if not grows(block):
        return
    x = case.input(1, 9)
    exact = block(x, block.init_state(1, x, capacity=9)).y
    assert_close(exact, block(x, block.init_state(1, x)).y, "capacity 9 for 9 tokens")
    try:
        block(x, block.init_state(1, x, capacity=8))
    except (ValueError, RuntimeError, IndexError, OverflowError):
        return
    raise AssertionError("9 tokens went into a state of capacity 8")


def grows(block: Block) -> bool:
    """Whether a state has room per token."""
    return block.cost(64).state_per_token > 0
