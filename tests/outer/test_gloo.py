"""The collectives give what threads in one process give, to the bit (invariant 4)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from tests.outer.conftest import run, together, values
from tests.outer.gloo_worker import CASES, STEPS, results

ROOT = Path(__file__).resolve().parents[2]


def test_gloo_is_the_same_exchange(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "tests.outer.gloo_worker", "1", "2"]
    words += [str(tmp_path / "store"), str(tmp_path / "one.npz")]
    other = subprocess.Popen(words, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    zero = results(0, 2, tmp_path / "store")
    assert other.wait(600) == 0
    one = np.load(tmp_path / "one.npz")
    for name, options in CASES.items():
        (net, outer), _ = together(2, lambda comm, options=options: run(comm, STEPS, **options))
        want = np.concatenate([t.numpy().ravel() for t in values(net).values()])
        assert zero[name].tobytes() == one[name].tobytes() == want.tobytes(), name
        assert zero[f"{name}_sent"] == outer.traffic.sent
