"""Loading the frozen decoder: as it is, in 8 or 4 bits, or by Unsloth; what is not installed is named."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

from model.compress import load_decoder
from model.compress.decoder import load_in_bits
from train.errors import UserError


def load_quantized(name: str, load_in: str | None, loader: str, models: Path) -> Any:
    """A causal decoder. Raises UserError where a package or a CUDA device is missing for what was asked."""
    if loader == "unsloth":
        if importlib.util.find_spec("unsloth") is None:
            raise UserError(
                "--loader unsloth needs the package unsloth (and a CUDA device): pip install unsloth"
            )
        from unsloth import FastLanguageModel

        return FastLanguageModel.from_pretrained(name, load_in_4bit=load_in == "4bit")[0]
    if load_in is None:
        try:
            return load_decoder(name, models)
        except OSError as error:
            raise UserError(f"--decoder {name}: cannot be loaded: {str(error).splitlines()[0]}") from None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"--load_in {load_in} needs the package bitsandbytes: pip install bitsandbytes")
    if not torch.cuda.is_available():
        raise UserError(f"--load_in {load_in} needs a CUDA device; leave it out on a CPU")
    return load_in_bits(name, 4 if load_in == "4bit" else 8)
