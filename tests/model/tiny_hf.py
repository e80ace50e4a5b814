"""Tiny random models of the families that can be imported, as transformers folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Mamba2Config, MistralConfig, Qwen3Config

VOCAB = 61
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 52,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "initializer_range": 0.2,
}
MAMBA: dict[str, Any] = {
    **{k: v for k, v in SIZES.items() if k not in ("num_attention_heads", "num_key_value_heads")},
    "intermediate_size": None,
    "expand": 2,
    "head_dim": 16,
    "num_heads": 4,
    "state_size": 8,
    "chunk_size": 8,
}
CONFIGS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True, rms_norm_eps=1e-5),
    "llama_untied": lambda: LlamaConfig(
        **SIZES, head_dim=16, rms_norm_eps=1e-3, rope_parameters={"rope_type": "default", "rope_theta": 500.0}
    ),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=6, rms_norm_eps=1e-5),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=12, tie_word_embeddings=True),
    "qwen3_mixed": lambda: Qwen3Config(
        **SIZES, head_dim=8, use_sliding_window=True, sliding_window=5, max_window_layers=1
    ),
    "mamba2": lambda: Mamba2Config(**MAMBA, n_groups=2, tie_word_embeddings=True),
    "mamba2_untied": lambda: Mamba2Config(**MAMBA, n_groups=1, use_bias=True, time_step_limit=(0.01, 0.5)),
}


def tiny(family: str, folder: Path) -> Any:
    """A random model of that family, saved in `folder`. Every norm and bias is random too."""
    torch.manual_seed(0)
    config = CONFIGS[family]()
    lm = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, p in lm.named_parameters():
            if p.dim() == 1 and "A_log" not in name and "dt_bias" not in name:
                p.add_(torch.randn_like(p) * 0.3)
    lm.save_pretrained(folder)
    return lm
