"""The plateau rule on a real run: a text that is soon learnt ends its stage early."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train.conftest import PRETRAIN

ARCH = """
dim: 32
stack: [{attention: {head_dim: 16, group: 1}}, {mlp: {mult: 2, multiple_of: 8}}]
run: {steps: 400, batch: 4, context: 32, precision: fp32, eval_every: 5, eval_tokens: 2048, log_every: 50,
      save_every: 0}
optim: {lr: 1e-2}
grow: {when: plateau, delta: 0.02, tokens_per_param: 0.05}
"""


@pytest.mark.parametrize("when", ["plateau", "step"])
def test_a_stage_ends_at_its_plateau(tmp_path: Path, when: str) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(40):
        (texts / f"{i:02d}.txt").write_text(f"{i:02d} " + "abcdefgh" * 40)
    (tmp_path / "flat.yaml").write_text(ARCH)
    prepare = ["-m", "dataset", "prepare", "--source", "texts", "--tokenizer", "bytes", "--out", "data"]
    steps = [] if when == "plateau" else ["--set", "grow.when=step", "--set", "run.steps=120"]
    train = [str(PRETRAIN), "--arch", "flat.yaml", "--data", "data", "--run", "run", *steps]
    for words in (prepare, train):
        line = [sys.executable, *words]
        done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    last = max(r["step"] for r in records if r["kind"] == "train")
    found = [r for r in records if r.get("event") == "plateau"]
    if when == "step":
        assert last == 120 and not found
    else:
        assert len(found) == 1 and found[0]["step"] < last < 400
