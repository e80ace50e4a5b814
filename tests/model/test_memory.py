"""The memory of a yoco that drops tokens (`keep`) or is bounded (`ring`), and `recall`, which reads far."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import model
from model.blocks.memory import SelectedMemory
from model.core import Ctx, state_bytes
from model.flops import site_costs
from model.quant.base import upkeep
from model.schema import ConfigError
from tests.laws import laws_time, laws_training  # noqa: F401 - they register the laws
from tests.laws.harness import LAWS, Case
from tests.laws.memory import remembering

V, D = 53, 32
KEEP = {"ratio": 0.5, "recent": 4}
# A fixed capacity counts the tokens that are held, so more tokens than slots may be fine, and bytes are
# expected ones: both have tests below.
OTHERWISE = {"capacity_is_kept", "state_bytes_are_true"}


@pytest.mark.parametrize("law", sorted(set(LAWS) - OTHERWISE))
def test_laws_of_a_memory_that_drops_tokens(law: str) -> None:
    LAWS[law](Case("xattn", params={"head_dim": 16}, around=remembering(group=2, keep=KEEP)))


def build(cross: Any = ("xattn", "mlp"), seed: int = 0, **memory: Any) -> model.LanguageModel:
    torch.manual_seed(seed)
    spec = {"self": ["mlp", {"swa": {"head_dim": 16, "window": 4}}], "cross": list(cross)}
    spec["memory"] = {"head_dim": 16, "group": 2, **memory}
    return model.build({"dim": D, "stack": [{"yoco": spec}]}, vocab=V).double().eval()


def ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


def streamed(lm: model.LanguageModel, x: Tensor, pieces: tuple[int, ...]) -> tuple[Tensor, Any]:
    state, got, at = lm.init_state(len(x), dtype=torch.float64), [], 0
    for n in pieces:
        out = lm(x[:, at : at + n], state=state)
        got.append(out.logits)
        state, at = out.state, at + n
    return torch.cat(got, 1), state


def test_keeping_everything_is_the_plain_memory() -> None:
    plain, kept = build(), build(keep={"ratio": 1.0, "recent": 1})
    missing = kept.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert all("select" in name for name in missing)
    x = ids(2, 17)
    torch.testing.assert_close(kept(x).logits, plain(x).logits)


def test_a_dropped_token_is_read_while_it_is_recent_and_never_after() -> None:
    memory = SelectedMemory(D, head_dim=16, heads=1, ratio=0.5, recent=3).double().eval()
    x = torch.randn(1, 12, D, dtype=torch.float64)
    kept = memory.select(x)[0] > memory.select.threshold
    dropped = [t for t in range(1, 9) if not kept[t]]
    assert dropped and kept[1:9].any()
    seen = model.make_block("xattn", D, head_dim=16).double()
    for t in range(1, 9):
        x_ = x.clone().requires_grad_()
        read, _, _ = memory(x_)
        y = seen(x_.detach(), None, Ctx(memory=read)).y[0]
        reach = [
            q for q in range(12) if torch.autograd.grad(y[q].sum(), x_, retain_graph=True)[0][0, t].any()
        ]
        assert reach == (list(range(t, 12)) if kept[t] else list(range(t, t + 3)))


def test_the_state_holds_what_was_kept() -> None:
    """At ratio 0.25 about a quarter of the tokens, and the recent ones; bytes as the plan expects them."""
    lm = build(keep={"ratio": 0.25, "recent": 8}, seed=1)
    site = next(s for s in lm.plan.sites() if "memory" in s)
    memory = lm.bank[lm.plan.sites()[site]]
    lm.train()
    for i in range(12):
        lm(ids(4, 64, seed=i))
        upkeep(lm)
    lm.eval()
    x = ids(1, 512, seed=99)
    state = lm(x, state=lm.init_state(1)).state[site]
    held = int((state.position >= 0).sum())
    assert 512 * 0.12 < held < 512 * 0.4
    assert bool((state.position[0, :held].diff() > 0).all()) and int(state.position[0, held - 1]) == 511
    cost = next(c.cost for c in site_costs(lm.float(), 512) if c.site == site)
    entry = state_bytes(state) / state.position.shape[1]
    expected = cost.state_fixed + 512 * cost.state_per_token
    assert abs(held * entry / expected - 1) < 0.6
    assert isinstance(memory, SelectedMemory)


def test_a_description_says_what_is_held() -> None:
    from model.describe import describe

    def memory(**memory: Any) -> Any:
        spec = {"self": ["mlp"], "memory": {"head_dim": 16, **memory}, "cross": ["xattn"]}
        sites = describe(model.config.load({"dim": D, "stack": [{"yoco": spec}]}), vocab=V, context=64).sites
        return next(s for s in sites if s.kind == "memory")

    kept, ring = memory(keep={"ratio": 0.25, "recent": 8}), memory(ring=6)
    assert "keeps 25% of the tokens, and the last 8" in kept.notes and "the last 6 tokens" in ring.notes
    token = 2 * D * 4
    assert (ring.state_fixed, ring.state_per_token) == (5 * token + 8, 0)
    assert kept.state_per_token == 0.25 * (token + 9)


def test_a_capacity_counts_what_is_held() -> None:
    lm = build(keep={"ratio": 0.5, "recent": 2})
    x = ids(1, 40)
    with pytest.raises(OverflowError, match="would need"):
        lm(x, state=lm.init_state(1, capacity=4))
    free = lm(x, state=lm.init_state(1))
    fixed = lm(x, state=lm.init_state(1, capacity=40))
    torch.testing.assert_close(fixed.logits, free.logits)


@pytest.mark.parametrize("memory", [{"keep": KEEP}, {"ring": 6}])
def test_models_stream_generate_and_skip(memory: dict[str, Any]) -> None:
    lm = build(**memory)
    x = ids(2, 21)
    want = lm(x).logits
    got, _ = streamed(lm, x, (6, 1, 0, 9, 5))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    skipped = lm(x, state=lm.init_state(2, dtype=torch.float64), last=True).logits
    torch.testing.assert_close(skipped[:, 0], want[:, -1], rtol=1e-6, atol=1e-6)
    assert lm.plan.items[-1].skip
    grown = x
    for _ in range(5):
        grown = torch.cat([grown, lm(grown).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(lm.generate(x, max_new_tokens=5), grown)


RECALL = {"recall": {"window": 4}}


def test_recall_streams_in_constant_bytes_and_reads_far_back() -> None:
    lm = build(cross=[RECALL, "mlp", RECALL, "mlp"], ring=12)
    assert not lm.plan.items[-1].skip  # its window is a state
    x = ids(2, 30)
    got, state = streamed(lm, x, (7, 1, 22))
    torch.testing.assert_close(got, lm(x).logits, rtol=1e-6, atol=1e-6)
    more = lm(ids(2, 40, seed=3), state=state).state
    assert state_bytes(more) == state_bytes(lm.init_state(2, dtype=torch.float64))


def test_recall_with_a_closed_gate_is_swa() -> None:
    torch.manual_seed(0)
    recall = model.make_block("recall", D, head_dim=16, window=4).double()
    swa = model.make_block("swa", D, head_dim=16, window=4).double()
    swa.load_state_dict({k: v for k, v in recall.state_dict().items() if not k.startswith("far_gate")})
    x = torch.randn(2, 15, D, dtype=torch.float64)
    memory = SelectedMemory(D, head_dim=16).double()(x)[0]
    with torch.no_grad():
        recall.far_gate.bias.fill_(-torch.inf)
        torch.testing.assert_close(recall(x, None, Ctx(memory=memory)).y, swa(x).y)


def test_recall_reads_nothing_twice() -> None:
    """Distances up to the window - 1 are its own, from the window to the reach - 1 the memory's."""
    recall = model.make_block("recall", D, head_dim=16, window=3, reach=7).double()
    x = torch.randn(1, 12, D, dtype=torch.float64)
    memory = SelectedMemory(D, head_dim=16, ratio=1.0, recent=1).double()

    def read(near: Tensor, far: Tensor) -> Tensor:
        return recall(near, None, replace(Ctx(), memory=memory(far)[0])).y[0, 10]

    near, far = x.clone().requires_grad_(), x.clone().requires_grad_()
    a, b = torch.autograd.grad(read(near, far).sum(), (near, far))
    assert a[0].any(-1).nonzero().flatten().tolist() == [8, 9, 10]
    assert b[0].any(-1).nonzero().flatten().tolist() == [4, 5, 6, 7]


def test_mistakes_are_reported_with_their_line(tmp_path) -> None:
    def errors(memory: str, cross: str = "[xattn]") -> str:
        arch = tmp_path / "bad.yaml"
        arch.write_text(
            f"dim: 32\nstack:\n  - yoco:\n      self: [mlp]\n      memory: {memory}\n      cross: {cross}\n"
        )
        with pytest.raises(ConfigError) as error:
            model.build(arch, vocab=V)
        return str(error.value)

    for memory, cross, place, says in (
        ("{head_dim: 16, ring: 8, keep: {}}", "[xattn]", "bad.yaml:5:", "not with `ring`"),
        ("{head_dim: 16, ring: 0}", "[xattn]", "bad.yaml:5:", "at least 1"),
        ("{head_dim: 16, keep: {ratio: 1.5}}", "[xattn]", "bad.yaml:5:", "a share of the tokens"),
        ("{head_dim: 16, keep: {rate: 0.5}}", "[xattn]", "bad.yaml:5:", "did you mean 'ratio'"),
        ("{head_dim: 16, ring: 8}", "[{xattn: {window: 9}}]", "bad.yaml:6:", "the memory's ring holds 8"),
        ("{head_dim: 16, ring: 8}", "[{recall: {window: 4, reach: 9}}]", "bad.yaml:6:", "ring holds 8"),
        ("{head_dim: 16, ring: 8}", "[{recall: {window: 4, reach: 3}}]", "bad.yaml:6:", "offset < reach"),
        ("{head_dim: 16, ring: 8}", "[{recall: {window: 8}}]", "bad.yaml:6:", "offset=8, reach=8"),
    ):
        text = errors(memory, cross)
        assert place in text and says in text, text
    with pytest.raises(ConfigError, match="recall reads a memory"):
        model.build({"dim": 32, "stack": [{"recall": {"head_dim": 16, "window": 4}}]}, vocab=V)
