"""The compression study at toy size: it runs, goes on where it stopped, and its decoder is a Llama."""

from __future__ import annotations

import json
import random

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import model as lab
from dataset.plan import Request
from dataset.prepare import prepare
from experiments.compression import report
from experiments.compression.arms import MATCHED, VARIABLE, Arm, fitted
from experiments.compression.decoder import ARCH, as_llama
from experiments.compression.study import main
from tests.compress.tiny import VOCAB, tiny_decoder

ARMS = ["condense", VARIABLE, MATCHED, "pairs", "clusters", "last@4", "random_eviction@4", "oracle@4"]


def test_our_stack_is_a_llama():
    lm = lab.build(
        ARCH, {"dim": 48, "defaults.attention.head_dim": 8, "defaults.mlp.multiple_of": 8}, vocab=70
    )
    lm.eval()
    with torch.no_grad():
        for p in lm.parameters():
            p.add_(0.1 * torch.randn_like(p))
    ids = torch.randint(0, 70, (2, 19))
    with torch.no_grad():
        ours, theirs = lm(ids).logits, as_llama(lm)(input_ids=ids).logits
    ours = ours["next"] if isinstance(ours, dict) else ours
    assert (ours - theirs).abs().max() < 1e-4


def test_another_stack_is_refused():
    lm = lab.build(ARCH, {"dim": 48, "stack": ["mlp", "mlp"], "defaults": {}}, vocab=70)
    with pytest.raises(ValueError, match="attention"):
        as_llama(lm)


@pytest.fixture
def place(tmp_path):
    """A toy decoder with a tokenizer of letters, and a dataset of words in it."""
    folder = tmp_path / "toy"
    tiny_decoder("llama", max_position_embeddings=1024).save_pretrained(folder)
    vocab = {chr(65 + i): i for i in range(VOCAB - 1)} | {"</s>": VOCAB - 1}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="A"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    made.save_pretrained(folder)
    rng = random.Random(0)
    words = ["CAT", "dog", "Zebra", "yak"]
    lines = [json.dumps({"text": "".join(rng.choice(words) for _ in range(40))}) for _ in range(60)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines) + "\n")
    request = Request(sources=(str(tmp_path / "text.jsonl"),), tokenizer=str(folder), heldout=0.2)
    prepare(request, tmp_path / "data")
    return tmp_path


def test_it_goes_on_where_it_stopped(place, capsys):
    common = [
        *("--decoder", str(place / "toy"), "--data", str(place / "data"), "--out", str(place / "out")),
        *("--steps", "2", "--batch", "2", "--examples", "4", "--context", "24", "--target", "8"),
    ]
    assert main([*common, "--arms", "last@4", MATCHED], place) == 0
    assert "left out" in capsys.readouterr().out  # it needs the variable one's length
    first = place / "out" / "toy" / "results" / "last@4_0.json"
    stamp = first.stat().st_mtime_ns
    assert main([*common, "--arms", *ARMS], place) == 0
    assert first.stat().st_mtime_ns == stamp
    found = report.load(place / "out" / "toy" / "results")
    assert set(found) == set(ARMS)
    for name, (r,) in found.items():
        assert r["tokens"] == 4 * 7 and 0 <= r["answers"]["f1"] <= 1
        assert r["slots"] <= 24 and r["kv_bytes"] <= r["full_kv_bytes"], name
    assert found["last@4"][0]["slots"] == found["condense"][0]["slots"] == 6
    assert (place / "toy.md").read_text().count("\n| ") > 2 * len(ARMS)
    assert (place / "toy.png").stat().st_size > 1000 and (place / "toy.json").exists()
    with pytest.raises(SystemExit, match="no arm"):
        main([*common, "--arms", "lost"], place)
    with pytest.raises(SystemExit, match="made with another target, examples"):
        main([*common, "--examples", "5", "--target", "6", "--arms", "last@4"], place)


def test_the_matched_arm_takes_the_variable_ones_length():
    arm = fitted(Arm(MATCHED, "autocompressor", {"segment_length": 64}), {"slots": 11.0}, 128)
    assert arm.options["summary_length"] == 6
    assert fitted(Arm("last@4", "last"), None, 128) == Arm("last@4", "last")
