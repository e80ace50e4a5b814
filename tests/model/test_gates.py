"""Gates per head and per group of hidden channels."""

from __future__ import annotations

import math

import pytest
import torch

import model
from model.bank import residual_outputs
from model.blocks._gate import HeadGate

HEADS = {"heads": 2}
BLOCKS = {
    "attention": {"head_dim": 8},
    "swa": {"head_dim": 8, "window": 4},
    "mamba2": {"head_dim": 8, "state": 3},
    "gla": HEADS,
    "retention": HEADS,
    "deltanet": HEADS,
    "gated_deltanet": HEADS,
    "kda": HEADS,
    "rwkv6": HEADS,
    "mlp": {"mult": 2},
}


def pair(name: str):
    """The same weights with a gate and without, an input, the gate and the output matrix."""
    torch.manual_seed(0)
    gate = 4 if name == "mlp" else True
    gated = model.make_block(name, 16, **BLOCKS[name], gate=gate).double()
    plain = model.make_block(name, 16, **BLOCKS[name]).double()
    own = {k: v for k, v in gated.state_dict().items() if not k.startswith("head_gate")}
    plain.load_state_dict(own, strict=True)
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    return gated, plain, x, gated.head_gate, residual_outputs(plain)[0]


@pytest.mark.parametrize("name", BLOCKS)
def test_a_gate_of_one_is_no_gate_and_of_zero_drops_its_head(name: str) -> None:
    gated, plain, x, gate, output = pair(name)
    assert isinstance(gate, HeadGate)
    with torch.no_grad():
        gate.bias.fill_(math.inf)
        torch.testing.assert_close(gated(x).y, plain(x).y)
        gate.bias[1] = -math.inf
        width = output.in_features // gate.out_features
        output.weight[:, width : 2 * width] = 0
        torch.testing.assert_close(gated(x).y, plain(x).y)


def test_gates_start_open_and_their_means_are_reported() -> None:
    gated, _, x, gate, _ = pair("swa")
    stats = gated(x).aux.stats
    assert abs(float(stats["gate"]) - 1 / (1 + math.exp(-4))) < 1e-6
    with torch.no_grad():
        gate.bias.copy_(torch.tensor([0.0, math.inf]))
    stats = gated(x).aux.stats
    assert abs(float(stats["gate"]) - 0.75) < 1e-6 and abs(float(stats["gate_low"]) - 0.5) < 1e-6
    ctx = model.Ctx.masked(torch.tensor([[1] * 7, [1] * 3 + [0] * 4]))
    with torch.no_grad():
        gate.weight.normal_()
    noisy = torch.where(ctx.docs.tokens[..., None], x, 100.0)
    want = gated(x, None, ctx).aux.stats["gate"]
    torch.testing.assert_close(gated(noisy, None, ctx).aux.stats["gate"], want)  # padding does not count


def test_groups_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="gate=3 groups do not divide the hidden width 32"):
        model.make_block("mlp", 16, mult=2, gate=3)
