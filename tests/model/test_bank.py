"""`shared_mlp`: banks of hidden neurons that several sites share in part."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import model
from model.core import Ctx
from model.describe import describe
from model.flops import site_costs
from model.schema import ConfigError

D, V = 16, 31


def bank(visits: int = 3, **params: Any) -> Any:
    torch.manual_seed(0)
    return model.make_block("shared_mlp", D, visits=visits, mult=2.0, **params).double()


def layer(block: Any, x: Tensor, visit: int) -> Tensor:
    return block(x, None, replace(Ctx(), visit=visit)).y


def alone(block: Any, rows: list[int]) -> Any:
    """A plain `mlp` of these neurons of the bank."""
    plain = model.make_block("mlp", D, mult=len(rows) / D).double()
    with torch.no_grad():
        for name in ("gate_proj", "up_proj"):
            getattr(plain, name).weight.copy_(getattr(block, name).weight[rows])
        plain.down_proj.weight.copy_(block.down_proj.weight[:, rows])
    return plain


def own(n: int) -> list[int]:
    """The neurons of layer n: 24 that all share, and 8 of its own."""
    return [*range(24), *range(24 + 8 * n, 32 + 8 * n)]


@pytest.mark.parametrize(
    ("params", "rows"),
    [
        ({"fresh": 0.0}, lambda n: range(32)),
        ({"fresh": 1.0}, lambda n: range(32 * n, 32 * n + 32)),
        ({"fresh": 0.25}, lambda n: own(n)),
        ({"fresh": 0.25, "slide": True}, lambda n: range(8 * n, 8 * n + 32)),
        (
            {"fresh": 0.25, "order": "mirror"},
            lambda n: [*range(24), *range(24 + 8 * (n % 2), 32 + 8 * (n % 2))],
        ),
    ],
)
def test_a_layer_is_the_mlp_of_its_neurons(params: dict[str, Any], rows: Any) -> None:
    block = bank(**params)
    x = torch.randn(2, 5, D, dtype=torch.float64)
    for visit in range(3):
        h = torch.nn.functional.rms_norm(x, (D,), eps=1e-6)
        torch.testing.assert_close(layer(block, x, visit), x + alone(block, list(rows(visit)))(h).y)


@pytest.mark.parametrize("slide", [False, True])
def test_parameters_follow_the_formula(slide: bool) -> None:
    F, r, L = 32, 8, 3
    gains = F if slide else F - r
    want = 3 * D * (F + (L - 1) * r) + L * D + L * gains
    assert sum(p.numel() for p in bank(fresh=0.25, slide=slide).parameters()) == want


def test_a_shared_neurons_gradient_is_the_sum_over_its_layers() -> None:
    block = bank(fresh=0.25)
    x = torch.randn(2, 5, D, dtype=torch.float64)
    sum(layer(block, x, visit).square().sum() for visit in range(3)).backward()
    h = torch.nn.functional.rms_norm(x, (D,), eps=1e-6)
    total = torch.zeros_like(block.up_proj.weight)
    for visit in range(3):
        rows = own(visit)
        plain = alone(block, rows)
        (x + plain(h).y).square().sum().backward()
        total[rows] += plain.up_proj.weight.grad
    torch.testing.assert_close(block.up_proj.weight.grad, total)


def config(*stack: Any) -> dict[str, Any]:
    return {"dim": D, "stack": list(stack)}


FFN = {"shared_mlp": {"fresh": 0.25, "mult": 2.0}}
MIXER = {"swa": {"head_dim": 8, "window": 4}}


def test_sites_of_one_bank_share_one_module() -> None:
    lm = model.build(config({"repeat": 3, "of": [MIXER, FFN]}), vocab=V).eval()
    visits = [(i.module, i.visit) for i in lm.plan.walk() if i.visit is not None]
    assert visits == [("ffn", 0), ("ffn", 1), ("ffn", 2)] and lm.bank["ffn"].block.visits == 3
    x = torch.randint(V, (2, 9))
    first = lm(x[:, :4], state=lm.init_state(2))
    got = torch.cat([first.logits, lm(x[:, 4:], state=first.state).logits], 1)
    torch.testing.assert_close(got, lm(x).logits)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        lm(x[:1])
    assert counter.get_total_flops() == sum(c.forward for c in site_costs(lm, 9))
    shown = describe(model.config.load(config({"repeat": 3, "of": [MIXER, FFN]})), vocab=V)
    assert shown.parameters()["total"] == sum(p.numel() for p in lm.parameters())
    assert [s.shared for s in shown.sites if s.module == "ffn"] == [False, True, True]


def test_a_tied_repeat_visits_the_same_layers_again() -> None:
    tied = {"repeat": 2, "tied": True, "of": [FFN, MIXER, FFN]}
    lm = model.build(config(tied, {"shared_mlp": {"fresh": 0.25, "mult": 2.0}}), vocab=V)
    visits = [i.visit for i in lm.plan.walk() if i.visit is not None]
    assert visits == [0, 1, 0, 1, 2] and lm.bank["ffn"].block.visits == 3


def test_mistakes_are_reported_with_their_line(tmp_path) -> None:
    arch = tmp_path / "bad.yaml"
    arch.write_text(
        "dim: 16\nstack:\n"
        "  - shared_mlp: {fresh: 0.5}\n"
        "  - shared_mlp: {fresh: 0.25}\n"
        "  - {shared_mlp: {bank: other}, as: x}\n"
        "  - shared_mlp: {bank: third, visits: 4}\n"
        "  - {mlp: {}, as: third}\n"
    )
    with pytest.raises(ConfigError) as error:
        model.build(arch, vocab=V)
    lines = str(error.value).splitlines()
    for line, (place, says) in zip(
        lines,
        [
            ("bad.yaml:4:", "the bank 'ffn' was made at"),
            ("bad.yaml:5:", "told by their order"),
            ("bad.yaml:6:", "is counted"),
            ("bad.yaml:7:", "want the name 'third'"),
        ],
        strict=True,
    ):
        assert place in line and says in line, line
    arch.write_text("dim: 16\nstack:\n  - shared_mlp: {fresh: 1.5}\n")
    with pytest.raises(ConfigError, match=r"bad\.yaml:3:.*a share of the neurons"):
        model.build(arch, vocab=V)
