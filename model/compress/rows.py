"""Rows of ids with padding: checking masks, packing to one edge, positions, losses per token.

Shape legend: B batch  T time  V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def checked_mask(ids: Tensor, mask: Tensor | None, pad: int | None, what: str) -> Tensor:
    """Mask bool [B, T] for ids int64 [B, T]; None stands for no padding.

    Raises ValueError for a mask of another shape, one with holes, and a missing mask where a row
    begins or ends with the padding token while others do not.
    """
    if ids.dim() != 2:
        raise ValueError(f"{what}: ids must be [batch, time], got shape {tuple(ids.shape)}")
    if mask is None:
        if pad is not None and ids.shape[0] > 1 and ids.shape[1]:
            edges = (ids[:, 0] == pad) | (ids[:, -1] == pad)
            if bool(edges.any()) and not bool(edges.all()):
                raise ValueError(f"{what}: rows hold padding (token {pad}) but no attention mask was given")
        return torch.ones_like(ids, dtype=torch.bool)
    if mask.shape != ids.shape:
        raise ValueError(f"{what}: the mask has shape {tuple(mask.shape)}, the ids {tuple(ids.shape)}")
    mask = mask.to(torch.bool)
    if ids.shape[1] and bool(((mask[:, 1:] & ~mask[:, :-1]).sum(1) + mask[:, 0] > 1).any()):
        raise ValueError(
            f"{what}: a row's mask must be one unbroken run of tokens (padding left or right only)"
        )
    return mask


def pack(ids: Tensor, mask: Tensor, left: bool = True) -> tuple[Tensor, Tensor]:
    """Move every row's tokens to the left (or right) edge and cut columns nobody uses;
    padding becomes id 0."""
    if not ids.shape[1]:
        return ids, mask
    lengths = mask.sum(1)
    width = int(lengths.max()) if mask.numel() else 0
    column = torch.arange(width, device=ids.device)
    first = mask.long().argmax(1)
    offset = first if left else first + lengths - width
    keep = column < lengths[:, None] if left else column >= width - lengths[:, None]
    index = (offset[:, None] + column).clamp(0, max(ids.shape[1] - 1, 0))
    return ids.gather(1, index) * keep, keep


def check_amount(ratio: float | None, budget: int | None, longest: int) -> None:
    """Raises ValueError unless at most one of ratio and budget is given, and contexts of up to `longest`
    tokens can meet it: a ratio lies between 1 and their length, a budget is not negative."""
    if ratio is not None and budget is not None:
        raise ValueError("compress takes a ratio or a budget, not both")
    if ratio is not None and ratio < 1:
        raise ValueError(f"ratio {ratio}: source tokens per slot must be at least 1")
    if ratio is not None and 0 < longest < ratio:
        raise ValueError(
            f"ratio {ratio}: the longest context has {longest} tokens, one slot is ratio {longest}"
        )
    if budget is not None and budget < 0:
        raise ValueError(f"budget {budget}: slots per row must be at least 0")


def text_positions(mask: Tensor, start: Tensor) -> Tensor:
    """Positions int64 [B, T] of text that begins at `start` [B]; padding gets some valid position."""
    return start[:, None] + (mask.long().cumsum(1) - 1).clamp_min(0)


def token_losses(logits: Tensor, labels: Tensor, first: Tensor | None = None) -> Tensor:
    """Negative log-likelihood [B, T] of each label given what precedes it, 0 where the label is -100.

    logits [B, T, V]; labels int64 [B, T], unshifted; first [B, V] predicts labels[:, 0], which is not
    scored without it.
    """
    start = torch.zeros_like(logits[:, :1]) if first is None else first[:, None]
    shifted = torch.cat([start, logits[:, :-1]], 1).float()
    if first is None:
        labels = torch.cat([torch.full_like(labels[:, :1], -100), labels[:, 1:]], 1)
    return nn.functional.cross_entropy(shifted.transpose(1, 2), labels, reduction="none", ignore_index=-100)
