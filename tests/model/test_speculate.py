"""Speculative decoding gives the text of plain decoding: all heads, recurrent trunks, ragged rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import model
from model.speculate import Tally, speculate

from .test_heads import KINDS

V, D = 23, 32
MAMBA = {"mamba2": {"state": 16, "head_dim": 16}}
STACKS: dict[str, list[Any]] = {
    "samba": [MAMBA, {"swa": {"head_dim": 16, "window": 5}}, {"mlp": {"act": "rwkv"}}],
    "attention": [{"attention": {"head_dim": 16}}, "mlp"],
    "gla": [{"gla": {"head_dim": 16}}, "mlp", {"gated_deltanet": {"head_dim": 16}}],
    "rwkv6": [{"rwkv6": {"head_dim": 16}}, "mlp"],
    "yoco": [
        {
            "yoco": {
                "self": [{"swa": {"head_dim": 16, "window": 4}}, "mlp"],
                "memory": {"head_dim": 16},
                "cross": ["xattn", "mlp"],
            }
        }
    ],
}


def build(kind: str, stack: str = "samba", **heads: Any) -> model.LanguageModel:
    torch.manual_seed(0)
    heads = heads or {"next": {"shift": 1}}
    if kind == "parallel":
        heads = {}
    config: dict[str, Any] = {"dim": D, "stack": STACKS[stack], "heads": {**heads, "mtp": KINDS[kind]}}
    config["embed"] = {"tied": False}  # tied and untrained, a model repeats its last token
    lm = model.build(config, vocab=V).double().eval()
    torch.nn.init.normal_(lm.embed.weight)
    torch.nn.init.normal_(lm.embed.unembed)
    return lm


def ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


def fp64_states(lm: model.LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches in fp64 too: ties apart, nothing may depend on how many tokens a pass has."""
    plain = lm.init_state
    monkeypatch.setattr(lm, "init_state", lambda batch, **rest: plain(batch, dtype=torch.float64, **rest))


@pytest.mark.parametrize(
    "kind, stack",
    [*((kind, "samba") for kind in KINDS), *(("chain", stack) for stack in STACKS if stack != "samba")],
)
def test_the_text_is_that_of_plain_greedy_decoding(kind, stack, monkeypatch):
    lm = build(kind, stack)
    fp64_states(lm, monkeypatch)
    prompt = ids(3, 6)
    want = lm.generate(prompt, max_new_tokens=16)
    assert len(want[:, 6:].unique()) > 2  # no test of a constant
    for n in (1, 3):
        assert torch.equal(lm.generate(prompt, max_new_tokens=16, speculate=n), want), n
    assert torch.equal(lm.generate(prompt[:1], max_new_tokens=16, speculate=2), want[:1])


@pytest.mark.parametrize("kind", KINDS)
def test_guesses_that_come_true_are_kept(kind, monkeypatch):
    """A head that guesses what plain decoding says, sometimes: the rest must be taken back exactly."""
    lm = build(kind)
    fp64_states(lm, monkeypatch)
    prompt = ids(2, 6)
    want = lm.generate(prompt, max_new_tokens=40)
    done, generator = torch.zeros(2, dtype=torch.int64), torch.Generator().manual_seed(0)

    def oracle(name: str, hidden: Tensor, state: Any, new: Tensor, n: int) -> Tensor:
        out = torch.empty(2, n, dtype=torch.int64)
        for row in range(2):
            out[row] = torch.cat([want[row], ids(n)])[6 + int(done[row]) + 1 :][:n]
        wrong = torch.rand(2, n, generator=generator) < 0.3
        return torch.where(wrong, (out + 1) % V, out)

    monkeypatch.setattr(lm, "draft", oracle)
    tally = Tally()
    rows: list[list[int]] = [[], []]
    with torch.no_grad():
        for parts in speculate(lm, prompt, None, 3, lambda logits: logits.argmax(-1), tally):
            for row, part in enumerate(parts):
                rows[row] += part.tolist()
                done[row] = len(rows[row])
            if min(map(len, rows)) >= 34:
                break
    for row in range(2):
        length = min(len(rows[row]), 40)
        assert rows[row][:length] == want[row, 6 : 6 + length].tolist()
    assert 0.3 < tally.rate < 0.9 and tally.tokens == sum(map(len, rows))


@pytest.mark.parametrize("guesses", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_ragged_prompts_are_continued_as_if_alone(kind, guesses, monkeypatch):
    lm = build(kind)
    fp64_states(lm, monkeypatch)
    lengths = (3, 9, 1)
    alone = [lm.generate(ids(1, n, seed=n), max_new_tokens=12)[0, n:] for n in lengths]
    for side in ("left", "right"):
        rows, mask = torch.zeros(3, 9, dtype=torch.int64), torch.zeros(3, 9)
        for row, n in enumerate(lengths):
            place = slice(9 - n, 9) if side == "left" else slice(0, n)
            rows[row, place], mask[row, place] = ids(1, n, seed=n)[0], 1
        got = lm.generate(rows, max_new_tokens=12, mask=mask, speculate=guesses)
        assert torch.equal(got[:, 9:], torch.stack(alone))


def test_sampling_draws_what_plain_sampling_draws(monkeypatch):
    """One row: the same draws in the same order, so the same text."""
    lm = build("parallel")
    fp64_states(lm, monkeypatch)
    options: dict[str, Any] = {"max_new_tokens": 40, "temperature": 0.5, "top_k": 4, "seed": 3}
    assert torch.equal(lm.generate(ids(1, 5), speculate=3, **options), lm.generate(ids(1, 5), **options))


def test_stop_and_tally():
    lm = build("parallel").float()
    plain = lm.generate(ids(1, 5), max_new_tokens=20)
    stop = int(plain[0, 12])
    tally = Tally()
    got = lm.generate(ids(1, 5), max_new_tokens=20, stop=stop, speculate=3, tally=tally)
    assert torch.equal(got, lm.generate(ids(1, 5), max_new_tokens=20, stop=stop))
    assert tally.drafted % 3 == 0 and tally.passes >= tally.drafted // 3 and 0 <= tally.rate <= 1


def test_what_cannot_be_drafted_is_refused():
    with pytest.raises(ValueError, match="draft at most 3 tokens"):
        build("chain").generate(ids(1, 4), speculate=4)
    plain = model.build({"dim": D, "stack": ["mlp"]}, vocab=V)
    with pytest.raises(ValueError, match="no head of this model predicts several tokens"):
        plain.generate(ids(1, 4), speculate=1)
    with pytest.raises(ValueError, match="a token in every row"):
        plain.generate(ids(2, 4), mask=torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]]))


def test_heads_with_attention_of_their_own_keep_the_prefill_whole():
    """A yoco prefill skips its cross half only where no head needs the other tokens."""
    assert not build("chain", "yoco").plan.items[-1].skip
    assert build("parallel", "yoco").plan.items[-1].skip
