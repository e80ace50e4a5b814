"""100,000 tokens streamed through every arch whose state has a fixed size: memory stays flat.

make test-slow AREA=stream
"""

from __future__ import annotations

import gc
import resource

import pytest
import torch

import model
from model import config
from model.core import state_bytes
from model.describe import describe

from .small import NAMES, VOCAB, small

TOKENS, CHUNK, STEPS = 100_000, 1000, 100


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("arch", NAMES)
def test_stream_memory(arch):
    """A fixed state keeps its bytes and the process its size; others grow at the rate that `show` prints."""
    told = describe(config.load(small(arch)))
    rate = told.total("state_per_token")
    torch.manual_seed(0)
    lm = model.build(small(arch)).eval()
    state, seen, size, peak = lm.init_state(1), 0, {}, 0
    generator = torch.Generator().manual_seed(0)
    total = TOKENS if rate == 0 else 8 * CHUNK
    sizes = [CHUNK] * (total // CHUNK - 1) + [CHUNK - STEPS] + [1] * STEPS
    for i, n in enumerate(sizes):
        out = lm(torch.randint(VOCAB, (1, n), generator=generator), state=state, last=True)
        state, seen = out.state, seen + n
        size[seen] = state_bytes(state)
        if i == len(sizes) // 4:
            gc.collect()
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert seen == total and bool(torch.isfinite(out.logits).all())
    if rate == 0:
        assert set(size.values()) == {told.total("state_fixed")}
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 16 * 1024  # KiB
    else:  # a cache that doubles holds up to twice what it needs; untrained, a chunker may keep every token
        most = 2.1 * told.state_bytes(total) * max(1.0, *(getattr(m, "merge", 1.0) for m in lm.bank.values()))
        assert told.state_bytes(total) * 0.7 <= size[total] <= most + 4096
