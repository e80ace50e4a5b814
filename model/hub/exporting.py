"""A run -> a transformers folder: config.json, safetensors, tokenizer, and a modeling file that loads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from model import config as configs
from model.build import load
from model.hub.causal_lm import LatentLabConfig, LatentLabForCausalLM
from model.hub.folders import new_folder, taken
from model.items import Visit
from model.lm import LanguageModel
from model.schema import ARCH_KEYS, ConfigError
from model.text import read_tokenizer, tokenizer_of

MODELING = '''"""Loads this folder with transformers, where the package that wrote it is installed."""

try:
    from model.hub.causal_lm import LatentLabConfig, LatentLabForCausalLM
except ImportError as error:
    raise ImportError(
        "this model needs the package `latent-lab` (its import name is `model`) in the environment:"
        " pip install -e PATH-TO-ITS-REPOSITORY"
    ) from error

__all__ = ["LatentLabConfig", "LatentLabForCausalLM"]
'''
EOS_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")
BYTE_SPECIALS = ("<eos>", "<bos>", "<pad>", "<mask>")  # ids 256..259 of the bytes tokenizer


def export_model(source: str | Path, out: str | Path) -> None:
    """Write a run's model to the folder `out`, for AutoModelForCausalLM and AutoTokenizer.

    Raises ConfigError when the run holds no complete model, or `out` is taken.
    """
    source, out = Path(source), Path(out)
    if taken(out):
        raise ConfigError([f"{out}: is not empty; give another folder"])
    lm = load(source)
    file = tokenizer_of(source)
    tokenizer = (read_tokenizer(file) or _bytes_tokenizer()) if file.is_file() else None
    with new_folder(out) as partial:
        eos = None if tokenizer is None else _write_tokenizer(tokenizer, partial)
        hugging(lm, eos).save_pretrained(partial)
        (partial / "modeling_latent_lab.py").write_text(MODELING)


def hugging(lm: LanguageModel, eos: int | None = None) -> LatentLabForCausalLM:
    """The same model as a transformers one, sharing its weights."""
    plain = configs.dump(lm.config)
    arch = {key: plain[key] for key in ARCH_KEYS} | {"name": lm.config.name, "vocab": lm.vocab}
    if lm.config.optim.mup is not None:
        arch["optim"] = {"mup": plain["optim"]["mup"]}  # logits are scaled by it
    about: dict[str, Any] = {
        "arch": arch,
        "embed_width": lm.embed.width,
        "vocab_size": lm.vocab,
        "hidden_size": lm.config.dim,
        "num_hidden_layers": sum(isinstance(item, Visit) for item in lm.plan.walk()),
        "eos_token_id": eos,
        "bos_token_id": None,
        "pad_token_id": eos,
        "auto_map": {
            "AutoConfig": "modeling_latent_lab.LatentLabConfig",
            "AutoModelForCausalLM": "modeling_latent_lab.LatentLabForCausalLM",
        },
    }
    config = LatentLabConfig(**about)
    model = LatentLabForCausalLM(config)
    model.lm = lm
    return model.eval()


def _write_tokenizer(tokenizer: Tokenizer, out: Path) -> int | None:
    """tokenizer.json and its tokenizer_config.json; returns the id that ends a document, if any is known."""
    tokenizer.save(str(out / "tokenizer.json"))
    known = tokenizer.get_vocab(with_added_tokens=True)
    eos = next((name for name in EOS_NAMES if name in known), None)
    about: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    if eos is not None:
        about |= {"eos_token": eos, "pad_token": eos, "padding_side": "left"}
    (out / "tokenizer_config.json").write_text(json.dumps(about, indent=1))
    return None if eos is None else known[eos]


def _bytes_tokenizer() -> Tokenizer:
    """The bytes tokenizer in the library's own format: id = byte, then the specials."""
    letters = _byte_letters()
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in BYTE_SPECIALS])
    return tokenizer


def _byte_letters() -> list[str]:
    """The library's printable stand-in for each byte (GPT-2's table)."""
    kept = {*range(33, 127), *range(161, 173), *range(174, 256)}
    out, moved = [], 0
    for byte in range(256):
        out.append(chr(byte) if byte in kept else chr(256 + moved))
        moved += byte not in kept
    return out
