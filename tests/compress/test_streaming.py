"""Continuing an earlier context, and the memory that a compressed one really takes."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
from pathlib import Path

import pytest
import torch

from model.compress import method_names, wrap
from tests.compress.test_contract import asked, make
from tests.compress.tiny import batch, rows_equal, tiny_decoder

# 7. What promises that pieces give what one call gives, and where the pieces may end (tokens). Every other
# method reads a later piece behind what it kept of the earlier ones, which is not what it read in one call.
SPLITS = {"full": 1, "none": 1, "autocompressor": 8, "variable_autocompressor": 8}
PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


def in_pieces(c, ids, mask, cuts, **options):
    state = None
    for begin, end in zip([0, *cuts], [*cuts, ids.shape[1]]):
        state = c.compress(ids[:, begin:end], mask[:, begin:end], state=state, **options)
    return state


@pytest.mark.parametrize("method", SPLITS)
def test_any_promised_split_equals_one_call(model, method):
    c = make(model, method)
    ids, mask = batch([24, 24])
    whole = c.compress(ids, mask, **asked(method))
    text, _ = batch([5, 5], seed=3)
    at = SPLITS[method]
    for cuts in ([8], [16], [8, 16]) if at == 8 else ([1], [5, 6], [3, 11, 20]):
        pieces = in_pieces(c, ids, mask, cuts, **asked(method))
        for row in range(2):
            alone = c.compress(ids[row : row + 1], **asked(method))
            assert rows_equal(pieces, alone, row) < 2e-5, cuts
        assert torch.equal(pieces.next_position, whole.next_position)
        assert torch.equal(pieces.source_length, whole.source_length)
        assert torch.allclose(c.decode(pieces, text)[0], c.decode(whole, text)[0], atol=2e-5)


@pytest.mark.parametrize("method", method_names())
def test_a_state_is_continued(llama, method):
    """Lengths add up, positions go on, the earlier part is still read, and `state` is left as it was."""
    c = make(llama, method)
    ids, mask = batch([20, 20])
    first = c.compress(ids[:, :12], mask[:, :12], **asked(method))
    kept = first.next_position.clone()
    both = c.compress(ids[:, 12:], mask[:, 12:], state=first, **asked(method))
    assert both.source_length.tolist() == [20, 20] and bool((both.next_position >= kept).all())
    assert torch.equal(first.next_position, kept)
    if method == "none":
        return
    text, _ = batch([5, 5], seed=3)
    other, other_mask = batch([12, 12], seed=9)
    changed = c.compress(
        ids[:, 12:], mask[:, 12:], state=c.compress(other, other_mask, **asked(method)), **asked(method)
    )
    assert not torch.allclose(c.decode(both, text)[0], c.decode(changed, text)[0], atol=1e-4)


def resident() -> int:
    """Bytes, after what was freed has gone back to the system (where the C library is glibc)."""
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
@pytest.mark.parametrize("method,options,share", [("mean_pool", {"ratio": 4.0}, 0.25), ("pairs", {}, 0.5)])
def test_a_compressed_cache_takes_less_of_the_process(method, options, share):
    """Measured in the process, beside the full cache: 16 caches of 256 rows each."""
    model = tiny_decoder("llama")
    ids = torch.randint(3, 60, (256, 88))
    grown = {}
    for name, asked_for, more in (("full", {}, {}), (method, options, {"T_w": 2, "r": 0.0, "hidden_dim": 8})):
        c = wrap(model, name, **(more if name == "pairs" else {}))
        c.lower(c.compress(ids, **asked_for))  # what the first call allocates for good
        before = resident()
        held = [c.lower(c.compress(ids, **asked_for)) for _ in range(16)]
        grown[name] = resident() - before
        del held
    assert grown["full"] > 32e6 and grown[method] < (share + 0.15) * grown["full"], grown
