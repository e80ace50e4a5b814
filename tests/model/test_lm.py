"""The language model as a whole: heads, documents, state, exact accumulation."""

import pytest
import torch

import model
from model.core import Docs
from model.heads import IGNORE, shift_targets
from model.schema import BlockNode, Config, EmbedConfig, HeadConfig, RepeatNode

V, D = 53, 32
STACK = [
    BlockNode("mamba2", {"state": 16, "head_dim": 16}),
    BlockNode("mlp", {"act": "rwkv"}),
    BlockNode("swa", {"head_dim": 16, "window": 5}),
    BlockNode("attention", {"head_dim": 16, "group": 2}),
]
HEADS = {"recon": HeadConfig(0), "next": HeadConfig(1), "second": HeadConfig(2, 0.5, {"act": "rwkv"})}


@pytest.fixture(scope="module")
def lm() -> model.LanguageModel:
    torch.manual_seed(0)
    return model.build(Config(dim=D, stack=STACK, heads=HEADS, name="mixed"), vocab=V).double().eval()


def ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


def test_targets_stop_at_document_ends():
    x = torch.arange(8).view(1, 8)
    docs = Docs.packed([0, 3, 8])
    i = IGNORE
    assert shift_targets(x, 0, docs).tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]
    assert shift_targets(x, 1, docs).tolist() == [[1, 2, i, 4, 5, 6, 7, i]]
    assert shift_targets(x, 2, docs).tolist() == [[2, i, i, 5, 6, 7, i, i]]
    assert shift_targets(x, 9, None).tolist() == [[i] * 8]
    padded = Docs.from_mask(torch.tensor([[0, 0, 1, 1, 1, 1, 1, 0]]))
    assert shift_targets(x, 1, padded).tolist() == [[i, i, 3, 4, 5, 6, i, i]]


def test_loss_is_the_weighted_sum_of_heads(lm):
    x = ids(2, 17)
    out = lm(x, labels=x)
    assert out.logits is None
    want = out.losses["recon"] + out.losses["next"] + 0.5 * out.losses["second"]
    torch.testing.assert_close(out.loss.double(), want.double(), rtol=1e-6, atol=1e-6)
    nll = lm.nll(x)
    for name, mean in out.losses.items():
        torch.testing.assert_close(nll[name].nanmean().double(), mean.double(), rtol=1e-6, atol=1e-6)


def test_next_loss_equals_cross_entropy_of_logits(lm):
    x = ids(2, 17)
    logits = lm(x).logits
    want = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())
    torch.testing.assert_close(lm(x, labels=x).losses["next"].double(), want.double(), rtol=1e-5, atol=1e-6)


def test_top1_counts_the_likeliest_tokens(lm):
    x = ids(2, 17)
    hits = int((lm(x).logits[:, :-1].argmax(-1) == x[:, 1:]).sum())
    assert lm.top1(x)["next"] == (hits, 2 * 16)
    assert lm.top1(x)["recon"][1] == 2 * 17


def test_weights_belong_to_the_token_that_is_predicted(lm):
    x = ids(1, 9)
    weights = torch.zeros(1, 9)
    weights[0, 4] = 2.0
    out = lm(x, labels=x, weights=weights)
    nll = lm.nll(x)
    for name, place in (("recon", 4), ("next", 3), ("second", 2)):
        nats, count = out.sums[name]
        assert float(count) == 2.0
        torch.testing.assert_close(nats.double(), 2 * nll[name][0, place].double(), rtol=1e-6, atol=1e-6)


def test_micro_batches_with_global_norms_give_the_whole_gradient(lm):
    x, docs = ids(4, 12), Docs.packed([0, 5, 12, 24, 30, 48], rows=4)
    lm.zero_grad()
    lm(x, labels=x, docs=docs).loss.backward()
    whole = {n: p.grad.clone() for n, p in lm.named_parameters() if p.grad is not None}
    lm.zero_grad()
    norms = lm.head_counts(x, docs)
    for rows, cu in ((x[:1], [0, 5, 12]), (x[1:], [0, 12, 18, 36])):
        lm(rows, labels=rows, docs=Docs.packed(cu, rows=len(rows)), norms=norms).loss.backward()
    for name, grad in whole.items():
        got = dict(lm.named_parameters())[name].grad
        torch.testing.assert_close(got, grad, rtol=1e-6, atol=1e-8)
    lm.zero_grad()


def test_packed_equals_separate(lm):
    a, b = ids(1, 7, seed=1), ids(1, 13, seed=2)
    packed = lm(torch.cat([a, b], 1), docs=Docs.packed([0, 7, 20])).logits
    torch.testing.assert_close(packed[:, :7], lm(a).logits, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(packed[:, 7:], lm(b).logits, rtol=1e-5, atol=1e-6)


def test_steps_equal_one_pass(lm):
    x = ids(2, 21)
    want = lm(x).logits
    state = lm.init_state(2, dtype=torch.float64)
    got, at = [], 0
    for n in (6, 1, 1, 9, 4):
        out = lm(x[:, at : at + n], state=state)
        got.append(out.logits)
        state, at = out.state, at + n
    torch.testing.assert_close(torch.cat(got, 1), want, rtol=1e-5, atol=1e-6)


def test_generate_is_greedy_argmax_of_full_passes(lm):
    prompt = ids(2, 5)
    got = lm.generate(prompt, max_new_tokens=12)
    want = prompt
    for _ in range(12):
        want = torch.cat([want, lm(want).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(got, want)
    again = lm.generate(prompt, max_new_tokens=8, temperature=0.8, top_k=5, seed=3)
    assert torch.equal(again, lm.generate(prompt, max_new_tokens=8, temperature=0.8, top_k=5, seed=3))


def test_last_logits_of_padded_rows(lm):
    x = ids(2, 9)
    docs = Docs.from_mask(torch.tensor([[1] * 9, [1] * 6 + [0] * 3]))
    last = lm(x, docs=docs, last=True).logits
    torch.testing.assert_close(last[1], lm(x[1:, :6], last=True).logits[0], rtol=1e-5, atol=1e-6)


def test_training_flops_follow_what_is_trained(lm):
    small = model.build(Config(dim=D, stack=[BlockNode("mlp", {})], name="one"), vocab=V)
    mlp = sum(2.0 * m.weight.numel() for m in small.bank.modules() if isinstance(m, torch.nn.Linear))
    assert small.flops_per_token(16) == 3 * (mlp + 2.0 * V * D)
    small.bank.requires_grad_(False)
    assert small.flops_per_token(16) == 2 * mlp + 3 * 2.0 * V * D
    small.embed.requires_grad_(False)
    assert small.flops_per_token(16) == mlp + 2 * 2.0 * V * D  # the head's norm is trained: input gradients


def test_flops_of_frozen_layers_below_which_nothing_is_trained():
    """An output table of its own is above the stack: it asks for no gradient of what the stack reads."""
    stack = [RepeatNode(1, [BlockNode("mlp", {})], frozen=True)]
    small = model.build(Config(dim=D, stack=stack, embed=EmbedConfig(frozen=True, tied=False)), vocab=V)
    mlp = sum(2.0 * m.weight.numel() for m in small.bank.modules() if isinstance(m, torch.nn.Linear))
    assert small.flops_per_token(16) == mlp + 3 * 2.0 * V * D


def test_rows_start_as_wide_as_init_std_says():
    for std in (0.0, 0.02):
        rows = model.build(Config(dim=D, stack=[BlockNode("mlp", {})], init_std=std), vocab=V).embed.weight
        assert abs(float(rows.detach().std()) - std) < 0.1 * std + 1e-9
