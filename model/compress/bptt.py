"""Training a segment compressor on whole documents: truncated back-propagation through the memory.

grouped: the document is cut into training_substeps groups of segments_per_substep segments; gradients flow
         inside a group and stop between groups, one backward pass per group.
sliding: the loss of segment j reaches the segments j - N .. j, N = truncate_bptt_segments, wherever j lies.
         Each loss is sent back through at most N stored segment graphs, one after the other.

In both the memory keeps its graph for its first use, or the compressor would never learn from the text.

Shape legend: B batch  T time  E embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from model.compress.autocompressor import SegmentCompressor
from model.compress.context import CompressedContext
from model.compress.rows import checked_mask
from model.compress.segments import random_segments


def segment_plan(
    compressor: SegmentCompressor, total: int, generator: torch.Generator | None = None
) -> list[int]:
    """Segment lengths for a document of `total` tokens: as configured, random, or equal. Random ones leave
    room for memory and summaries where those take positions."""
    config = compressor.config
    n = config.training_substeps * config.segments_per_substep
    if config.segment_lengths and not config.randomize_substeps:
        return list(config.segment_lengths)
    if config.randomize_substeps:
        return random_segments(total, n, min(compressor.longest_segment(n), total), generator)
    base, more = divmod(total, n)
    if base == 0:
        raise ValueError(
            f"{total} tokens cannot be cut into {n} segments; lower training_substeps or segments_per_substep"
        )
    return [base + (i < more) for i in range(n)]


def backward_document(
    compressor: SegmentCompressor,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    generator: torch.Generator | None = None,
    scale: float = 1.0,
) -> dict[str, float]:
    """Add the gradient of a document's loss (times `scale`) to the parameters; input_ids int64 [B, T].

    Returns the loss in nats per token, its parts and the statistics, as numbers.
    """
    mask = checked_mask(input_ids, attention_mask, compressor.decoder.config.pad_token_id, "document")
    lengths = segment_plan(compressor, input_ids.shape[1], generator)
    document = Document(compressor, input_ids, mask, lengths, scale)
    if compressor.config.bptt == "sliding":
        sliding(document, compressor.config.truncate_bptt_segments)
    else:
        grouped(document, compressor.config.segments_per_substep)
    return document.totals


class Document:
    """A batch of documents cut into segments, and the sums that training reports."""

    def __init__(self, compressor, ids: Tensor, mask: Tensor, lengths: list[int], scale: float) -> None:
        self.compressor, self.scale, self.n = compressor, scale, len(lengths)
        self.ids, self.mask = ids.split(lengths, 1), mask.split(lengths, 1)
        targets = ids.masked_fill(~mask, -100)
        targets = torch.cat([targets[:, 1:], torch.full_like(targets[:, :1], -100)], 1)
        targets = targets.masked_fill(~mask, -100)
        self.targets = targets.split(lengths, 1)
        self.scored = int(targets.ne(-100).sum())
        self.totals: dict[str, float] = {}

    def read(self, j: int, memory: CompressedContext | None) -> tuple[Tensor, CompressedContext | None]:
        """Segment j after `memory`: its share of the loss, and its summary (None for the last segment)."""
        embeds = self.compressor.decoder.embed(self.ids[j])
        features, new = self.compressor.checkpointed(memory, embeds, self.mask[j], j < self.n - 1)
        logits = self.compressor.decoder.model.lm_head(features).float()
        nll = nn.functional.cross_entropy(
            logits.transpose(1, 2), self.targets[j], reduction="sum", ignore_index=-100
        )
        parts = {"lm": nll / max(self.scored, 1)}
        if new is not None:
            parts |= {k: v / max(self.n - 1, 1) for k, v in new.aux.losses.items()}
            for k, v in new.aux.stats.items():
                self.totals[k] = self.totals.get(k, 0.0) + float(v) / max(self.n - 1, 1)
        for k, v in parts.items():
            self.totals[k] = self.totals.get(k, 0.0) + float(v.detach())
        loss = torch.stack(list(parts.values())).sum()
        self.totals["loss"] = self.totals.get("loss", 0.0) + float(loss.detach())
        return loss * self.scale, new


def grouped(document: Document, per_group: int) -> None:
    memory: CompressedContext | None = None
    for start in range(0, document.n, per_group):
        memory = None if memory is None else memory.detach()
        losses = []
        for j in range(start, min(start + per_group, document.n)):
            loss, new = document.read(j, memory)
            losses.append(loss)
            memory = memory if new is None else document.compressor.absorb(memory, new)
        torch.stack(losses).sum().backward()


@dataclass
class _Record:
    """One segment's summary with its graph, and the leaves through which it read earlier summaries."""

    outputs: list[Tensor]
    leaves: dict[int, list[Tensor]]


def _tensors(context: CompressedContext) -> list[Tensor]:
    assert context.embeds is not None
    return [context.embeds] if context.slot_bias is None else [context.embeds, context.slot_bias]


def sliding(document: Document, reach: int) -> None:
    contexts: list[CompressedContext] = []
    records: list[_Record | None] = []
    for j in range(document.n):
        memory, leaves = None, {}
        for i, context in enumerate(contexts):
            if j - i <= reach:
                fresh = [t.detach().requires_grad_() for t in _tensors(context)]
                leaves[i] = fresh
                context = replace(context, embeds=fresh[0], slot_bias=fresh[1] if len(fresh) > 1 else None)
            memory = document.compressor.absorb(memory, context)
        loss, new = document.read(j, memory)
        keep = new is not None and reach > 0
        # A summary's loss (its length penalty) must reach it too, so the graph is kept for later segments.
        loss.backward(retain_graph=keep)
        _send_back(records, leaves, j, reach)
        if new is None:
            break
        contexts.append(new.detach())
        outputs = [t for t in _tensors(new) if t.requires_grad]
        records.append(_Record(outputs, leaves) if keep else None)
        if len(records) > reach:
            records[-1 - reach] = None


def _send_back(records: list[_Record | None], leaves: dict[int, list[Tensor]], j: int, reach: int) -> None:
    """Pass the gradients that arrived at `leaves` on through the segments j-1, j-2, ..., j-reach."""
    pending: dict[int, list[Any]] = {i: [t.grad for t in ts] for i, ts in leaves.items()}
    for i in range(j - 1, max(j - reach, 0) - 1, -1):
        record = records[i]
        gradients = pending.get(i)
        if record is None or gradients is None or all(g is None for g in gradients):
            continue
        for ts in record.leaves.values():
            for t in ts:
                t.grad = None
        pairs = [(o, g) for o, g in zip(record.outputs, gradients) if g is not None]
        torch.autograd.backward([o for o, _ in pairs], [g for _, g in pairs], retain_graph=True)
        for earlier, ts in record.leaves.items():
            for n, t in enumerate(ts):
                if t.grad is None:
                    continue
                held = pending.setdefault(earlier, [None] * len(ts))
                held[n] = t.grad if held[n] is None else held[n] + t.grad
