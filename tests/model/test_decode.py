"""Fast decoding gives the same text; 8-bit weights give nearly the same logits."""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch
from torch._dynamo.utils import counters

import model
from model.decode import Decoder, to_int8
from model.lm import LanguageModel

V = 67
ARCHS = {
    "samba": [
        {"mamba2": {"state": 8, "head_dim": 16}},
        {"mlp": {"mult": 2}},
        {"swa": {"head_dim": 16, "window": 6}},
        "mlp",
    ],
    "llama": [{"attention": {"head_dim": 16, "group": 2}}, "mlp"],
}


def build(name: str) -> LanguageModel:
    torch.manual_seed(0)
    return model.build({"dim": 32, "stack": ARCHS[name]}, vocab=V).eval()


@pytest.mark.parametrize("name", ARCHS)
def test_one_graph_serves_every_step(name: str) -> None:
    """Traced, not compiled to code: no graph break, one graph for all steps, the same tokens."""
    lm = build(name)
    prompt = torch.randint(V, (2, 9), generator=torch.Generator().manual_seed(1))
    torch._dynamo.reset()
    counters.clear()
    decoder = Decoder(lm, capacity=32, compiler="eager")
    got = decoder.generate(prompt, max_new_tokens=12)
    assert torch.equal(got, lm.generate(prompt, max_new_tokens=12))
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == 1
    assert torch.equal(decoder.generate(prompt, max_new_tokens=12), got)


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
def test_int8_weights_are_close() -> None:
    lm = build("samba")
    small = to_int8(copy.deepcopy(lm))
    x = torch.randint(V, (2, 20), generator=torch.Generator().manual_seed(1))
    want, got = lm(x).logits, small(x).logits
    assert 0 < (got - want).norm() / want.norm() < 0.03
    assert small.generate(x, max_new_tokens=4).shape == (2, 24)


def test_int8_without_torchao_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"latent-lab\[int8\]"):
        to_int8(build("llama"))


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
@pytest.mark.parametrize("arch", [{"stack": ["rwkv6"]}, {"stack": ["mlp"], "optim": {"mup": {"base": 8}}}])
def test_int8_weights_of_what_reads_them_in_another_way(arch: dict) -> None:
    """A Linear whose block reads the weight itself, and a table that muP scales."""
    torch.manual_seed(0)
    lm = model.build({"dim": 32, **arch}, vocab=V).eval()
    x = torch.randint(V, (2, 20), generator=torch.Generator().manual_seed(1))
    want, got = lm(x).logits, to_int8(lm)(x).logits
    assert 0 < (got - want).norm() / want.norm() < 0.03


def test_a_compiled_step_does_not_speculate() -> None:
    with pytest.raises(ValueError, match="speculate"):
        Decoder(build("llama"), 32).generate(torch.zeros(1, 3, dtype=torch.int64), 4, speculate=1)
