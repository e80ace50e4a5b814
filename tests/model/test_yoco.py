"""YOCO: one memory, a cross half that reads it, and a prefill that skips it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import model
from model.core import Docs, fork, state_bytes
from model.flops import site_costs
from model.schema import ConfigError

V, D = 53, 32
SELF = [{"swa": {"head_dim": 16, "window": 4}}, "mlp"]
CROSS = [{"repeat": 2, "of": ["xattn", "mlp"]}]


def build(seed: int = 0, heads: Any = None, **yoco: Any) -> model.LanguageModel:
    torch.manual_seed(seed)
    spec = {"self": SELF, "memory": {"head_dim": 16, "group": 2}, "cross": CROSS, **yoco}
    config = {"dim": D, "stack": [{"yoco": spec}], **({"heads": heads} if heads else {})}
    return model.build(config, vocab=V).double().eval()


def ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


def close(got: Tensor, want: Tensor, tol: float = 1e-6) -> None:
    """Logits come as fp32."""
    torch.testing.assert_close(got, want, rtol=tol, atol=tol)


@pytest.fixture(scope="module")
def lm() -> model.LanguageModel:
    return build()


@pytest.mark.parametrize("capacity", [None, 40])
def test_any_split_equals_the_whole(lm, capacity):
    x = ids(2, 21)
    want = lm(x).logits
    state, got, at = lm.init_state(2, capacity, torch.float64), [], 0
    for n in (6, 1, 0, 1, 9, 4):
        out = lm(x[:, at : at + n], state=state)
        got.append(out.logits)
        state, at = out.state, at + n
    close(torch.cat(got, 1), want)


def test_packed_equals_separate_in_logits_and_gradients(lm):
    a, b = ids(1, 7, seed=1), ids(1, 13, seed=2)

    def run(*calls: tuple[Tensor, Docs | None]) -> tuple[Tensor, list[Tensor]]:
        lm.zero_grad()
        logits = torch.cat([lm(x, docs=docs).logits for x, docs in calls], 1)
        (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
        return logits.detach(), [p.grad.clone() for p in lm.parameters()]

    packed, grads = run((torch.cat([a, b], 1), Docs.packed([0, 7, 20])))
    separate, want = run((a, None), (b, None))
    close(packed, separate)
    for got, w in zip(grads, want, strict=True):
        torch.testing.assert_close(got, w, rtol=1e-5, atol=1e-6)
    lm.zero_grad()


def test_nothing_is_read_from_the_future(lm):
    x = ids(1, 15)
    other = x.clone()
    other[:, 9] = (other[:, 9] + 1) % V
    a, b = lm(x).logits, lm(other).logits
    assert torch.equal(a[:, :9], b[:, :9])
    assert (a[:, 9:] != b[:, 9:]).any(-1).all()  # and everything later reads it


@pytest.mark.parametrize("prefix", [0, 5])
@pytest.mark.parametrize("padding", ["none", "left", "right", "documents"])
def test_skip_gives_the_last_logits_and_the_same_state(lm, prefix, padding):
    """The cross half runs on one token a row; logits and states equal those of a full prefill."""
    x = ids(3, 12, seed=4)
    mask = torch.ones(3, 12)
    if padding in ("left", "right"):
        for row, n in enumerate((0, 3, 11)):
            mask[row, :n] = 0
    mask = mask.flip(1) if padding == "right" else mask
    docs = None if padding == "none" else Docs.from_mask(mask)
    if padding == "documents":
        docs = Docs.packed([0, 4, 12, 24, 35, 36], rows=3)
    state = lm.init_state(3, dtype=torch.float64)
    if prefix:
        state = lm(ids(3, prefix, seed=5), state=state).state
    full = lm(x, docs=docs, state=fork(state))
    places = [11 if docs is None else int(docs.tokens[r].nonzero().max()) for r in range(3)]
    lengths = []
    hook = lm.bank["b3_xattn"].register_forward_hook(lambda m, args, out: lengths.append(out.y.shape[1]))
    skipped = lm(x, docs=docs, state=state, last=True)
    hook.remove()
    assert lengths == [1]
    close(skipped.logits[:, 0], torch.stack([full.logits[r, t] for r, t in enumerate(places)]))
    more = ids(3, 2, seed=6)
    close(lm(more, state=skipped.state).logits, lm(more, state=full.state).logits)


def test_generation_is_greedy_argmax_of_full_passes(lm):
    prompt = ids(2, 9)
    want = prompt
    for _ in range(12):
        want = torch.cat([want, lm(want).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(lm.generate(prompt, max_new_tokens=12), want)


def test_state_grows_by_one_layers_keys_and_values(lm):
    """2 K G numbers a token, measured over a whole doubling of the cache, and as the plan counts it."""
    sizes = [state_bytes(lm(ids(1, n), state=lm.init_state(1)).state) for n in (64, 128)]
    per_token = 2 * 16 * 1 * 8  # fp64 keys and values of the one memory, one head of 16
    assert sizes[1] - sizes[0] == 64 * 2 * 16 * 4  # the cache itself is fp32, as asked of init_state
    assert sum(c.cost.state_per_token for c in site_costs(lm, 64)) == per_token


def test_flops_of_the_cross_half_follow_from_the_memory():
    lm = build(self=["mlp"]).float()
    x = ids(1, 24)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        lm(x)
    assert counter.get_total_flops() == sum(c.forward for c in site_costs(lm, 24))


RWKV = {"mlp": {"act": "rwkv"}}


@pytest.mark.parametrize(
    ("yoco", "heads", "says"),
    [
        ({"cross": ["xattn", {"swa": {"head_dim": 16}}]}, None, "swa in its cross half"),
        ({"cross": ["xattn", RWKV]}, None, "mlp in its cross half"),
        ({}, {"next": {"ffn": {"act": "rwkv"}}}, "the head 'next' keeps a state"),
    ],
)
def test_skip_on_is_refused_where_a_state_needs_every_token(yoco, heads, says):
    with pytest.raises(ConfigError, match="skip: on, but") as error:
        build(heads=heads, skip="on", **yoco)
    assert says in str(error.value)
    lm = build(heads=heads, skip="auto", **yoco)  # and auto runs everything
    x = ids(2, 9)
    got = lm(x, state=lm.init_state(2, dtype=torch.float64), last=True).logits
    close(got, lm(x).logits[:, -1:])


def test_auto_skips_and_off_does_not():
    assert [build(skip=s).plan.items[-1].skip for s in ("auto", "on", "off")] == [True, True, False]


def test_mistakes_are_reported_with_their_line(tmp_path):
    arch = tmp_path / "bad.yaml"
    arch.write_text(
        "dim: 32\n"
        "stack:\n"
        "  - xattn\n"
        "  - yoco:\n"
        "      self: [mlp]\n"
        "      memory: {head_dim: 16}\n"
        "      cross: [{xattn: {head_dim: 8}}, {mlp: {}, as: m}]\n"
        "  - mlp\n"
    )
    with pytest.raises(ConfigError) as error:
        model.build(arch, vocab=V)
    lines = str(error.value).splitlines()
    assert "bad.yaml:3:5 stack[0].xattn: xattn reads a memory" in lines[0]
    assert "bad.yaml:7:16" in lines[1] and "widths must be equal" in lines[1]
    with pytest.raises(ConfigError, match="something follows this yoco"):
        model.build({"dim": 32, "stack": [{"yoco": {"self": ["mlp"], "memory": {"head_dim": 16},
                     "cross": ["xattn"], "skip": "on"}}, "mlp"]}, vocab=V)  # fmt: skip
    with pytest.raises(ConfigError, match="nothing in `cross` reads the memory"):
        build(cross=["mlp"])
    with pytest.raises(ConfigError, match="head_dim must divide"):
        build(memory={"head_dim": 12})


def test_a_tied_repeat_of_yocos_has_a_memory_a_visit():
    torch.manual_seed(0)
    spec = {"self": ["mlp"], "memory": {"head_dim": 16}, "cross": ["xattn"]}
    stack = [{"repeat": 2, "tied": True, "of": [{"yoco": spec}]}]
    lm = model.build({"dim": D, "stack": stack}, vocab=V).double().eval()
    assert sum(site.endswith("memory") or "memory#" in site for site in lm.init_state(1)) == 2
    x = ids(2, 9)
    want = lm(x).logits
    state = lm.init_state(2, dtype=torch.float64)
    first = lm(x[:, :5], state=state)
    close(torch.cat([first.logits, lm(x[:, 5:], state=first.state).logits], 1), want)


def test_the_arch_builds_and_is_described():
    from model import config
    from model.describe import describe

    found = describe(config.load("yoco_swa", {"dim": 192}), vocab=300, context=64)
    assert found.total("state_per_token") == 2 * 64 * 4
    assert "memory[ 6×(xattn mlp) ]" in found.json()["diagram"]
