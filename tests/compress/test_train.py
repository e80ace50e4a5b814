"""The command line: it trains, resumes bit for bit, keeps the best, and says what is wrong in one line."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from model.compress import load_compressor, load_tokenizer
from model.compress.evaluate import losses_of
from tests.compress.tiny import VOCAB, tiny_decoder
from train.compress import main
from train.compress_data import Reading, collate, read

SMALL = {
    "condense": ["--num_condense_tokens", "4", "--lora_rank", "2"],
    "autocompressor": ["--summary_length", "2", "--lora_rank", "2", "--objective", "document"],
    "variable_autocompressor": [
        "--compression_max_len",
        "2",
        "--objective",
        "document",
        "--randomize_substeps",
    ],
    "pairs": ["--T_w", "4", "--r", "0.2", "--hidden_dim", "8"],
    "clusters": [
        "--similarity_threshold",
        "0.2",
        "--use_residuals",
        "--adaptive_threshold",
        "--contrastive_weight",
        "0.1",
        "--freeze_base",
    ],
}


def letters(folder, vocab):
    """Save a tokenizer of single characters."""
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="A"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


@pytest.fixture
def place(tmp_path):
    """A decoder folder with a tokenizer of letters, and a text."""
    tiny_decoder("gpt2").save_pretrained(tmp_path / "decoder")
    letters(tmp_path / "decoder", {chr(65 + i): i for i in range(VOCAB)})
    g = torch.Generator().manual_seed(0)
    text = "".join(chr(65 + int(i)) for i in torch.randint(0, VOCAB, (900,), generator=g))
    (tmp_path / "text.txt").write_text(text)
    return tmp_path


def command(place, method, run, *more):
    return [
        "--method",
        method,
        "--model_name",
        str(place / "decoder"),
        "--data_path",
        str(place / "text.txt"),
        "--output_dir",
        str(place / run),
        *[
            "--context",
            "16",
            "--target",
            "6",
            "--batch_size",
            "4",
            "--micro",
            "2",
            "--steps",
            "4",
            "--eval_steps",
            "2",
            "--save_steps",
            "2",
        ],
        *["--eval_examples", "4", "--generate_tokens", "3"],
        *SMALL[method],
        *more,
    ]


@pytest.mark.parametrize("method", SMALL)
def test_trains_and_keeps_the_best(place, method):
    assert main(command(place, method, "a")) == 0
    records = [json.loads(line) for line in (place / "a" / "metrics.jsonl").read_text().splitlines()]
    kinds = [r["kind"] for r in records]
    assert kinds.count("train") == 4 and kinds.count("eval") == 3 and kinds.count("sample") == 3
    best, last = (load_compressor(place / "a" / n, tiny_decoder("gpt2")) for n in ("best", "last"))
    assert best.registered_name == method
    tokenizer = load_tokenizer(place / "decoder")
    _, held, _ = read(str(place / "text.txt"), tokenizer, Reading(context=16, target=6))
    # The threshold of the last clusters has moved since they were scored.
    losses = [r["loss"] for r in records if r["kind"] == "eval"]
    for c, want in ((best, min(losses)), *(((last, losses[-1]),) if method != "clusters" else ())):
        found, count = losses_of(c, collate(held[:4]), ("compressed",))
        assert float(found["compressed"].sum() / count.sum()) == pytest.approx(want, abs=1e-4)


def test_the_parachute_opens_after_the_best_is_kept(place, monkeypatch):
    """RUN/best has the threshold it was scored with, whatever the parachute makes of that score."""
    import train.compress_loop as loop

    losses, moved = iter(range(9, 0, -1)), iter((0.31, 0.32))

    def better_every_time(c, batch, variants):
        return {v: torch.tensor([float(next(losses))] * 2) for v in variants}, torch.tensor([1, 1])

    monkeypatch.setattr(loop, "losses_of", better_every_time)
    monkeypatch.setattr(loop.Clusters, "parachute", lambda c, ratio: _thresholds(c).fill_(next(moved)).item())
    assert main([*command(place, "clusters", "a"), "--eval_examples", "2"]) == 0
    best = load_compressor(place / "a" / "best", tiny_decoder("gpt2"))
    assert _thresholds(best).item() == pytest.approx(0.31)  # 0.32 is what the last score made of it


def _thresholds(c):
    (tau,) = (b for name, b in c.named_buffers() if name.endswith("tau"))
    return tau


def test_resumes_bit_for_bit(place):
    """Stopped after step 2 and gone on with: the same weights as in one go."""
    whole = command(place, "condense", "whole")
    assert main(whole) == 0
    part = command(place, "condense", "part")
    import train.compress_loop as loop

    step, seen = loop.Fit.train_step, []

    def interrupted(self):
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(1)
        return step(self)

    loop.Fit.train_step = interrupted
    try:
        with pytest.raises(KeyboardInterrupt):
            main(part)
    finally:
        loop.Fit.train_step = step
    assert main([*part, "--resume"]) == 0
    a, b = (load_file(place / n / "last" / "adapter_model.safetensors") for n in ("whole", "part"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_tied_base_is_trained_saved_and_gone_on_with(place):
    """GPT-2's head is its embedding: a checkpoint holds both, and both come back."""
    part = [*command(place, "autocompressor", "a"), "--tune", "full", "--save_steps", "1"]
    assert main([*part, "--steps", "2"]) == 0
    last = load_compressor(place / "a" / "last", tiny_decoder("gpt2"))
    head, table = (last.get_parameter(f"base.{n}.weight") for n in ("lm_head", "transformer.wte"))
    assert head is table and not torch.equal(table, tiny_decoder("gpt2").transformer.wte.weight)
    assert main([*part, "--steps", "2", "--resume"]) == 0


@pytest.mark.parametrize(
    "change,word",
    [
        (["--data_path", "nowhere.txt"], "nowhere.txt"),
        (["--objective", "guess"], "one of lm"),
        (["--objective", "document"], "AutoCompressors alone"),
        (["--load_in", "8bit"], "bitsandbytes|CUDA"),
        (["--loader", "unsloth"], "unsloth"),
        (["--model_name", "nowhere/at-all"], "nowhere"),
        (["--context", "2000"], "900 tokens behind the last whole window.*at least 2"),
        (["--precision", "fp16"], "one of fp32, bf16"),
        (["--ratio", "2"], "num_condense_tokens=4"),
    ],
)
def test_mistakes_are_named(place, capsys, monkeypatch, change, word):
    assert main([*command(place, "condense", "x"), *change]) == 2
    err = capsys.readouterr().err
    assert re.search(word, err) and "Traceback" not in err
    assert not (place / "x" / "best").exists()


def test_a_run_is_not_overwritten(place, capsys):
    assert main(command(place, "pairs", "a")) == 0
    assert main(command(place, "pairs", "a")) == 2
    assert "--resume" in capsys.readouterr().err
    assert main([*command(place, "pairs", "a"), "--r", "0.5", "--resume"]) == 2
    assert "other options" in capsys.readouterr().err


def test_set_is_a_flag(place, capsys):
    assert main([*command(place, "pairs", "a"), "--set", "compress.r=0.4"]) == 0
    config = json.loads((place / "a" / "last" / "compressor_config.json").read_text())["config"]
    assert config["r"] == 0.4
    for wrong in ("rr=0.4", "compress.r"):
        with pytest.raises(SystemExit) as stop:
            main([*command(place, "pairs", "b"), "--set", wrong])
        assert stop.value.code == 2


@pytest.mark.parametrize(
    "content,word",
    [
        ({"Definition": "Add.", "Instances": [{"input": "1"}]}, "KeyError: 'output'"),
        ([{"choice_A": "a", "context": "c"}], "choice_B"),
        ([["a", "list"]], r"data.json\[0\]: .* is no record"),
        ({"a": 1}, "a list of records"),
    ],
)
def test_broken_files_are_named(place, capsys, tmp_path, content, word):
    path = tmp_path / "data.json"
    path.write_text(json.dumps(content))
    assert main([*command(place, "condense", "broken"), "--data_path", str(path)]) == 2
    assert re.search(word, capsys.readouterr().err)


def test_a_trained_compressor_is_scored(place, capsys):
    """train/compress_eval.py: the compressed context lies between its bounds' files; MODE=FA needs none."""
    from train.compress_eval import main as score

    assert main(command(place, "condense", "a")) == 0
    capsys.readouterr()
    common = ["--decoder", str(place / "decoder"), "--data", str(place / "text.txt"), "--examples", "4"]
    common += ["--context", "16", "--target", "6"]
    assert score([*common, "--compressor", str(place / "a" / "best")]) == 0
    ours = json.loads(capsys.readouterr().out)
    assert score([*common, "--mode", "FA"]) == 0
    full = json.loads(capsys.readouterr().out)
    assert full["compressed"] == pytest.approx(full["full"], abs=1e-5)
    assert full["full"] == pytest.approx(ours["full"], abs=1e-5) and ours["none"] == full["none"]
    assert ours["slots"] == 4 and full["slots"] == 16 and full["kv_bytes"] == full["full_kv_bytes"]
    assert score(common) == 2
    assert "--mode FA" in capsys.readouterr().err
