"""Codebooks and thresholds are shared by the ranks of one worker, and by nobody else."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.train.conftest import ROOT
from tests.train.rank_tables import one_process, results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    """What both ranks of a gloo group found."""
    folder = tmp_path_factory.mktemp("ranks")
    words = [sys.executable, "-m", "tests.train.rank_tables", "1", str(folder / "store"), str(folder / "one")]
    other = subprocess.Popen(words, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        zero = results(0, folder / "store")
        assert other.wait(600) == 0
    finally:
        other.kill()
    return [zero, load_file(folder / "one")]


def of(found: dict[str, Tensor], workers: int) -> dict[str, Tensor]:
    return {n.removeprefix(f"{workers}/"): t for n, t in found.items() if n.startswith(f"{workers}/")}


def test_two_workers_of_one_rank_keep_their_own(ranks) -> None:
    """To the bit what each would have found without the other."""
    for rank in (0, 1):
        alone, found = one_process([rank]), of(ranks[rank], 2)
        assert found.keys() == alone.keys() and len(found) > 8
        assert all(torch.equal(found[n], alone[n]) for n in alone)
    a, b = of(ranks[0], 2), of(ranks[1], 2)
    moved = [n for n in a if n.endswith(("table", "threshold"))]
    assert len(moved) > 3 and all(not torch.equal(a[n], b[n]) for n in moved)


def test_one_worker_of_two_ranks_shares(ranks) -> None:
    """Two ranks with half the batch each move tables as one process does with all of it."""
    whole, a, b = one_process([0, 1]), of(ranks[0], 1), of(ranks[1], 1)
    for n, t in whole.items():
        assert torch.equal(a[n], b[n]), f"{n} differs between ranks"
        torch.testing.assert_close(a[n], t, msg=n)
