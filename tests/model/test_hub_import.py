"""Models of other libraries, imported: the same logits, the same text, and training goes on from them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models
from transformers import AutoModelForCausalLM, LlamaConfig

import model
from model.__main__ import main
from model.hub.folders import new_folder
from model.hub.importing import import_model
from model.schema import ConfigError
from model.text import Printer, Text
from tests.model.tiny_hf import CONFIGS, SIZES, VOCAB, tiny


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", CONFIGS)
def test_imported_logits_and_greedy_text_are_the_same(family: str, tmp_path: Path) -> None:
    theirs = tiny(family, tmp_path / "hf")
    import_model(tmp_path / "hf", tmp_path / "run")
    ours = model.load(tmp_path / "run")
    x = ids(2, 23)
    with torch.no_grad():
        torch.testing.assert_close(ours(x).logits, theirs(x).logits, rtol=1e-4, atol=1e-4)
    prompt = x[:, :7]
    mask = {"attention_mask": torch.ones_like(prompt)}
    want = theirs.generate(prompt, max_new_tokens=12, do_sample=False, **mask)
    assert torch.equal(ours.generate(prompt, max_new_tokens=12), want)


def test_sharded_half_precision_weights_become_fp32(tmp_path: Path) -> None:
    tiny("llama_untied", tmp_path / "hf").bfloat16().save_pretrained(
        tmp_path / "sharded", max_shard_size="8KB"
    )
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "sharded", dtype=torch.float32)
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert main(["import", str(tmp_path / "sharded"), "--out", str(tmp_path / "run")]) == 0
    ours = model.load(tmp_path / "run")
    x = ids(1, 9)
    with torch.no_grad():
        torch.testing.assert_close(ours(x).logits, theirs(x).logits, rtol=1e-4, atol=1e-4)


def _refused(folder: Path, out: Path, capsys: pytest.CaptureFixture, *words: str) -> None:
    assert main(["import", str(folder), "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert all(w in said for w in words), said
    assert "Traceback" not in said


def test_what_cannot_be_rebuilt_exactly_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    odd = {
        "bias": ({"attention_bias": True}, "attention_bias"),
        "act": ({"hidden_act": "relu"}, "hidden_act"),
        "rope": ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "linear"),
    }
    for name, (change, word) in odd.items():
        config = LlamaConfig(**{**SIZES, **change})
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / name)
        _refused(tmp_path / name, tmp_path / "out", capsys, name, word)
    assert not list(tmp_path.glob("out*"))


def test_bad_sources_are_refused_and_nothing_is_left(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    _refused(tmp_path / "gone", out, capsys, "no such folder")
    (tmp_path / "empty").mkdir()
    _refused(tmp_path / "empty", out, capsys, "config.json")
    tiny("llama", tmp_path / "hf")
    weights = tmp_path / "hf" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    _refused(tmp_path / "hf", out, capsys, "model.safetensors", "cannot be read")
    weights.unlink()
    _refused(tmp_path / "hf", out, capsys, "no safetensors file")
    weights.write_bytes(whole)
    about = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text("[]")
    _refused(tmp_path / "hf", out, capsys, "no mapping")
    for key, value, word in (
        ("num_attention_heads", 0, "not understood"),
        ("hidden_size", "a", "not understood"),
        ("intermediate_size", 48, "up_proj"),
        ("num_hidden_layers", 2, "no place for"),
        ("model_type", "gpt2", "llama, mistral"),
    ):
        (tmp_path / "hf" / "config.json").write_text(json.dumps({**about, key: value}))
        _refused(tmp_path / "hf", out, capsys, word)
    assert not list(tmp_path.glob("out*"))
    out.mkdir()
    (out / "mine").write_text("x")
    (tmp_path / "hf" / "config.json").write_text(json.dumps(about))
    _refused(tmp_path / "hf", out, capsys, "not empty")
    assert (out / "mine").read_text() == "x"


def test_an_import_raises_config_errors_only(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        import_model(tmp_path / "nothing", tmp_path / "out")


@pytest.mark.parametrize("damage", ["cut", "another model's"])
def test_damaged_weights_are_refused_in_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture, damage: str
) -> None:
    tiny("llama", tmp_path / "hf")
    import_model(tmp_path / "hf", tmp_path / "run")
    weights = tmp_path / "run" / "model.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:100])
    else:
        rows = load_file(weights)
        save_file({"embed.weight": rows["embed.weight"], "embed.scale": rows["embed.scale"]}, weights)
    capsys.readouterr()
    assert main(["generate", str(tmp_path / "run"), "--ids", "1"]) == 2
    said = capsys.readouterr().err
    assert str(weights) in said and "Traceback" not in said


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    """An exception leaves nothing; of two that fill the same folder, the first to end stays."""
    out = tmp_path / "out"
    with pytest.raises(RuntimeError), new_folder(out) as half:
        (half / "a").write_text("half")
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    with new_folder(out) as late:
        (late / "a").write_text("late")
        out.mkdir()
        (out / "a").write_text("first")
    assert (out / "a").read_text() == "first" and list(tmp_path.iterdir()) == [out]


def test_the_weights_that_transformers_would_take(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """`model.safetensors` before anything else that lies there; then the index, which may be damaged."""
    hf, run = tmp_path / "hf", tmp_path / "run"
    tiny("llama", hf)
    save_file({"tok_embeddings.weight": torch.zeros(3)}, hf / "consolidated.safetensors")
    assert main(["import", str(hf), "--out", str(run)]) == 0
    (hf / "model.safetensors").unlink()
    for index in ("{", "{}", "[]"):
        (hf / "model.safetensors.index.json").write_text(index)
        _refused(hf, tmp_path / "out", capsys, "index.json", "cannot be read")


def test_text_after_a_prompt_keeps_its_blank_and_its_last_character() -> None:
    """A decoder that drops the blank before the first word must not take the first new one for it."""
    tokenizer = Tokenizer(models.BPE({"\u2581a": 0, "\u2581b": 1, "<0xE2>": 2}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    text = Text.__new__(Text)
    text._backend = tokenizer
    printer = Printer(text, [0])
    assert [printer.add(1), printer.add(2), printer.rest()] == [" b", "", "\ufffd"]
