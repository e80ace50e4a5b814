"""Two ranks train a compressor as one does: `make test-slow AREA=compress`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.compress.test_train import command, place  # noqa: F401
from train.compress import main

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


def two_ranks(words: list[str]) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    runner = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    if "--r" in words:  # torchrun takes it for one of its own
        at = words.index("--r")
        words = [*words[:at], "--set", f"r={words[at + 1]}", *words[at + 2 :]]
    line = [*runner, "train/compress.py", *words]
    return subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900, check=False)


@pytest.mark.parametrize("method", ["condense", "pairs"])
def test_compress_two_ranks_equal_one(place, method):  # noqa: F811
    assert main(command(place, method, "one")) == 0
    made = two_ranks(command(place, method, "two"))
    assert made.returncode == 0, made.stderr[-2000:]
    one, two = (load_file(place / n / "last" / "adapter_model.safetensors") for n in ("one", "two"))
    assert set(one) == set(two)
    assert all(torch.allclose(one[k], two[k], atol=2e-6, rtol=1e-4) for k in one)


def test_compress_batch_must_divide(place):  # noqa: F811
    made = two_ranks([*command(place, "condense", "odd"), "--batch_size", "3"])
    assert made.returncode != 0 and "does not divide among 2 ranks" in made.stderr
    assert not (place / "odd" / "best").exists()
