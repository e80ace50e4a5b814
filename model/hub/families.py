"""Llama, Mistral, Qwen3 and Mamba2 in our terms: their configuration as an arch, their tensors by our names.

A family gives the arch as a mapping (what a YAML file would say), and for every layer the prefix of its
tensors and which of ours they are. Names inside a block are the family's own already.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


class ImportRefused(ValueError):
    """A model that we cannot rebuild exactly; the message says which of its settings is in the way."""


@dataclass(frozen=True)
class Outline:
    """A model of another library, in our terms.

    arch:   the architecture as a mapping.
    layers: for every visit, in order: (prefix of its norm, prefix of its block).
    embed, norm, head: names of the token table, of the last norm's weight, of the untied output table.
    """

    arch: dict[str, Any]
    layers: list[tuple[str, str]]
    embed: str
    norm: str
    head: str | None


def outline(config: Any) -> Outline:
    """The outline of a transformers configuration. Raises ImportRefused."""
    if config.model_type not in FAMILIES:
        raise ImportRefused(f"model_type {config.model_type!r}: there is an import for {', '.join(FAMILIES)}")
    return FAMILIES[config.model_type](config)


def _arch(config: Any, stack: list[Any], norm_eps: float) -> dict[str, Any]:
    return {
        "dim": config.hidden_size,
        "vocab": config.vocab_size,
        "embed": {"tied": bool(config.tie_word_embeddings)},
        "stack": stack,
        "norm_eps": norm_eps,
        "init_std": config.initializer_range,
    }


def _llama(config: Any) -> Outline:
    """Llama, Mistral and Qwen3: attention and SwiGLU, each pre-norm residual."""
    _want(config, "attention_bias", (False, None))
    _want(config, "mlp_bias", (False, None))
    _want(config, "hidden_act", ("silu",))
    D, H = config.hidden_size, config.num_attention_heads
    attention = {
        "head_dim": getattr(config, "head_dim", None) or D // H,
        "heads": H,
        "group": H // (config.num_key_value_heads or H),
        "theta": _theta(config),
        "qk_norm": config.model_type == "qwen3",
        "norm_eps": config.rms_norm_eps,
    }
    mlp = {"act": "swiglu", "mult": config.intermediate_size / D}
    layers = []
    for window in _windows(config):
        mixer = {"attention": attention} if window is None else {"swa": {**attention, "window": window}}
        layers.append([mixer, {"mlp": mlp}])
    names = []
    for i in range(len(layers)):
        at = f"model.layers.{i}"
        names += [
            (f"{at}.input_layernorm", f"{at}.self_attn"),
            (f"{at}.post_attention_layernorm", f"{at}.mlp"),
        ]
    head = None if config.tie_word_embeddings else "lm_head.weight"
    arch = _arch(config, _runs(layers), config.rms_norm_eps)
    return Outline(arch, names, "model.embed_tokens.weight", "model.norm.weight", head)


def _mamba2(config: Any) -> Outline:
    _want(config, "hidden_act", ("silu",))
    low, high = config.time_step_limit
    mixer = {
        "state": config.state_size,
        "head_dim": config.head_dim,
        "expand": config.expand,
        "groups": config.n_groups,
        "conv": config.conv_kernel,
        "bias": config.use_bias,
        "conv_bias": config.use_conv_bias,
        "dt_min": config.time_step_min,
        "dt_max": config.time_step_max,
        "dt_floor": config.time_step_floor,
        "dt_limit": None if low == 0 and math.isinf(high) else [low, high],
        "norm_eps": config.layer_norm_epsilon,
    }
    n = config.num_hidden_layers
    names = [(f"backbone.layers.{i}.norm", f"backbone.layers.{i}.mixer") for i in range(n)]
    head = None if config.tie_word_embeddings else "lm_head.weight"
    arch = _arch(config, _runs([[{"mamba2": mixer}]] * n), config.layer_norm_epsilon)
    return Outline(arch, names, "backbone.embeddings.weight", "backbone.norm_f.weight", head)


FAMILIES: dict[str, Callable[[Any], Outline]] = {
    "llama": _llama,
    "mistral": _llama,
    "qwen3": _llama,
    "mamba2": _mamba2,
}


def _want(config: Any, key: str, allowed: tuple[Any, ...]) -> None:
    value = getattr(config, key, allowed[0])
    if value not in allowed:
        raise ImportRefused(f"{config.model_type} with {key}={value!r}: our block has only {allowed[0]!r}")


def _theta(config: Any) -> float:
    rope = config.rope_parameters or {}
    kind = rope.get("rope_type", "default")
    if kind != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ImportRefused(
            f"{config.model_type} with rope_type {kind!r} {rope}: our rotary positions are not rescaled"
        )
    return float(rope.get("rope_theta", 10_000.0))


def _windows(config: Any) -> list[int | None]:
    """The sliding window of every layer, or None where it sees everything."""
    n, window = config.num_hidden_layers, getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return [window] * n
    unknown = set(kinds) - {"full_attention", "sliding_attention"}
    if unknown:
        raise ImportRefused(f"{config.model_type} with layers of type {', '.join(sorted(unknown))}")
    return [window if kind == "sliding_attention" else None for kind in kinds]


def _runs(layers: list[list[Any]]) -> list[Any]:
    """Layers as `repeat`s of equal neighbours."""
    out: list[Any] = []
    for layer in layers:
        if out and out[-1]["of"] == layer:
            out[-1]["repeat"] += 1
        else:
            out.append({"repeat": 1, "of": layer})
    return out
