"""Brackets that shorten: mixture of depths, patches, dynamic chunks. All block laws, then each one's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import model
from model.core import Block, Cost, Ctx, Docs, Step, merge_aux, state_map
from model.quant.base import upkeep
from model.registry import BLOCKS, make_block, make_wrap
from model.schema import ConfigError
from tests.laws import laws_time, laws_training  # noqa: F401 - they register the laws
from tests.laws.harness import LAWS, Case

# ----------------------------------------------------------------------------- every law


class Wrapped(Block):
    """exit(inner(enter(x))): a wrap around one block, as a block."""

    by, params, inner = "mod", {}, ("swa", {"head_dim": 8, "window": 3})  # type: ignore[var-annotated]
    wider = 1

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.bracket = make_wrap(self.by, dim, **self.params, width=self.wider * dim)
        name, params = self.inner
        self.body = make_block(name, self.bracket.code_dim, **params)

    def init_state(self, batch: int, like: Tensor, capacity: int | None = None):
        return tuple(part.init_state(batch, like, capacity) for part in (self.bracket, self.body))

    def forward(self, x: Tensor, state=None, ctx: Ctx | None = None) -> Step:
        outer, inner = (None, None) if state is None else state
        entered = self.bracket("enter", x, outer, ctx)
        step = self.body(entered.code, inner, entered.ctx)
        left = self.bracket("exit", entered.code + step.y, entered.saved, entered.state, ctx)
        aux = merge_aux([entered.aux, step.aux, left.aux])
        return Step(left.y, None if state is None else (left.state, step.state), aux)

    def comparable(self, state):
        """A document that has kept nothing leaves the inside's state as it was; ctx hides it."""
        outer = state[0]
        if self.by == "patch":
            own = outer.seen >= self.bracket.merge
        else:
            own = (outer if self.by == "mod" else outer.counts).kept > 0
        return outer, state_map(lambda t: t * own.view(-1, *[1] * (t.dim() - 1)), state[1])

    def cost(self, T: int) -> Cost:
        G = int(T // self.bracket.merge)
        linears = sum(2.0 * m.weight.numel() for m in self.body.modules() if isinstance(m, nn.Linear))
        inner = self.body.cost(G)
        return self.bracket.cost(T) + Cost(
            inner.flops + linears * (G - T), inner.state_fixed, inner.state_per_token / self.bracket.merge
        )


ROPE = ("attention", {"head_dim": 8})
CASES: list[dict[str, Any]] = [
    {"by": "mod", "params": {"keep": 0.5}},
    {"by": "mod", "params": {"keep": 0.3, "gate": "straight"}, "inner": ROPE},
    {"by": "mod", "params": {"keep": 0.5}, "inner": ("mamba2", {"head_dim": 8, "state": 3, "chunk": 4})},
    {"by": "chunk", "wider": 2, "inner": ROPE},
    {"by": "chunk", "params": {"ratio": 3.0}},
    {"by": "patch", "params": {"size": 3}, "wider": 2},
]
DATA = "how many tokens go inside depends on the data"
STRAIGHT = (
    "the gradient of a straight-through gate is not that of its value; see the tests of gradients below"
)
EXEMPT = {
    **{
        (by, name): DATA
        for by in ("mod", "chunk")
        for name in ("flops_equal_the_counter", "capacity_is_kept")
    },
    **{(by, "state_bytes_are_true"): DATA for by in ("mod", "chunk")},
    ("mod", "the_past_is_read"): "a token that is passed by reads nothing",
    ("chunk", "gradcheck_with_initial_state"): STRAIGHT,
}


@pytest.fixture
def wrapped(monkeypatch: pytest.MonkeyPatch):
    """Register a `Wrapped` block for one test; gives its case."""

    def add(**attributes: Any) -> Case:
        monkeypatch.setitem(BLOCKS._classes, "toy", type("Toy", (Wrapped,), attributes))
        return Case("toy", dim=8, T=18)

    return add


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("attributes", CASES, ids=str)
def test_wraps_obey_every_law(attributes: dict, name: str, wrapped) -> None:
    if (attributes["by"], name) in EXEMPT:
        pytest.skip(EXEMPT[attributes["by"], name])
    if name.startswith("gradcheck") and attributes.get("params", {}).get("gate") == "straight":
        pytest.skip(STRAIGHT)
    LAWS[name](wrapped(**attributes))


# ----------------------------------------------------------------------------- mixture of depths


V, D = 53, 16
INNER = [{"swa": {"head_dim": 8, "window": 4}}, "mlp"]


def build(stack: list[Any], seed: int = 0, dim: int = D) -> model.LanguageModel:
    torch.manual_seed(seed)
    return model.build({"dim": dim, "stack": stack}, vocab=V).double().eval()


def ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


def around(by: Any, inner: list[Any] = INNER, **rest: Any) -> dict:
    return {"wrap": {"by": by, "inner": inner, **rest}}


def test_keeping_everything_at_gate_one_is_the_plain_stack():
    wrapped_lm = build([around({"mod": {"keep": 1.0, "gate": "straight"}})])
    plain = build(INNER, seed=1)
    for mine, theirs in zip(list(plain.bank), [n for n in wrapped_lm.bank if "mod" not in n], strict=True):
        plain.bank[mine].load_state_dict(wrapped_lm.bank[theirs].state_dict())
    plain.embed.load_state_dict(wrapped_lm.embed.state_dict())
    x = ids(2, 13)
    torch.testing.assert_close(wrapped_lm(x).logits, plain(x).logits, rtol=1e-6, atol=1e-6)
    wrapped_lm.train()(x)
    upkeep(wrapped_lm)
    assert wrapped_lm.bank["b0_mod"].select.threshold == float("-inf")


@pytest.mark.parametrize("router", ["threshold", "topk"])
def test_skipped_tokens_are_bit_equal_and_kept_ones_change(router):
    torch.manual_seed(0)
    mod = make_wrap("mod", D, keep=0.4, router=router)
    x = torch.randn(2, 20, D)
    entered = mod("enter", x)
    y = mod("exit", entered.code + 1, entered.saved).y
    changed = (y != x).any(-1)
    kept = entered.saved.kept
    for row in range(2):
        assert changed[row].nonzero().flatten().tolist() == kept.places[row][kept.valid[row]].tolist()
        assert torch.equal(y[row][~changed[row]], x[row][~changed[row]])
    assert 0 < changed.sum() < changed.numel()


@pytest.mark.parametrize("keep", [0.125, 0.5])
def test_the_threshold_finds_its_rate(keep):
    """Also where scores are far from what the first threshold expects."""
    torch.manual_seed(0)
    mod = make_wrap("mod", D, keep=keep, decay=0.5)
    skewed = torch.randn(16, 128, D) + 0.7 * torch.randn(D)
    start = float(mod.eval()("enter", torch.randn(64, 128, D)).aux.stats["kept"])
    assert abs(start - keep) < 0.1  # scores of unit variance on average over weights
    mod.train()
    for _ in range(20):
        mod("enter", skewed)
        mod("enter", skewed)  # as activation checkpointing does; not counted twice
        upkeep(nn.ModuleList([mod]))
    assert abs(float(mod.eval()("enter", skewed).aux.stats["kept"]) - keep) < 0.02


def test_a_frozen_threshold_rests():
    mod = make_wrap("mod", D, keep=0.5).train()
    start = mod.select.threshold.clone()
    for moves in (False, True):
        mod.requires_grad_(moves)
        mod("enter", torch.randn(4, 32, D) + 1)
        upkeep(nn.ModuleList([mod]))
        assert torch.equal(mod.select.threshold, start) is not moves


def test_topk_keeps_its_share_of_every_document_and_looks_ahead(wrapped):
    torch.manual_seed(0)
    mod = make_wrap("mod", D, keep=0.3, router="topk")
    docs, x = Docs.packed([0, 1, 10, 16, 32], rows=2), torch.randn(2, 16, D)
    kept = mod("enter", x, None, Ctx(docs=docs)).saved.kept
    chosen = docs.segments.gather(1, kept.places)[kept.valid]
    assert torch.bincount(chosen).tolist() == [1, 3, 2, 5]  # ceil of 0.3 times 1, 9, 6, 16
    scores = mod.select.score(torch.nn.functional.rms_norm(x, (D,)))[0, 1:10, 0]
    best = sorted((scores.topk(3).indices + 1).tolist())
    assert [i for i in kept.places[0].tolist() if 1 <= i < 10] == best
    case = wrapped(by="mod", params={"keep": 0.4, "router": "topk"})
    block, y = case.build(), case.input(2, 18)
    assert block(y).y.shape == y.shape
    later = y.clone()
    later[:, 12:] = 9 * case.input(2, 6, seed=5)
    assert not torch.equal(block(y).y[:, :12], block(later).y[:, :12])
    with pytest.raises(ValueError, match="cannot run token by token"):
        build([around({"mod": {"router": "topk"}})]).generate(ids(1, 4), max_new_tokens=1)


def test_kept_tokens_turn_by_their_original_positions():
    """Attention over the kept tokens alone equals attention over all with the others cut out by hand."""
    torch.manual_seed(0)
    mod, attention = make_wrap("mod", D, keep=0.4).double(), make_block("attention", D, head_dim=8).double()
    x = torch.randn(1, 20, D, dtype=torch.float64)
    entered = mod("enter", x)
    index = entered.saved.kept.places[0]
    assert torch.equal(entered.ctx.places[0], index) and len(index) > 3
    y = attention(entered.code, None, entered.ctx).y
    one = attention(entered.code).y
    assert not torch.allclose(y, one)  # counting kept tokens would be another function
    q, k, v = (p(entered.code).view(-1, 2, 8) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    angle = index[:, None, None] * 10_000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    turn = torch.polar(torch.ones_like(angle), angle)
    q, k = (torch.complex(t[..., :4], t[..., 4:]) * turn for t in (q, k))
    logits = torch.einsum("thk,shk->hts", q, k.conj()).real / 8**0.5
    seen = torch.ones(len(index), len(index)).tril().bool()
    weight = logits.masked_fill(~seen, float("-inf")).softmax(-1)
    want = attention.o_proj(torch.einsum("hts,shk->thk", weight, v).flatten(1))
    torch.testing.assert_close(y[0], want, rtol=1e-9, atol=1e-9)


# ----------------------------------------------------------------------------- dynamic chunks


def test_chunks_by_the_formula():
    """Boundaries, moving average, straight-through gate and residual, token by token."""
    torch.manual_seed(0)
    chunk = make_wrap("chunk", D, ratio=3.0).double()
    nn.init.normal_(chunk.residual.weight)
    x = torch.randn(1, 15, D, dtype=torch.float64)
    docs = Docs.packed([0, 4, 15])
    entered = chunk("enter", x, None, Ctx(docs=docs))
    inside = entered.code.cos()
    y = chunk("exit", inside, entered.saved, None, Ctx(docs=docs)).y[0]
    z, chunks = None, iter(inside[0])
    for t in range(15):
        start = t in (0, 4)
        q, k = chunk.q_proj(x[0, t - 1]), chunk.k_proj(x[0, t])
        p = 1.0 if start else 0.5 - 0.5 * torch.nn.functional.cosine_similarity(q, k, dim=0).item()
        assert bool(entered.saved.boundary[0, t]) == (p > 0.5)
        if p > 0.5:
            new = next(chunks)
            z = new if start else p * new + (1 - p) * z
        torch.testing.assert_close(y[t], z + chunk.residual(x[0, t]), rtol=1e-9, atol=1e-9)
    assert next(chunks, None) is None


def test_the_gate_passes_the_gradient_of_its_probability():
    """d y_t / d p_t through the gate is z at a boundary and -z elsewhere, though the gate's value is 1."""
    torch.manual_seed(0)
    chunk = make_wrap("chunk", D).double()
    entered = chunk("enter", torch.randn(1, 9, D, dtype=torch.float64))
    p = entered.saved.p.detach().requires_grad_()
    flat = entered.code.detach() * 0 + 1  # every chunk the same, so the moving average is constant in P
    y = chunk("exit", flat, entered.saved._replace(p=p)).y
    torch.testing.assert_close(y, torch.ones_like(y))
    sign = torch.where(entered.saved.boundary, 1.0, -1.0).double()
    torch.testing.assert_close(torch.autograd.grad(y.sum(), p)[0], D * sign, rtol=1e-9, atol=1e-9)


def test_the_ratio_loss_pulls_the_rate_towards_its_aim():
    torch.manual_seed(0)
    chunk = make_wrap("chunk", D, ratio=4.0, weight=1.0).train()
    x = torch.randn(8, 64, D)
    optimizer = torch.optim.Adam(chunk.parameters(), lr=3e-3)
    shares = []
    for _ in range(120):
        aux = chunk("enter", x).aux
        shares.append(float(aux.stats["share"]))
        optimizer.zero_grad()
        aux.losses["ratio"].backward()
        optimizer.step()
    assert shares[0] > 0.4 and abs(shares[-1] - 0.25) < 0.1
    assert 0.9 < aux.losses["ratio"].item() < 1.05
    assert chunk.eval()("enter", x).aux.losses == {}


# ----------------------------------------------------------------------------- in a model


STACKS = {
    "mod": [*INNER, around({"mod": {"keep": 0.5}}), *INNER],
    "patch": [around({"patch": {"size": 3}}, width=24), "mlp"],
    "chunk": [*INNER, around({"chunk": {"ratio": 3}}, width=24), *INNER],
    "nested": [around("chunk", [around({"mod": {"keep": 0.5}}), around({"patch": {"size": 2}})])],
    "yoco inside": [
        around("chunk", [{"yoco": {"self": INNER, "memory": {"head_dim": 8}, "cross": ["xattn"]}}])
    ],
}


@pytest.mark.parametrize("name", STACKS)
def test_a_model_streams_packs_and_generates(name):
    lm = build(STACKS[name])
    x = ids(2, 21)
    want, state, got, at = lm(x).logits, lm.init_state(2, dtype=torch.float64), [], 0
    for n in (6, 1, 1, 9, 4):
        out = lm(x[:, at : at + n], state=state)
        got.append(out.logits)
        state, at = out.state, at + n
    torch.testing.assert_close(torch.cat(got, 1), want, rtol=1e-6, atol=1e-6)
    packed = lm(x.view(1, -1), docs=Docs.packed([0, 21, 42])).logits
    torch.testing.assert_close(packed.view(2, 21, V), want, rtol=1e-6, atol=1e-6)
    out = lm.generate(x[:, :5], max_new_tokens=6)
    for t in range(5, 11):
        assert torch.equal(lm(out[:, :t]).logits[:, -1].argmax(-1), out[:, t])
    lm.train()
    lm(x, labels=x).loss.backward()
    assert all(p.grad is not None for n, p in lm.named_parameters() if "bank" in n)


@pytest.mark.parametrize("name", STACKS)
def test_rows_of_unequal_length_go_on_token_by_token(name):
    """In a step that makes a group in one row alone, the other rows keep their states."""
    lm, x, mask = build(STACKS[name]), ids(2, 18), torch.ones(2, 7)
    mask[1, 0] = 0
    out = lm(x[:, :7], docs=Docs.from_mask(mask), state=lm.init_state(2, dtype=torch.float64))
    got = [out.logits]
    for t in range(7, 18):
        out = lm(x[:, t : t + 1], state=out.state)
        got.append(out.logits)
    for row, start in ((0, 0), (1, 1)):
        want = lm(x[row : row + 1, start:]).logits[0]
        torch.testing.assert_close(torch.cat(got, 1)[row, start:], want, rtol=1e-6, atol=1e-6)


def test_flops_and_description_count_fewer_positions():
    from model import config
    from model.describe import describe

    inner = [around({"patch": {"size": 4}}, ["mlp"])]
    plain, short = (
        describe(config.load({"dim": 32, "stack": s}), vocab=V, context=64) for s in (["mlp"], inner)
    )
    mlp = next(s for s in plain.sites if s.block == "mlp").flops
    assert next(s for s in short.sites if s.block == "mlp").flops == mlp / 4
    assert "patch> mlp <patch" in short.json()["diagram"]


@pytest.mark.parametrize(
    ("stack", "says"),
    [
        ("[{wrap: {by: mode, inner: [mlp]}}]", "2:21 stack[0].wrap.by: no wrap called 'mode'; did you mean"),
        ("[{wrap: {by: {mod: {kep: 1}}, inner: [mlp]}}]", "2:28 stack[0].wrap.by.mod: unknown key 'kep'"),
        ("[{wrap: {by: mod, width: 64, inner: [mlp]}}]", "the inside has the same width"),
        ("[{wrap: {by: {mod: {width: 8}}, inner: [mlp]}}]", "'width' is set by `width` of the wrap"),
        ("[{wrap: {by: {chunk: {ratio: 1}}, inner: [mlp]}}]", "ratio=1.0: tokens a chunk, more than 1"),
        ("[{wrap: {by: patch, inner: []}}]", "is empty: nothing to wrap"),
        ("[{wrap: {by: patch, width: 24, inner: [{swa: {head_dim: 16}}]}}]", "dim=24 is not a multiple"),
        (
            "[{yoco: {self: [mlp], memory: {head_dim: 16}, cross: [{wrap: {by: mod, inner: [xattn]}}]}}]",
            "a bracket in between hides the memory",
        ),
    ],
)  # fmt: skip
def test_mistakes_have_their_place(stack, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.yaml").write_text(f"dim: 32\nstack: {stack}\n")
    with pytest.raises(ConfigError) as error:
        model.build("x.yaml", vocab=V)
    assert says in str(error.value)


def test_config_round_trip():
    from model import config

    for stack in STACKS.values():
        loaded = config.load({"dim": D, "stack": stack})
        assert config.load(config.dump(loaded)) == loaded
