"""Every arch at a small width: tokens by steps are one full pass, and recurrent states stay small."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import torch

import model
from model import config as configs
from model.core import state_bytes
from model.describe import describe
from model.lm import LanguageModel
from tests.model.test_archs_slow import NAMES, small

V = 260
STREAMED, PIECE = 100_000, 400
RECURRENT = ("samba", "mamba2", "gla", "deltanet_hybrid")


def build(name: str) -> LanguageModel:
    """The arch 192 wide over bytes, one round of every `repeat`."""
    torch.manual_seed(0)
    config = configs.load({**configs.dump(small(configs.load(name))), "name": name})
    lm = model.build(config, vocab=V).eval()
    lm.advance(10_000, 1.0)  # shells that are faded in count fully
    return lm


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_tokens_by_steps_are_one_full_pass(name: str) -> None:
    lm = build(name).double()  # a code at a rounding edge must not flip
    x = torch.randint(256, (2, 16), generator=torch.Generator().manual_seed(1))
    want = lm(x).logits
    state, got, at = lm.init_state(2, dtype=torch.float64), [], 0
    for n in (6, 1, 1, 1, 1, 6):
        out = lm(x[:, at : at + n], state=state)
        got.append(out.logits)
        state, at = out.state, at + n
    torch.testing.assert_close(torch.cat(got, 1), want, rtol=1e-4, atol=1e-5)
    made = lm.generate(x[:, :9], max_new_tokens=3)
    full = lm(made[:, :-1]).logits.argmax(-1)
    assert torch.equal(made[:, 9:], full[:, 8:])


def resident() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
@pytest.mark.parametrize("name", RECURRENT)
@torch.no_grad()
def test_archs_memory_is_flat_over_100k_tokens(name: str) -> None:
    """State bytes do not change, and the process does not grow, between 10k and 100k streamed tokens."""
    assert describe(configs.load(name), vocab=V).total("state_per_token") == 0
    lm = build(name)
    state = lm.init_state(1)
    generator = torch.Generator().manual_seed(1)
    held: dict[int, tuple[int, int]] = {}
    for seen in range(PIECE, STREAMED + 1, PIECE):
        state = lm(torch.randint(256, (1, PIECE), generator=generator), state=state, last=True).state
        if seen in (STREAMED // 10, STREAMED):
            held[seen] = state_bytes(state), resident()
    (early_state, early), (late_state, late) = held.values()
    assert late_state == early_state
    assert late - early < 2**24
