"""AutoCompressor: a decoder that writes summary vectors at the end of a segment and reads them before the
next
(arXiv 2305.14788).

    [memory; segment; kappa summary embeddings] -> last-layer states at the summaries = new summary vectors
    memory = all summaries so far (accumulate_summary) or the latest alone (a recurrent memory)

Decoders with learned positions give memory and summaries no position at all, so text counts from 0 in every
segment; rotary ones rotate along the concatenation. The decoder itself learns, by LoRA or in full.

Shape legend: B batch  T time  M memory slots  E embedding width  V vocabulary.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as run_checkpointed

from model.compress.base import CompressorConfig, ContextCompressor, compressor
from model.compress.context import CompressedContext, join_embeds, replaced
from model.compress.decoder import Decoder
from model.compress.lora import LoRA
from model.compress.rows import checked_mask, text_positions, token_losses
from model.compress.segments import given_segments, row_segments
from model.core import Aux, merge_aux


@dataclass(frozen=True)
class SegmentConfig(CompressorConfig):
    """segment_length: longest segment that `compress` makes of its own accord.
    segment_lengths: fixed lengths for training, and for rows of `compress` of exactly that many tokens unless
    a ratio or budget asks for another number of segments; () cuts equal or random segments.
    tune: lora, or full for every weight of the decoder.  lora_rank, lora_alpha, lora_targets: of the former.
    training_substeps, segments_per_substep: backward passes per document, segments in each.
    randomize_substeps: random segment lengths.
    bptt: grouped (gradients stop between substeps) or sliding (each loss reaches truncate_bptt_segments
    back).
    segment_gradient_checkpointing: recompute each segment in the backward pass.
    """

    segment_length: int = 1024
    segment_lengths: tuple[int, ...] = ()
    tune: str = "lora"
    lora_rank: int = 16
    lora_alpha: float = 16.0
    lora_targets: tuple[str, ...] = ("q_proj", "v_proj", "o_proj", "k_proj")
    training_substeps: int = 1
    segments_per_substep: int = 2
    randomize_substeps: bool = False
    bptt: str = "grouped"
    truncate_bptt_segments: int = 1
    segment_gradient_checkpointing: bool = False


@dataclass(frozen=True)
class AutoCompressorConfig(SegmentConfig):
    """summary_length: kappa, summary vectors per segment.
    accumulate_summary: keep the summaries of all segments; False: the latest replaces the memory.
    """

    summary_length: int = 50
    accumulate_summary: bool = True


@dataclass
class DocumentOutput:
    """loss: 0-d mean over scored tokens, None without labels.  logits [B, T, V].  nll [B, T], 0 where
    unscored.
    losses: the parts of the loss.  softprompt: the memory after the last segment, where it was asked for."""

    loss: Tensor | None
    logits: Tensor
    nll: Tensor | None = None
    losses: dict[str, Tensor] = field(default_factory=dict)
    softprompt: CompressedContext | None = None


def mean_aux(parts: Sequence[Aux]) -> Aux:
    """Losses and statistics averaged over segments."""
    total = merge_aux(parts)
    n = max(len(parts), 1)
    return Aux({k: v / n for k, v in total.losses.items()}, {k: v / n for k, v in total.stats.items()})


class SegmentCompressor(ContextCompressor):
    """What fixed and variable length share: segments, memory, and the decoder's own adapter."""

    Config = SegmentConfig
    accepts = frozenset({"tokens", "embeds"})

    def __init__(self, decoder: Decoder, config: SegmentConfig) -> None:
        super().__init__(decoder, config)
        for name, allowed in (("tune", ("lora", "full")), ("bptt", ("grouped", "sliding"))):
            if getattr(config, name) not in allowed:
                raise ValueError(f"{name}={getattr(config, name)!r}; there are {' and '.join(allowed)}")
        rank = config.lora_rank if config.tune == "lora" else 0
        self.lora = LoRA(decoder.lora_targets(config.lora_targets), rank, config.lora_alpha)

    @property
    def trains_base(self) -> bool:
        return self.config.tune == "full"

    @contextmanager
    def reading(self) -> Iterator[None]:
        with self.lora.on():
            yield

    def eos_row(self) -> Tensor:
        """[E] the embedding of the end-of-text token (token 0 where there is none):
        where new vectors begin."""
        token = self.decoder.config.eos_token_id or 0
        token = token[0] if isinstance(token, (list, tuple)) else token
        return self.decoder.embedding.weight.detach()[token].clone().float()

    # ------------------------------------------------------------------ one segment

    @abstractmethod
    def summarise(self, memory, embeds, mask, keep=True):
        """Read a segment after the memory: (text features [B, T, E], its summary as a context or None)."""

    def segment(self, memory: CompressedContext | None, embeds: Tensor, mask: Tensor, tail: Tensor | None):
        """Run [memory; embeds; tail]. embeds [B, T, E], mask [B, T], tail [n, E] or None.

        Returns features of the text [B, T, E] and of the tail [B, n, E], the run's keys and values, and what
        is
        visible to whatever comes next: mask [B, M+T+n], bias, next position [B].
        """
        B, T, _ = embeds.shape
        alive = mask.any(1)
        start = mask.sum(1) * 0 if memory is None else memory.next_position
        n = 0 if tail is None else tail.shape[0]
        rotary = self.decoder.rotary
        text = text_positions(mask, start if rotary else torch.zeros_like(start))
        after = start + mask.sum(1)
        tail_positions = (
            torch.arange(n, device=mask.device) + after[:, None] if rotary else after.new_full((B, n), -1)
        )
        parts, keys, positions = [embeds], [mask], [text]
        if tail is not None:
            parts.append(tail.to(embeds.dtype).expand(B, -1, -1))
            keys.append(alive[:, None].expand(B, n))
            positions.append(tail_positions)
        bias, M = None, 0
        if memory is not None:
            assert memory.embeds is not None and memory.slot_mask is not None
            assert memory.slot_positions is not None
            M = memory.embeds.shape[1]
            parts.insert(0, memory.embeds.to(embeds.dtype))
            keys.insert(0, memory.slot_mask)
            positions.insert(0, memory.slot_positions)
            if memory.slot_bias is not None:
                bias = torch.cat([memory.slot_bias, memory.slot_bias.new_zeros(B, T + n)], 1)
        visible, where = torch.cat(keys, 1), torch.cat(positions, 1)
        self.decoder.check_length(int(where.max()) + 1 if where.numel() else 0, visible.shape[1])
        h = self.decoder.stem(torch.cat(parts, 1), where)
        layerwise = self.config.gradient_checkpointing and self.training
        run = self.decoder.run(h, where, visible, bias=bias, checkpoint=layerwise, adapters=self.reading)
        out = self.decoder.features(run.hidden)
        return out[:, M : M + T], out[:, M + T :], run.kv, (visible, bias, after + n)

    def absorb(self, memory: CompressedContext | None, new: CompressedContext) -> CompressedContext:
        """The memory after a segment: joined, or replaced in rows where the segment held any token."""
        if memory is None or self.accumulates:
            return join_embeds(memory, new)
        return replaced(memory, new)

    @property
    @abstractmethod
    def accumulates(self) -> bool:
        """Whether summaries add up; else the latest replaces the memory it has read."""

    def checkpointed(self, memory, embeds, mask, keep):
        """`summarise`, recomputed in the backward pass if the config says so."""
        if self.config.segment_gradient_checkpointing and torch.is_grad_enabled():
            return run_checkpointed(self.summarise, memory, embeds, mask, keep, use_reentrant=False)
        return self.summarise(memory, embeds, mask, keep)

    # ------------------------------------------------------------------ contexts and documents

    @property
    @abstractmethod
    def per_segment(self) -> int:
        """The most slots that one segment brings."""

    @property
    def closing(self) -> int:
        """Places that summing up a segment takes behind its text."""
        return self.per_segment

    def longest_segment(self, n: int) -> int:
        """The most tokens that any of a document's n segments may have: rotary families also need positions
        for the memory before it and for what closes it (the last one is not closed)."""
        if not self.decoder.rotary:
            return self.decoder.max_positions
        most = min(self.decoder.max_positions, self.decoder.window or self.decoder.max_positions)
        last, before = (j if self.accumulates else min(j, 1) for j in (n - 1, max(n - 2, 0)))
        closed = before * self.per_segment + self.closing if n > 1 else 0
        return most - max(last * self.per_segment, closed)

    def slots_wanted(self, lengths: Tensor, ratio: float | None, budget: int | None) -> Tensor:
        """Slots [B], a whole number of segments' worth; segments are as long as ratio or budget make them."""
        kappa, given = self.per_segment, self.config.segment_lengths
        segments = -(-lengths // self.config.segment_length)
        segments = torch.where(lengths == sum(given), len(given), segments)
        if kappa == 0 or (ratio is None and budget is None):
            return segments * kappa
        most = (lengths / (ratio or 1)).floor().long() if budget is None else torch.full_like(lengths, budget)
        if bool(((most < kappa) & (lengths > 0)).any()):
            asked = f"ratio {ratio}" if budget is None else f"budget {budget}"
            raise ValueError(
                f"{asked} allows {int(most.min())} slots for a context of {int(lengths[most.argmin()])} "
                f"tokens, and one segment makes {kappa}"
            )
        if not self.accumulates:
            return segments * kappa
        return torch.minimum(most // kappa, lengths) * kappa

    def _compress(self, ids, mask, slots, state):
        if state is not None and state.embeds is None:
            raise ValueError(
                f"{self.registered_name} carries embeddings and cannot continue a {state.carrier} state"
            )
        memory, aux = state, []
        counts = (slots // max(self.per_segment, 1)).clamp_min(mask.any(1).long())
        for part, keep in row_segments(ids, mask, counts, self.config.segment_lengths):
            _, new = self.checkpointed(memory, self.decoder.embed(part), keep, True)
            memory = self.absorb(memory, new)
            aux.append(new.aux)
        if memory is None:
            return self._embeds(self.decoder.embed(ids[:, :0]), mask[:, :0].clone(), mask.sum(1))
        return replace(memory, aux=mean_aux(aux))

    def recompress(self, context, slots):
        _, new = self.summarise(None, context.embeds, context.slot_mask, True)
        return replace(new, source_length=context.source_length)

    def document(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        segment_lengths: Sequence[int] = (),
        softprompt: CompressedContext | None = None,
        output_softprompt: bool = False,
        labels: Tensor | None = None,
    ) -> DocumentOutput:
        """Read [B, T] in segments, each after the memory of those before; the last is only summarised for
        `output_softprompt`. Every token is predicted from the one before it, across segments too.

        labels: unshifted [B, T], -100 ignored; padding never counts.
        """
        mask = checked_mask(input_ids, attention_mask, self.decoder.config.pad_token_id, "document")
        parts = given_segments(input_ids, mask, segment_lengths or (input_ids.shape[1],))
        memory, features, aux = softprompt, [], []
        for i, (ids, keep) in enumerate(parts):
            wanted = output_softprompt or i < len(parts) - 1
            out, new = self.checkpointed(memory, self.decoder.embed(ids), keep, wanted)
            features.append(out)
            if wanted:
                memory = self.absorb(memory, new)
                aux.append(new.aux)
        logits = self.decoder.model.lm_head(torch.cat(features, 1))
        result = DocumentOutput(None, logits, softprompt=memory if output_softprompt else None)
        if labels is not None:
            labels = labels.masked_fill(~mask, -100)
            result.nll = token_losses(logits, labels)
            losses = {
                "lm": result.nll.sum() / labels[:, 1:].ne(-100).sum().clamp_min(1),
                **mean_aux(aux).losses,
            }
            result.loss, result.losses = torch.stack(list(losses.values())).sum(), losses
        return result


@compressor("autocompressor")
class AutoCompressor(SegmentCompressor):
    """kappa summary vectors per segment."""

    Config = AutoCompressorConfig
    config: AutoCompressorConfig

    def __init__(self, decoder: Decoder, config: AutoCompressorConfig) -> None:
        super().__init__(decoder, config)
        self.embed_summary = nn.Parameter(self.eos_row().expand(config.summary_length, -1).clone())

    @property
    def per_segment(self) -> int:
        return self.config.summary_length

    @property
    def accumulates(self) -> bool:
        return self.config.accumulate_summary

    def summarise(self, memory, embeds, mask, keep=True):
        text, summary, _, _ = self.segment(memory, embeds, mask, self.embed_summary if keep else None)
        if not keep:
            return text, None
        alive = mask.any(1)
        shown = alive[:, None].expand(-1, summary.shape[1]).clone()
        if self.decoder.rotary:
            return text, self._embeds(summary, shown, mask.sum(1))
        nowhere = torch.full_like(shown, -1, dtype=torch.int64)
        return text, self._embeds(summary, shown, mask.sum(1), positions=nowhere)
