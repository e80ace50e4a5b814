"""Helpers of the compression tests: tiny decoders, method settings, batches."""

from __future__ import annotations

import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Qwen3Config,
)

FAMILIES = ("llama", "mistral", "qwen3", "opt", "gpt2")
VOCAB, PAD = 61, 0
_CONFIGS = {
    "llama": (LlamaConfig, {"num_key_value_heads": 2, "intermediate_size": 40}),
    "mistral": (MistralConfig, {"num_key_value_heads": 2, "intermediate_size": 40}),
    "qwen3": (Qwen3Config, {"num_key_value_heads": 2, "intermediate_size": 40, "head_dim": 8}),
    "opt": (OPTConfig, {"ffn_dim": 48, "word_embed_proj_dim": 24}),  # embeds narrower than it works
    "gpt2": (GPT2Config, {}),
}


def tiny_decoder(family: str, seed: int = 0, **options):
    """A random decoder, 2 layers, width 32, fp32, with weights large enough that logits differ."""
    torch.manual_seed(seed)
    cls, extra = _CONFIGS[family]
    base = {
        "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 96, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": PAD,
    }  # fmt: skip
    model = AutoModelForCausalLM.from_config(cls(**(base | extra | options))).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(6 if family == "opt" else 4)
    return model


def batch(lengths, side="right", seed=1, width=None):
    """Random ids int64 [B, T] and their mask, padded on `side` with PAD."""
    g = torch.Generator().manual_seed(seed)
    width = width or max(lengths)
    ids = torch.zeros(len(lengths), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, n in enumerate(lengths):
        at = slice(0, n) if side == "right" else slice(width - n, width)
        ids[row, at] = torch.randint(3, VOCAB, (n,), generator=g)
        mask[row, at] = 1
    return ids, mask


def rows_equal(context, other, row):
    """Largest difference between row `row` of a context and the only row of another, over slots that
    exist."""
    worst = 0.0
    if context.carrier == "embeds":
        a = context.embeds[row][context.slot_mask[row]]
        b = other.embeds[0][other.slot_mask[0]]
        assert a.shape == b.shape
        return (a - b).abs().max().item() if a.numel() else 0.0
    for mine, theirs in zip(context.layers, other.layers):
        for name in ("keys", "values"):
            a = getattr(mine, name)[row][:, mine.mask[row]]
            b = getattr(theirs, name)[0][:, theirs.mask[0]]
            assert a.shape == b.shape
            worst = max(worst, (a - b).abs().max().item() if a.numel() else 0.0)
    return worst
