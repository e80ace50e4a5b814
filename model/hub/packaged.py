"""Pretrained models that come inside a Python package, as transformers folders."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from model.hub.folders import new_folder
from model.hub.sources import package_file


def packaged_folder(name: str, cache: str | Path = "models") -> Path:
    """`cache`/`name`: a transformers folder of a packaged model, converted once to fp32.

    The packaged SmolLM2 weights are Q4_1-rounded: use them for surgery, not for quoting its scores.
    Raises SourceError with the command that installs the package.
    """
    target = Path(cache) / name
    if (target / "config.json").exists():
        return target
    file = package_file(name)
    places = {"gguf_file": file.name, "local_files_only": True}
    quant = GgufConfig(gguf_file=file.name, dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        str(file.parent), dtype=torch.float32, quantization_config=quant, **places
    )
    model.config.__dict__.pop("quantization_config", None)
    with new_folder(target) as partial:
        AutoTokenizer.from_pretrained(str(file.parent), **places).save_pretrained(partial)
        model.save_pretrained(partial)
    return target
