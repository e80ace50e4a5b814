"""Every arch of model/archs/, at a small width: generating is the same forward pass, cut into steps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import model
from model.core import Docs
from model.generate import pick

from .small import NAMES, VOCAB, small


def ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def build(arch: str) -> model.LanguageModel:
    torch.manual_seed(0)
    return model.build(small(arch)).double().eval()


@torch.no_grad()
@pytest.mark.parametrize("arch", NAMES)
def test_steps_equal_one_pass_and_ragged_prompts_equal_lone_ones(arch):
    lm = build(arch)
    x, T = ids(2, 30), 30
    want = lm(x).logits
    state, at, got = lm.init_state(2, dtype=torch.float64), 0, []
    for n in (11, *(1,) * (T - 11)):
        out = lm(x[:, at : at + n], state=state)
        got.append(out.logits)
        state, at = out.state, at + n
    torch.testing.assert_close(torch.cat(got, 1), want, rtol=1e-5, atol=1e-5)

    mask = torch.ones(2, 12)
    mask[0, :7] = 0  # padded on the left
    out = lm(x[:, :12], state=lm.init_state(2, dtype=torch.float64), docs=Docs.from_mask(mask), last=True)
    step = lm(x[:, 12:13], state=out.state).logits
    alone = lm(x[:1, 7:13]).logits
    torch.testing.assert_close(out.logits[:1], alone[:, -2:-1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(step, torch.stack([alone[0, -1:], want[1, 12:13]]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("temperature", [float("nan"), float("inf"), -1.0])
def test_a_temperature_that_says_nothing_is_refused(temperature):
    with pytest.raises(ValueError, match="temperature must be >= 0 and finite"):
        pick(torch.zeros(1, 3), temperature)


def test_a_mask_of_another_shape_is_refused_even_if_it_hides_nothing():
    lm = model.build({"dim": 16, "vocab": 9, "stack": ["mlp"]})
    with pytest.raises(ValueError, match="mask must be"):
        lm.generate(torch.zeros(1, 4, dtype=torch.int64), 1, mask=torch.ones(1, 3))
