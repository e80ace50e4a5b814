"""Making a compressor around a decoder, and reading back a saved one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from model.compress.base import METHODS, CompressorConfig, ContextCompressor, method_names
from model.compress.chain import Chain
from model.compress.decoder import Decoder, load_decoder
from model.compress.saving import FORMAT
from model.registry import did_you_mean


def wrap(model: Any, config: str | Mapping[str, Any] | CompressorConfig, **options: Any) -> ContextCompressor:
    """A compressor around a causal decoder, on its device, in evaluation mode. The method's own tensors are
    fp32 whatever the decoder's dtype.

    model: a transformers causal model of a known family, or a `Decoder`.
    config: a method's name, a mapping with `method` and its options, or a config object; options override.
    Raises KeyError for an unknown method, TypeError for an unknown option, ValueError for an unknown family.
    """
    cls, settings = _resolve(config, options)
    decoder = model if isinstance(model, Decoder) else Decoder(model)
    with decoder.device:
        return cls(decoder, settings).eval()


def _resolve(config: Any, options: Mapping[str, Any]) -> tuple[type[ContextCompressor], CompressorConfig]:
    if isinstance(config, CompressorConfig):
        owners = [METHODS.get(n) for n in method_names()]
        cls = next(c for c in owners if c.Config is type(config))  # type: ignore[attr-defined]
        given: dict[str, Any] = {f.name: getattr(config, f.name) for f in fields(config)}
    else:
        given = {"method": config} if isinstance(config, str) else dict(config)
        if "method" not in given:
            raise KeyError(f"a compressor's config names its method: one of {', '.join(method_names())}")
        cls = METHODS.get(given.pop("method"))
    given |= options
    known = [f.name for f in fields(cls.Config)]  # type: ignore[attr-defined]
    for key in given:
        if key not in known:
            raise TypeError(f"{cls.registered_name}: unknown option {key!r}{did_you_mean(key, known)}")  # type: ignore[attr-defined]
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    return cls, cls.Config(**given)  # type: ignore[return-value, attr-defined]


def load_compressor(path: str | Path, base_model: Any = None) -> ContextCompressor:
    """What `save` wrote, a chain included, on its base (loaded by name when not given), in evaluation mode.

    Raises FileNotFoundError, ValueError for another base decoder, RuntimeError for missing or extra tensors.
    """
    folder = Path(path)
    described = json.loads((folder / "compressor_config.json").read_text())
    if described.get("format") != FORMAT:
        raise ValueError(f"{folder}: not a compressor (format {described.get('format')!r})")
    if "chain" in described:
        first, *rest = (folder / name for name in described["chain"])
        stages = [load_compressor(first, base_model)]
        return Chain(stages + [load_compressor(stage, stages[0].decoder) for stage in rest])
    if base_model is None:
        if not described["base"]:
            raise ValueError(f"{folder} does not name its base decoder; pass base_model")
        base_model = load_decoder(described["base"])
    decoder = base_model if isinstance(base_model, Decoder) else Decoder(base_model)
    _same(
        folder, "fingerprint", described, decoder.fingerprint
    )  # before building: options may not fit another
    made = wrap(decoder, {"method": described["method"], **described["config"]})
    _same(folder, "encoder_fingerprint", described, made.description().get("encoder_fingerprint"))
    made.load_state_dict(load_file(str(folder / "adapter_model.safetensors")), strict=True)
    return made.eval()


def _same(folder: Path, key: str, described: Mapping[str, Any], here: str | None) -> None:
    if described.get(key) != here:
        raise ValueError(f"{folder} was trained on another decoder: {key} {described.get(key)}, here {here}")
