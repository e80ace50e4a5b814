"""Five decoder families as data, and the fingerprint that tells one decoder's weights from another's."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Family:
    """Where a family keeps its parts; paths are relative to the causal model, the decoder or a layer."""

    decoder: str
    layers: str
    norm: str
    embed: str
    attention: str
    attention_norm: str
    projections: dict[str, str]  # the usual LoRA names -> a path in a layer
    positions: str | None = None  # learned position table; None: rotary


_ROTARY = Family(
    "model",
    "layers",
    "norm",
    "embed_tokens",
    "self_attn",
    "input_layernorm",
    {f"{p}_proj": f"self_attn.{p}_proj" for p in "qkvo"}
    | {f"{p}_proj": f"mlp.{p}_proj" for p in ("gate", "up", "down")},
)
_OPT = {f"{p}_proj": f"self_attn.{p}_proj" for p in "qkv"}
_OPT |= {"o_proj": "self_attn.out_proj", "up_proj": "fc1", "down_proj": "fc2"}
_GPT2 = {f"{p}_proj": "attn.c_attn" for p in "qkv"}
_GPT2 |= {"o_proj": "attn.c_proj", "up_proj": "mlp.c_fc", "down_proj": "mlp.c_proj"}
FAMILIES = {
    "llama": _ROTARY,
    "mistral": _ROTARY,
    "qwen3": _ROTARY,
    "opt": Family(
        "model.decoder", "layers", "final_layer_norm", "embed_tokens", "self_attn", "self_attn_layer_norm",
        _OPT, "embed_positions",
    ),
    "gpt2": Family("transformer", "h", "ln_f", "wte", "attn", "ln_1", _GPT2, "wpe"),
}  # fmt: skip


SAMPLES = 1024  # weights of a tensor whose signs are taken


def fingerprint(model: Any) -> str:
    """A hash of the configuration's sizes and of the signs of samples of every weight.

    Signs, because no rounding moves them: a copy in bf16 or fp16 is the same decoder, and any training turns
    some of the thousands that are taken.
    """
    config = model.config.to_dict()
    keep = (
        "model_type",
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    )
    digest = hashlib.blake2b(json.dumps({k: config.get(k) for k in keep}).encode(), digest_size=16)
    for name, value in sorted(model.named_parameters()):
        flat = value.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // SAMPLES)][:SAMPLES]
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(torch.signbit(sample).cpu().numpy().tobytes())
    return digest.hexdigest()
