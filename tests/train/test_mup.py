"""Width scaling: at any width, training moves the activations by as much (the coordinate check)."""

from __future__ import annotations

import pytest
import torch

import model
from model.config import load
from model.schema import ConfigError
from train import optim
from train.optim import mup

WIDTHS = (32, 128, 512)


def config_of(dim: int, scaled: bool):
    more = {"optim": {"mup": {"base": 32}}} if scaled else {}
    stack = [{"attention": {"head_dim": 16}}, {"mlp": {"act": "gelu", "mult": 2}}]
    return load({"dim": dim, "stack": stack, "heads": {"next": {"shift": 1}}, **more})


def moved(dim: int, scaled: bool, steps: int = 3) -> tuple[float, float]:
    """(by how much the last block's output, and the logits, move in a few steps of Adam, RMS)."""
    torch.manual_seed(0)
    config = config_of(dim, scaled)
    lm = model.build(config, vocab=64).train()
    rates, decays = mup.scales(lm, config)
    optimizer = optim.build(lm, config.optim, lm.no_decay(), rates, decays)
    optim.set_lr(optimizer, 2e-2)
    tokens = torch.randint(64, (4, 24), generator=torch.Generator().manual_seed(1))

    def look() -> tuple[torch.Tensor, torch.Tensor]:
        found: list[torch.Tensor] = []
        handle = lm.bank[lm.plan.items[-1].module].register_forward_hook(
            lambda m, a, step: found.append(step.y)
        )
        with torch.no_grad():
            logits = lm(tokens).logits
        handle.remove()
        assert logits is not None
        return found[0], logits

    before = look()
    for _ in range(steps):
        lm(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    change = [(b - a).square().mean().sqrt().item() for a, b in zip(before, look())]
    return change[0], change[1]


def test_coordinate_check() -> None:
    """Scaled, sixteen times the width moves activations and logits alike; plainly, they move far more."""
    plain, scaled = ([moved(d, s) for d in WIDTHS] for s in (False, True))
    for i in (0, 1):
        assert plain[-1][i] / plain[0][i] > 2.5, plain
        assert 0.4 < scaled[-1][i] / scaled[0][i] < 1.7, scaled


def test_scales_follow_the_table() -> None:
    config = config_of(128, True)
    lm = model.build(config, vocab=64)
    rates, decays = mup.scales(lm, config)
    matrices = {n for n, p in lm.named_parameters() if p.dim() == 2 and not n.startswith("embed")}
    assert set(rates) == matrices and set(rates.values()) == {0.25} and set(decays.values()) == {4.0}
    assert lm.logit_scale == 0.25
    optimizer = optim.build(lm, config.optim, lm.no_decay(), rates, decays)
    by_name = {n: g for g in optimizer.param_groups for n in g["names"]}
    assert by_name["embed.weight"]["lr_scale"] == 1.0
    for n in matrices:  # lr * decay is what it is at the base
        assert by_name[n]["lr_scale"] * by_name[n]["weight_decay"] == pytest.approx(config.optim.decay)
    assert mup.scales(model.build(config_of(32, True), vocab=64), config_of(32, True)) == ({}, {})


def test_stacked_vectors_learn_as_vectors_do() -> None:
    """Rows that are added to the stream, and gains of norms, one a site: no matrices, though they have two
    dimensions."""
    stack = [{"rwkv6": {"head_dim": 16}}, {"shared_mlp": {"bank": "b", "mult": 2}}]
    heads = {"next": {}, "drafts": {"kind": "mask", "attn": {"head_dim": 16}}}
    config = load({"dim": 64, "stack": stack, "heads": heads, "optim": {"mup": {"base": 32}}})
    lm = model.build(config, vocab=64)
    rates, _ = mup.scales(lm, config)
    linear = {f"{path}.weight" for path, m in lm.named_modules() if isinstance(m, torch.nn.Linear)}
    assert rates and set(rates) <= linear
    assert {"heads.drafts.place", "bank.b.block.norm"} <= {
        n for n, p in lm.named_parameters() if p.dim() == 2
    }


def test_the_base_width_is_the_model_as_it_was() -> None:
    tokens = torch.randint(64, (2, 10))
    logits = []
    for scaled in (False, True):
        torch.manual_seed(0)
        logits.append(model.build(config_of(32, scaled), vocab=64)(tokens).logits)
    assert torch.equal(*logits)


def test_a_base_that_cannot_be_built_is_refused() -> None:
    config = load({"dim": 64, "stack": [{"attention": {"head_dim": 16}}], "optim": {"mup": {"base": 24}}})
    with pytest.raises(ConfigError, match="cannot be built at width 24"):
        mup.scales(model.build(config, vocab=64), config)
