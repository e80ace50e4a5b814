"""`steer`: a feed-forward layer that chooses the keys of the attention after it, or gates its heads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import model
from model.core import state_bytes

D = 32
SWA = {"head_dim": 8, "window": 3}
MLP = {"mult": 2.0}


def steer(**params: Any) -> Any:
    torch.manual_seed(0)
    return model.make_block("steer", D, mlp=MLP, swa=SWA, **params).double().eval()


def plain(block: Any, x: Tensor) -> Tensor:
    x = x + block.mlp(block.norms[0](x)).y
    return x + block.swa(block.norms[1](x)).y


def test_keeping_every_key_or_opening_every_gate_is_the_plain_pair() -> None:
    x = torch.randn(2, 11, D, dtype=torch.float64)
    keys = steer(keep=1.0)
    torch.testing.assert_close(keys(x).y, plain(keys, x))
    gates = steer(how="gates")
    with torch.no_grad():
        gates.neurons.bias.fill_(torch.inf)
    torch.testing.assert_close(gates(x).y, plain(gates, x))


def test_the_window_counts_kept_keys_and_a_dropped_one_is_never_read() -> None:
    block = steer(keep=0.5)
    x = torch.randn(1, 16, D, dtype=torch.float64)
    kept = (block.select(x)[0] > block.select.threshold).tolist()
    kept[0] = True
    leaf = x.clone().requires_grad_()
    y = block(leaf).y[0]
    assert 4 < sum(kept) < 12
    for t in range(16):
        (g,) = torch.autograd.grad(y[t].sum(), leaf, retain_graph=True)
        read = set(g[0].any(-1).nonzero().flatten().tolist())
        window = [j for j in range(t + 1) if kept[j]][-3:]
        assert read == {t, *window}  # t itself through the residual


def test_the_state_does_not_grow_and_the_share_is_reported() -> None:
    block = steer(keep=0.5)
    x = torch.randn(2, 64, D, dtype=torch.float64)
    start = block.init_state(2, x)
    size = state_bytes(start)
    step = block(x, start)
    assert state_bytes(step.state) == size
    assert 0.2 < float(step.aux.stats["kept"]) < 0.8


@pytest.mark.parametrize(
    ("swa", "says"),
    [
        ({"position": "alibi"}, "position must be"),
        ({"conv": 3}, "its conv 0"),
        ({"gate": True}, "no place here"),
    ],
)
def test_what_does_not_go_with_it_is_refused(swa: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        model.make_block("steer", D, swa={**SWA, **swa})


def test_a_model_steers_from_yaml(tmp_path) -> None:
    arch = tmp_path / "a.yaml"
    arch.write_text(
        "dim: 32\nvocab: 20\ndefaults: {swa: {head_dim: 8, window: 3}}\n"
        "stack: [{repeat: 2, of: [{steer: {keep: 0.5}}, {steer: {how: gates}}]}]\n"
    )
    config = model.config.load(arch)
    assert config.stack[0].of[0].params["swa"] == {"head_dim": 8, "window": 3}
    lm = model.build(config).double().eval()
    x = torch.randint(20, (2, 12))
    first = lm(x[:, :5], state=lm.init_state(2, dtype=torch.float64))
    got = torch.cat([first.logits, lm(x[:, 5:], state=first.state).logits], 1)
    torch.testing.assert_close(got, lm(x).logits, rtol=1e-6, atol=1e-6)
