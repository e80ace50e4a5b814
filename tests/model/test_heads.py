"""Heads that predict several tokens: their reductions, what they see, documents, states, exact counts."""

from __future__ import annotations

from math import comb
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import model
from model.core import Docs, fork, state_bytes
from model.flops import site_costs
from model.heads import blockwise
from model.schema import ConfigError

V, D = 53, 32
STACK = [{"mamba2": {"state": 16, "head_dim": 16}}, {"swa": {"head_dim": 16, "window": 5}}, "mlp"]
ATTN = {"attn": {"head_dim": 16, "group": 2}}
KINDS: dict[str, dict[str, Any]] = {
    "parallel": {"kind": "parallel", "size": 4, "ffn": {"act": "swiglu"}},
    "chain": {"kind": "chain", "depth": 3, "window": 4, **ATTN},
    "mask": {"kind": "mask", "size": 4, "layers": 2, "window": 6, **ATTN},
    "var": {"kind": "var", "size": 4, "window": 6, "codes": 16, **ATTN},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def build(head: dict[str, Any], seed: int = 0, **heads: Any) -> model.LanguageModel:
    torch.manual_seed(seed)
    both = {**heads, "mtp": head} if heads else {"next": {"shift": 1}, "mtp": head}
    lm = model.build({"dim": D, "stack": STACK, "heads": both}, vocab=V).double().eval()
    with torch.no_grad():  # so that every part says something
        for name, p in lm.heads.named_parameters():
            if "norm" not in name:
                p.add_(torch.randn_like(p) * 0.2)
    return lm


def ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


def close(got: Tensor, want: Tensor, tol: float = 1e-6) -> None:
    torch.testing.assert_close(got.double(), want.double(), rtol=tol, atol=tol, equal_nan=True)


def of_mtp(found: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in found.items() if name.startswith("mtp")}


# ----------------------------------------------------------------------------- what they are


def test_one_parallel_head_is_the_baseline():
    x = ids(2, 11)
    torch.manual_seed(0)
    plain = model.build({"dim": D, "stack": STACK, "heads": {"next": {"ffn": {}}}}, vocab=V)
    torch.manual_seed(0)
    one = {"kind": "parallel", "size": 1, "ffn": {}}
    parallel = model.build({"dim": D, "stack": STACK, "heads": {"next": one}}, vocab=V)
    a, b = plain(x, labels=x), parallel(x, labels=x)
    a.loss.backward(), b.loss.backward()
    assert torch.equal(a.loss, b.loss) and a.losses == b.losses
    for p, q in zip(plain.parameters(), parallel.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    assert torch.equal(plain(x).logits, parallel(x).logits)


def test_one_slot_is_a_next_token_head():
    """Nothing random, one term a token; and with layers that add nothing, the plain head to the bit."""
    lm = build({**KINDS["mask"], "size": 1})
    x, docs = ids(2, 12), Docs.packed([0, 5, 12, 24], rows=2)
    found = lm.nll(x, docs)
    lm.train()
    for seed in (1, 2):
        torch.manual_seed(seed)
        close(lm(x, labels=x, docs=docs).losses["mtp"], found["mtp"].nanmean())
    lm.eval()
    assert torch.equal(found["mtp"].isnan(), found["next"].isnan())
    with torch.no_grad():
        for p in (lm.heads["mtp"].place, lm.heads["mtp"].mask):
            p.zero_()
        for layer in lm.heads["mtp"].stack.layers:
            layer.o_proj.weight.zero_()
            layer.ffn.block.down_proj.weight.zero_()
        lm.heads["next"].norm.weight.copy_(lm.heads["mtp"].stack.norm.weight)
    found = lm.nll(x, docs)
    close(found["mtp"], found["next"], 1e-12)


def test_chain_is_deepseeks_formula():
    lm = build({**KINDS["chain"], "depth": 2, "window": 9})
    x = ids(1, 9)
    table = lm.embed.table()
    h, E = lm(x).hidden, table[x]
    want = {}
    for k, link in enumerate(lm.heads["mtp"].links, 1):
        pairs = torch.cat([link.h_norm(h[:, :-1]), link.row_norm(E[:, k:])], -1)
        h = link.ffn(link.attn(link.join(pairs)).y).y
        logp = (link.norm(h) @ table.T).log_softmax(-1)[:, :-1]
        want[f"mtp.{k + 1}"] = -logp.gather(-1, x[:, k + 1 :, None])[..., 0]
    for name, nats in want.items():
        got = lm.nll(x)[name]
        close(got[~got.isnan()], nats.flatten())


def test_mask_loss_is_the_integral_over_noise_levels():
    """n / m with m uniform in 1..n weighs a set of m masked tokens as E_t[1/t; exactly these] does."""
    n = 4
    t = torch.linspace(1e-6, 1, 200_001, dtype=torch.float64)
    for m in range(1, n + 1):
        integral = torch.trapezoid(t ** (m - 1) * (1 - t) ** (n - m), t)
        assert abs(float(integral) - (1 / n) / comb(n, m) * (n / m)) < 1e-5


def test_mask_noise_has_every_size_and_only_tokens():
    valid = torch.arange(4) < torch.randint(1, 5, (4000, 1))
    masked, scale = blockwise.noise(valid, training=True)
    count, m = valid.sum(1), (masked & valid).sum(1)
    assert bool((masked | valid).all()) and bool((m >= 1).all())
    close(scale, count / m)
    for n in range(1, 5):
        sizes = torch.bincount(m[count == n], minlength=n + 1)[1:].double()
        assert sizes.min() > 0.8 * sizes.mean()
    assert abs(float((scale * m).double().mean() - count.double().mean())) < 1e-4


def test_var_is_told_the_code_that_it_used_in_bf16_too(monkeypatch):
    lm = build(KINDS["var"]).float()
    quant, used = lm.heads["mtp"].quant, []
    with torch.no_grad():  # codes that lie close together, as young ones do
        quant.books[0].table.copy_(torch.randn(32) + 0.02 * torch.randn(16, 32))
    quantize = quant.quantize
    monkeypatch.setattr(quant, "quantize", lambda z, k: (used.append(quant.encode_z(z)), quantize(z, k))[1])
    x = ids(4, 40)
    readings: list[Any] = []
    lm.heads["mtp"].register_forward_hook(lambda m, a, step: readings.extend(step.readings[""]))
    with torch.autocast("cpu", torch.bfloat16):
        lm(x, labels=x)
    assert torch.equal(readings[1].targets, used[0].flatten()) and len(used[0].unique()) > 1


# ----------------------------------------------------------------------------- what they see


@every_kind
def test_nothing_is_read_from_later_blocks(kind):
    """Block b of the grid never sees tokens beyond it; single shifts never see beyond their own token."""
    lm = build(KINDS[kind])
    x = ids(1, 14)
    at = 9  # a token of the block 9..12
    other = x.clone()
    other[:, at] = (other[:, at] + 1) % V
    a, b = of_mtp(lm.nll(x)), of_mtp(lm.nll(other))
    for name in a:
        shift = lm.readouts[name].shift
        before = at - shift if kind in ("parallel", "chain") else 8  # the block of tokens 9.. starts after 8
        assert before > 2
        assert torch.equal(a[name][:, :before].nan_to_num(), b[name][:, :before].nan_to_num()), name
        assert not torch.equal(a[name][:, before:].nan_to_num(), b[name][:, before:].nan_to_num())


@every_kind
def test_packed_equals_separate_in_losses_and_gradients(kind, monkeypatch):
    # Noise depends on the batch: here every token is masked. So does the mean of the codes' own loss.
    monkeypatch.setattr(blockwise, "noise", lambda valid, _: (torch.ones_like(valid), valid[:, 0].double()))
    lm = build(KINDS[kind])
    parts = [ids(1, n, seed=n) for n in (7, 1, 13, 2)]
    docs = Docs.packed([0, 7, 8, 21, 23])
    row = torch.cat(parts, 1)
    norms = dict.fromkeys(lm.readouts, 1.0)

    def grads() -> list[Tensor]:
        out = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in lm.parameters()]
        lm.zero_grad()
        return out

    packed = of_mtp(lm.nll(row, docs))
    for name, nats in packed.items():
        close(nats, torch.cat([lm.nll(part)[name] for part in parts], 1))
    lm(row, labels=row, docs=docs, norms=norms, aux_scale=0.0).loss.backward()
    got = grads()
    for part in parts:
        lm(part, labels=part, norms=norms, aux_scale=0.0).loss.backward()
    for a, b in zip(got, grads(), strict=True):
        close(a, b, 1e-6)


@every_kind
def test_weights_and_ignored_labels_belong_to_tokens(kind):
    lm = build(KINDS[kind])
    x, weights = ids(2, 13), torch.rand(2, 13, generator=torch.Generator().manual_seed(1))
    labels = x.clone()
    labels[0, 3:6] = -100
    lm.train()
    torch.manual_seed(0)
    out = lm(x, labels=labels, weights=weights)
    counts = lm.head_counts(labels, None, weights)
    for name in lm.readouts:
        close(out.sums[name][1], counts[name])
    torch.manual_seed(0)
    zero = lm(x, labels=labels, weights=weights * 0)
    assert all(float(zero.sums[name][0]) == 0 for name in of_mtp(lm.readouts))
    torch.manual_seed(0)
    twice = lm(x, labels=labels, weights=2 * weights)
    for name in lm.readouts:
        close(twice.sums[name][0], 2 * out.sums[name][0])


# ----------------------------------------------------------------------------- states


@every_kind
def test_any_split_gives_the_same_drafts(kind):
    """Prefill at once, or in pieces, with padding: the same state, so the same draft."""
    lm = build(KINDS[kind])
    x, n = ids(2, 14), lm.heads["mtp"].reach
    whole = lm(x, state=lm.init_state(2, dtype=torch.float64), last=True)
    want = _drafts(lm, whole, x[:, :1], n)
    for sizes in ((1,) * 14, (2, 1, 11), (9, 0, 5), (13, 1)):
        state, at = lm.init_state(2, dtype=torch.float64), 0
        for size in sizes:
            out = lm(x[:, at : at + size], state=state, last=size > 0)
            state, at = out.state, at + size
        close(_drafts(lm, out, x[:, :1], n), want)
    for side in ("left", "right", "both"):
        close(_drafts(lm, _padded(lm, x, side), x[:, :1], n), want)


def _drafts(lm: model.LanguageModel, out: Any, new: Tensor, n: int) -> Tensor:
    """States that drafts are read from, not only their likeliest tokens."""
    head, seen = lm.heads["mtp"], []

    def pick(h: Tensor) -> Tensor:
        seen.append(h)
        return lm._scores(h, lm.embed.table()).argmax(-1)

    drafted = head.draft(out.hidden, fork(out.state["heads.mtp"]), lm._words(new, lm.embed.table()), n, pick)
    assert drafted.shape == (len(new), n)
    return torch.cat(seen, 1)


def _padded(lm: model.LanguageModel, x: Tensor, side: str) -> Any:
    """Two calls, the rows cut at different places and padded."""
    state = lm.init_state(2, dtype=torch.float64)
    cuts = [(0, 6), (0, 9)], [(6, 14), (9, 14)]
    for part in cuts:
        rows, mask = torch.zeros(2, 12, dtype=torch.int64), torch.zeros(2, 12, dtype=torch.int64)
        for row, (a, b) in enumerate(part):
            start = {"left": 12 - (b - a), "right": 0, "both": 2}[side]
            rows[row, start : start + b - a] = x[row, a:b]
            mask[row, start : start + b - a] = 1
        out = lm(rows, state=state, docs=Docs.from_mask(mask), last=True)
        state = out.state
    return out


@every_kind
def test_state_does_not_grow_and_is_counted(kind):
    lm = build(KINDS[kind]).float()
    cost = next(c for c in site_costs(lm, 16) if c.site == "heads.mtp").cost
    state = lm.init_state(1)
    for n in (5, 40, 1):
        state = lm(ids(1, n), state=state).state
        assert state_bytes(state["heads.mtp"]) == cost.state_fixed
    assert cost.state_per_token == 0


# ----------------------------------------------------------------------------- counts and errors


@every_kind
@pytest.mark.parametrize("T", [13, 9])
def test_flops_equal_torchs_counter(kind, T):
    lm = build(KINDS[kind]).float()
    x = ids(1, T)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        lm(x, labels=x)
    with FlopCounterMode(display=False) as trunk, torch.no_grad():
        lm.heads["mtp"](lm._trunk(x, lm.embed.table(), None, None)[0])  # without labels: it does nothing
    costs = {c.site: c.forward for c in site_costs(lm, T)}
    want = costs["heads.mtp"] + costs["heads.next"] + trunk.get_total_flops()
    if kind == "parallel":
        want -= 2.0 * T * sum(p.numel() for p in lm.heads["mtp"].heads[0].ffn.parameters() if p.dim() > 1)
    assert counter.get_total_flops() == want


@every_kind
def test_every_parameter_learns(kind):
    lm = build(KINDS[kind]).train()
    x = ids(2, 14)
    lm(x, labels=x).loss.backward()
    silent = [n for n, p in lm.named_parameters() if p.grad is None or not p.grad.count_nonzero()]
    assert not silent


@pytest.mark.parametrize(
    "heads, words",
    [
        ({"mtp": {"kind": "chain"}}, "need one that says the next token"),
        ({"second": {"shift": 2}, "mtp": {"kind": "mask"}}, "need one that says the next token"),
        ({"next": {"size": 3}}, "size: is for the kinds parallel, mask, var"),
        ({"next": {}, "mtp": {"kind": "mask", "shift": 2}}, "shift: is for the kinds single"),
        ({"mtp": {"kind": "parallel", "ffn": {"act": "rwkv"}}}, "looks at the token before"),
        ({"next": {}, "mtp": {"kind": "var", "codes": 1}}, "want at least 2"),
        ({"next": {}, "mtp": {"kind": "chain", "attn": {"head_dim": 15}}}, "head_dim"),
    ],
)
def test_what_does_not_fit_is_refused(heads, words):
    with pytest.raises(ConfigError, match=words):
        model.build({"dim": D, "stack": ["mlp"], "heads": heads}, vocab=V)
