"""Shared weights: orders of visits, one state a visit, gradients summed over visits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import model
from model.schema import ConfigError

V, D = 53, 16
A, B, C = {"swa": {"head_dim": 8, "window": 3}}, "mlp", {"attention": {"head_dim": 8}}
LAYERS = {"repeat": 3, "of": [A, B]}


def build(stack: list[Any], seed: int = 0) -> model.LanguageModel:
    torch.manual_seed(seed)
    return model.build({"dim": D, "stack": stack}, vocab=V).double().eval()


def tied(times: int, order: str, of: list[Any]) -> dict:
    return {"repeat": times, "tied": True, "order": order, "of": of}


def visits(stack: list[Any]) -> str:
    """Bank modules in order of execution, as letters in order of their first visit."""
    modules = list(build(stack).plan.sites().values())
    letters = {name: chr(ord("A") + i) for i, name in enumerate(dict.fromkeys(modules))}
    return "".join(letters[m] for m in modules)


@pytest.mark.parametrize(
    ("stack", "want"),
    [
        ([{"mirror": [A, B, C]}], "ABCCBA"),
        ([B, {"mirror": [A, C]}, B], "ABCCBD"),  # the sandwich: first and last are free
        ([tied(3, "cycle", [A, B])], "ABABAB"),
        ([tied(3, "sequence", [A, B])], "AAABBB"),
        ([tied(3, "cycle_rev", [A, B])], "ABABBA"),
        ([tied(1, "cycle_rev", [A, B])], "AB"),
        ([tied(2, "sequence", [LAYERS])], "ABABCDCDEFEF"),  # a layer is a round of the inner repeat
        ([{"mirror": [LAYERS]}], "ABCDEFEFCDAB"),
        ([{"mirror": [tied(2, "cycle", [A, B]), C]}], "ABABCCABAB"),  # a tied repeat is one entry
        ([{"mirror": [A, {"mirror": [B, C]}]}], "ABCCBBCCBA"),
        ([{"mirror": [{"mlp": {}, "as": "m"}, A]}, {"use": "m"}], "ABBAA"),
    ],
    ids=str,
)
def test_order_of_visits(stack, want):
    assert visits(stack) == want


@pytest.mark.parametrize("stack", [[{"mirror": [A, B, C]}], [tied(2, "sequence", [A, B, C])]], ids=str)
def test_gradients_are_summed_over_visits(stack):
    """A model of the same layers, untied, with the same weights: equal logits, gradients that add up."""
    shared = build(stack)
    order = list(shared.plan.sites().values())
    kinds = {"swa": A, "mlp": B, "attention": C}
    free = build([kinds[name.split("_", 1)[1]] for name in order], seed=1)
    copies: dict[str, list[str]] = {}
    for mine, name in zip(free.plan.sites().values(), order, strict=True):
        free.bank[mine].load_state_dict(shared.bank[name].state_dict())
        copies.setdefault(name, []).append(mine)
    free.embed.load_state_dict(shared.embed.state_dict())
    x = torch.randint(V, (2, 11), generator=torch.Generator().manual_seed(0))
    for lm in (shared, free):
        (lm(x).logits * torch.linspace(-1, 1, 22 * V).view(2, 11, V)).sum().backward()
    torch.testing.assert_close(shared(x).logits, free(x).logits, rtol=0, atol=0)
    for name, mine in copies.items():
        for n, p in shared.bank[name].named_parameters():
            total = sum(dict(free.bank[m].named_parameters())[n].grad for m in mine)
            # logits pass through fp32, and with them what comes back: the sums are of equal numbers
            torch.testing.assert_close(p.grad, total, rtol=1e-12, atol=1e-12)


def test_every_visit_has_a_state_of_its_own():
    lm = build([{"mirror": [A, C]}])
    state = lm.init_state(2, dtype=torch.float64)
    assert len([s for s in state.values() if s is not None]) == 4
    x = torch.randint(V, (2, 13), generator=torch.Generator().manual_seed(0))
    want, got, at = lm(x).logits, [], 0
    for n in (4, 1, 7, 1):
        out = lm(x[:, at : at + n], state=state)
        got.append(out.logits)
        state, at = out.state, at + n
    torch.testing.assert_close(torch.cat(got, 1), want, rtol=1e-6, atol=1e-6)


def test_weights_are_counted_once():
    assert sum(p.numel() for p in build([{"mirror": [A, B]}]).bank.parameters()) == sum(
        p.numel() for p in build([A, B]).bank.parameters()
    )


def test_mistakes():
    with pytest.raises(ConfigError, match="order of shared weights: add `tied: true`"):
        build([{"repeat": 2, "order": "sequence", "of": [A]}])
    with pytest.raises(ConfigError, match="nothing to mirror"):
        build([{"mirror": []}])
    with pytest.raises(ConfigError, match="want one of 'cycle', 'sequence', 'cycle_rev'"):
        build([tied(2, "cyclic", [A])])


@pytest.mark.parametrize("name", ["a.b", "keys", ""])
def test_names_that_no_module_can_have_are_refused(name):
    for stack in ([{"mlp": {}, "as": name}], [{"shared_mlp": {"bank": name}}]):
        with pytest.raises(ConfigError, match=r"stack\[0\].*cannot name a part of the model"):
            build(stack)
    with pytest.raises(ConfigError, match=r"heads: .*cannot name a part of the model"):
        model.build({"dim": D, "vocab": V, "stack": ["mlp"], "heads": {name: {"shift": 1}}})
