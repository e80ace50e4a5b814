"""Attention masks over slots and text: for our own runs, and for the decoder's own forward.

Shape legend: B batch  T time  S slots  D hidden width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from model.compress.context import LayerSlots


def lowest(dtype: torch.dtype) -> float:
    """The most negative score that stays finite when autocast rounds it to bf16."""
    return max(torch.finfo(dtype).min, torch.finfo(torch.bfloat16).min)


def attention_mask(h: Tensor, mask: Tensor, bias: Tensor | None, slots: LayerSlots | None) -> Tensor:
    """Additive scores [B, 1, T, S+T]: slots for everybody, then the text, causal;
    masked keys get the lowest float."""
    B, T = mask.shape
    low = lowest(h.dtype)
    seen = mask[:, None, :] & torch.ones(T, T, dtype=torch.bool, device=h.device).tril()
    text = h.new_zeros(B, 1, T) if bias is None else bias.to(h.dtype)[:, None, :]
    parts = [torch.where(seen, text, low)]
    if slots is not None:
        score = h.new_zeros(slots.mask.shape) if slots.bias is None else slots.bias.to(h.dtype)
        parts.insert(0, torch.where(slots.mask, score, low)[:, None, :].expand(B, T, -1))
    return torch.cat(parts, -1)[:, None]


def mask_hook(i: int, config: Any):
    def fit(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]):
        cache = kwargs.get("past_key_values")
        slots = getattr(cache, "slot_masks", None)
        if cache is None or slots is None:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        B, q = hidden.shape[:2]
        own, first = slots[i], slots[0].shape[1]
        seen = int(cache.layers[i].get_seq_length()) - own.shape[1] + q
        given = kwargs.get("attention_mask")
        if given is None:
            text = (
                torch.ones(q, seen, dtype=torch.bool, device=hidden.device)
                .tril(seen - q)
                .expand(B, 1, q, seen)
            )
        else:
            text = given[..., first : first + seen].expand(B, 1, q, seen)
            text = text if text.dtype == torch.bool else text == 0
        visible = torch.cat([own[:, None, None, :].expand(B, 1, q, -1), text], -1)
        capacity = cache.layers[i].get_max_length()
        if capacity > 0:
            visible = nn.functional.pad(visible, (0, capacity - visible.shape[-1]))
        if config._attn_implementation == "eager":
            low = lowest(hidden.dtype)
            visible = torch.zeros_like(visible, dtype=hidden.dtype).masked_fill(~visible, low)
        return args, {**kwargs, "attention_mask": visible}

    return fit
