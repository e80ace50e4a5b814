"""Exports: transformers loads them, generates with a cache as we do, and they come back as they were."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.dynamic_module_utils import get_class_from_dynamic_module

import model
from model import config as configs
from model.__main__ import main
from model.hub.causal_lm import LatentLabConfig, LatentLabForCausalLM
from model.lm import LanguageModel

D, V = 32, 260
MAMBA = {"mamba2": {"state": 8, "head_dim": 16}}
SWA = {"swa": {"head_dim": 16, "window": 6}}
ATTENTION = {"attention": {"head_dim": 16, "group": 2}}
SAMBA = {"samba": {"mamba2": {"state": 8, "head_dim": 16}, "swa": {"head_dim": 16, "window": 6}}}
SHELLS = [
    {"name": "s1", "body": [SAMBA], "to": 8, "quant": "int8", "frozen": True},
    {"name": "s2", "body": [MAMBA], "to": 8, "quant": {"vq": {"codes": 16}}},
]
ARCHS: dict[str, dict[str, Any]] = {
    "llama": {"stack": [{"repeat": 2, "of": [ATTENTION, "mlp"]}], "embed": {"tied": False}},
    "samba": {"stack": [{"repeat": 2, "of": [MAMBA, "mlp", SWA, "mlp"]}], "norm_eps": 1e-4},
    "onion": {
        "stack": [{"onion": SHELLS}],
        "heads": {"recon": {"shift": 0}, "next": {"shift": 1, "ffn": {"act": "rwkv"}}},
    },
    "yoco": {
        "stack": [{"yoco": {"self": [SWA, "mlp"], "memory": {"head_dim": 16}, "cross": ["xattn", "mlp"]}}]
    },
}
ARCHS["mup"] = {**ARCHS["llama"], "optim": {"mup": {"base": 8}}}  # which scales the logits
ARCHS["yoco"]["defaults"] = {"xattn": {"head_dim": 16}}


def run_of(name: str, folder: Path) -> LanguageModel:
    """A run's folder with random weights that training could have made."""
    torch.manual_seed(0)
    lm = model.build({"dim": D, **ARCHS[name], "name": name}, vocab=V)
    with torch.no_grad():
        for p in lm.parameters():
            p.add_(torch.randn_like(p) * (0.5 if p.dim() == 1 else 0.1))
    folder.mkdir()
    save_file(lm.state_dict(), folder / "model.safetensors")
    (folder / "config.yaml").write_text(configs.dumps(lm.config))
    (folder / "tokenizer.json").write_text('{"type": "bytes"}')
    return lm.eval()


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ARCHS)
def test_export_round_trip(name: str, tmp_path: Path) -> None:
    """Logits, greedy text and padded batches are ours; weights and arch come back bit for bit."""
    lm = run_of(name, tmp_path / "run")
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "hf")]) == 0
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert type(theirs) is LatentLabForCausalLM
    x = ids(2, 15)
    with torch.no_grad():
        assert torch.equal(theirs(x).logits, lm(x).logits)
        assert torch.equal(theirs(x, labels=x).loss, lm(x, labels=x).loss)
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    mask = torch.ones_like(x)
    want = lm.generate(x, max_new_tokens=10)
    assert torch.equal(theirs.generate(x, attention_mask=mask, **options), want)
    assert torch.equal(theirs.generate(x, attention_mask=mask, use_cache=False, **options), want)
    mask[1, :4] = 0
    got = theirs.generate(x, attention_mask=mask, **options)
    assert torch.equal(got[:1], want[:1])
    assert torch.equal(got[1:, 4:], lm.generate(x[1:, 4:], max_new_tokens=10))
    frozen = {n for n, p in lm.named_parameters() if not p.requires_grad}
    assert {n for n, p in theirs.lm.named_parameters() if not p.requires_grad} == frozen

    assert main(["import", str(tmp_path / "hf"), "--out", str(tmp_path / "again")]) == 0
    again = model.load(tmp_path / "again")
    old, new = lm.state_dict(), again.state_dict()
    assert old.keys() == new.keys() and all(torch.equal(old[n], new[n]) for n in old)
    assert configs.arch_digest(again.config) == configs.arch_digest(theirs.lm.config)
    assert (tmp_path / "again" / "tokenizer.json").is_file()


def test_export_beam_search_follows_the_states(tmp_path: Path) -> None:
    run_of("samba", tmp_path / "run")
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "hf")]) == 0
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    x = ids(2, 5)
    options = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False, "attention_mask": torch.ones_like(x)}
    assert torch.equal(theirs.generate(x, **options), theirs.generate(x, use_cache=False, **options))


def test_export_goes_on_from_a_cache(tmp_path: Path) -> None:
    run_of("yoco", tmp_path / "run")
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "hf")]) == 0
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    x = ids(1, 12)
    with torch.no_grad():
        first = theirs(x[:, :7], use_cache=True)
        second = theirs(x[:, 7:], past_key_values=first.past_key_values)
        torch.testing.assert_close(second.logits, theirs(x).logits[:, 7:], rtol=1e-4, atol=1e-5)
    assert second.past_key_values.get_seq_length() == 12


def test_export_holds_the_modeling_file_that_its_config_names(tmp_path: Path) -> None:
    run_of("llama", tmp_path / "run")
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "hf")]) == 0
    named = json.loads((tmp_path / "hf" / "config.json").read_text())["auto_map"]
    for name, cls in (("AutoConfig", LatentLabConfig), ("AutoModelForCausalLM", LatentLabForCausalLM)):
        assert get_class_from_dynamic_module(named[name], tmp_path / "hf") is cls


@pytest.mark.slow
def test_hub_export_loads_in_a_process_that_has_not_heard_of_us(tmp_path: Path) -> None:
    lm = run_of("samba", tmp_path / "run")
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "hf")]) == 0
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM, AutoTokenizer;"
        "m = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True);"
        "t = AutoTokenizer.from_pretrained(sys.argv[1]);"
        "x = t('h\\u00e9llo <eos>', return_tensors='pt', add_special_tokens=False);"
        "print(x.input_ids[0].tolist());"
        "print(m.generate(**x, max_new_tokens=5, do_sample=False)[0].tolist())"
    )
    env = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "hf")],
        env=env,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr
    prompt, text = (json.loads(line) for line in done.stdout.splitlines())
    assert prompt == [*"héllo ".encode(), 256]
    assert text[: len(prompt) + 1] == lm.generate(torch.tensor([prompt]), max_new_tokens=1)[0].tolist()


def test_export_of_weights_that_are_not_there_is_refused(tmp_path: Path, capsys: Any) -> None:
    run_of("llama", tmp_path / "run")
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "run")]) == 2
    assert "not empty" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "nothing"), str(tmp_path / "hf")]) == 2
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "hf")]) == 0
    weights = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(weights)
    tensors.pop("lm.heads.next.norm.weight")
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="missing_keys"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "hf")


def test_exported_bytes_tokenizer_is_ours(tmp_path: Path) -> None:
    run_of("llama", tmp_path / "run")
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "hf")]) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = "naïve \t\x00 日本 def f(x):\n    return x"
    assert tokenizer.encode(text, add_special_tokens=False) == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
    assert (tokenizer.eos_token_id, len(tokenizer)) == (256, 260)


def test_export_of_quantized_pretrained_rows(tmp_path: Path) -> None:
    """Their width is not that of the stored tables."""
    torch.manual_seed(0)
    embed = {"from": "some/where", "project": D, "vq": {"groups": 4, "codes": 8}}
    lm = model.build({"dim": D, "stack": ["mlp"], "embed": embed}, table=torch.randn(V, 48)).eval()
    (tmp_path / "run").mkdir()
    save_file(lm.state_dict(), tmp_path / "run" / "model.safetensors")
    (tmp_path / "run" / "config.yaml").write_text(configs.dumps(lm.config))
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "hf")]) == 0
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
        assert torch.equal(theirs(ids(1, 9)).logits, lm(ids(1, 9)).logits)


def test_a_damaged_export_is_not_imported(tmp_path: Path, capsys: Any) -> None:
    run_of("llama", tmp_path / "run")
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "hf")]) == 0
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    weights.pop("lm.bank.b0_attention.norm.weight")
    save_file(weights, tmp_path / "hf" / "model.safetensors")
    about = json.loads((tmp_path / "hf" / "config.json").read_text())
    for change, said in ({}, "b0_attention.norm.weight: nothing"), ({"arch": None}, "has no `arch`"):
        (tmp_path / "hf" / "config.json").write_text(json.dumps(about | change))
        assert main(["import", str(tmp_path / "hf"), "--out", str(tmp_path / "out")]) == 2
        assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made_and_a_damaged_tokenizer_end_in_words(
    tmp_path: Path, capsys: Any
) -> None:
    run = tmp_path / "run"
    run_of("llama", run)
    assert main(["export", str(run), str(run / "config.yaml" / "x")]) == 2
    assert "Not a directory" in capsys.readouterr().err
    (run / "tokenizer.json").write_text("{")
    for command in (["export", str(run), str(tmp_path / "hf")], ["generate", str(run), "--prompt", "a"]):
        assert main(command) == 2
        assert "cannot be read as a tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()
