"""The interface every method keeps: wrap a decoder, compress a context, read text after it, save, load.

Shape legend: B batch  T time  S slots  E embedding width  V vocabulary.

A method implements `_compress`; everything else is here. Contexts arrive in any padding and are packed to
the left first, so a method only ever sees rows that begin at column 0.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor

from model.compress.context import CompressedContext, LayerSlots, tight
from model.compress.decoder import Decoder
from model.compress.options import CompressorConfig as CompressorConfig
from model.compress.options import CompressorOutput as CompressorOutput
from model.compress.reading import Reading
from model.compress.rows import check_amount, checked_mask, pack, text_positions, token_losses
from model.registry import Registry, did_you_mean

OBJECTIVES = ("lm", "ae", "qa", "distill")
METHODS = Registry("compression method", "model.compress")
compressor = METHODS.register
method_names = METHODS.names


class ContextCompressor(Reading, ABC):
    """A decoder together with a method that compresses contexts for it.

    The decoder is not a submodule: parameters, state dict and checkpoints hold the method's own tensors.
    gives: the carrier it makes.  accepts: what it can compress, `tokens` and perhaps a carrier (for `Chain`).
    selects: whether it leaves the slots that it keeps of a carrier as they were written.
    """

    Config: ClassVar[type[CompressorConfig]] = CompressorConfig
    gives: ClassVar[str] = "embeds"
    accepts: ClassVar[frozenset[str]] = frozenset({"tokens"})
    selects: ClassVar[bool] = False

    def __init__(self, decoder: Decoder, config: CompressorConfig) -> None:
        super().__init__()
        check_amount(config.ratio, None, 0)
        self.__dict__["decoder"] = decoder
        self.config = config
        decoder.model.requires_grad_(self.trains_base).eval()
        if self.trains_base:
            self.base = decoder.model

    def learning_rates(self) -> dict[str, float]:
        """Parameter name prefix -> learning rate, where a method's own tensors want one of their own."""
        return {}

    @property
    def reader(self) -> Decoder:
        """Whose tokens `compress` takes: the decoder's, unless a method has an encoder of its own."""
        return self.decoder

    def context_tokenizer(self, tokenizer: Any) -> Any:
        """The tokenizer for contexts, given the decoder's."""
        return tokenizer

    @property
    def trains_base(self) -> bool:
        """Whether the decoder's own weights learn; it is then a submodule, and saved with the rest."""
        return False

    def _apply(self, fn, recurse: bool = True):
        if not self.trains_base:
            self.decoder.model._apply(fn)
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True):
        super().train(mode)
        self.decoder.model.eval()  # no dropout: recomputation and truncated gradients stay exact
        return self

    # ------------------------------------------------------------------ compressing

    def compress(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        ratio: float | None = None,
        budget: int | None = None,
        state: CompressedContext | None = None,
    ) -> CompressedContext:
        """input_ids int64 [B, T] with any padding, in the tokens of `reader` -> what is kept of them.

        ratio: source tokens per slot.  budget: slots per row, never exceeded.  At most one of the two.
        state: an earlier context that this one continues.
        Gradients are kept in training mode only. Raises ValueError for bad masks, for inputs longer than
        the decoder reads, and for a ratio or budget that the method cannot meet.
        """
        mask = checked_mask(input_ids, attention_mask, self.reader.config.pad_token_id, "compress")
        ids, mask = pack(input_ids, mask)
        check_amount(ratio, budget, ids.shape[1])
        if ratio is None and budget is None:
            ratio = self.config.ratio
        if state is not None:
            self._check_context(state, ids.shape[0])
        with torch.set_grad_enabled(self.training and torch.is_grad_enabled()):
            return self._compress(ids, mask, self._wanted(mask, state, ratio, budget), state)

    @abstractmethod
    def _compress(
        self, ids: Tensor, mask: Tensor, slots: Tensor, state: CompressedContext | None
    ) -> CompressedContext:
        """ids, mask [B, T], packed left; slots int64 [B], the most each row may use."""

    def _wanted(
        self, mask: Tensor, state: CompressedContext | None, ratio: float | None, budget: int | None
    ) -> Tensor:
        """Slots [B] for `_compress`, from the tokens mask [B, T] marks."""
        return self.slots_wanted(mask.sum(1), ratio, budget)

    def recompress(self, context: CompressedContext, slots: Tensor) -> CompressedContext:
        """Compress an already compressed context to `slots` [B] slots; for methods that accept a carrier."""
        raise TypeError(f"{self.registered_name} compresses {', '.join(sorted(self.accepts))} alone")

    def slots_wanted(self, lengths: Tensor, ratio: float | None, budget: int | None) -> Tensor:
        """Slots [B] for contexts of `lengths` [B]: floor(length / ratio), at least 1 for a token."""
        if budget is not None:
            return lengths.clamp_max(budget)
        ratio = ratio or self.config.ratio or 4.0
        return (lengths / ratio).floor().long().clamp_min(1).minimum(lengths)

    def _embeds(
        self, embeds: Tensor, mask: Tensor, source: Tensor, *, positions: Tensor | None = None, **rest: Any
    ) -> CompressedContext:
        """An `embeds` context, in the decoder's dtype, whose slots take positions 0, 1, ... unless
        `positions` says otherwise."""
        if positions is None:
            positions = (mask.long().cumsum(1) - 1).clamp_min(0)
        following = torch.where(mask, positions + 1, 0).amax(1) if mask.shape[1] else torch.zeros_like(source)
        return CompressedContext(
            self.registered_name, self.decoder.fingerprint, source, following,
            embeds=embeds.to(self.decoder.dtype), slot_mask=mask, slot_positions=positions, **rest,
        )  # fmt: skip

    def _cached(
        self, layers: Sequence[LayerSlots], source: Tensor, following: Tensor, **rest: Any
    ) -> CompressedContext:
        layers = tuple(LayerSlots(tight(x.keys), tight(x.values), x.mask, x.bias) for x in layers)
        return CompressedContext(
            self.registered_name, self.decoder.fingerprint, source, following, layers=layers, **rest
        )

    def full_context(self, ids: Tensor, mask: Tensor) -> CompressedContext:
        """The uncompressed context [B, T] (packed left) as an artefact: every token a slot."""
        return self._embeds(self.decoder.embed(ids), mask, mask.sum(1))

    # ------------------------------------------------------------------ reading

    def decode(
        self,
        context: CompressedContext | None,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        adapted: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """Logits [B, T, V] of text after a context, and [B, V] at the last slot (embeds only, else None).

        adapted: False leaves out the method's adapter of the decoder, where it has one.
        """
        adapters = self.reading if adapted else nullcontext
        mask = checked_mask(input_ids, attention_mask, self.decoder.config.pad_token_id, "decode")
        B, T = input_ids.shape
        start = torch.zeros(B, dtype=torch.int64, device=input_ids.device)
        if context is not None:
            self._check_context(context, B)
            start = context.next_position
        positions = text_positions(mask, start)
        S = 0 if context is None else self._width(context)
        self.decoder.check_length(int(positions.max()) + 1 if T else 0, S + T)
        embeds = self.decoder.embed(input_ids)
        checkpoint = self.config.gradient_checkpointing and self.training
        if context is not None and context.embeds is not None and S:
            assert context.slot_mask is not None and context.slot_positions is not None
            positions = torch.cat([context.slot_positions, positions], 1)
            bias = context.slot_bias
            if bias is not None:
                bias = torch.cat([bias, bias.new_zeros(B, T)], 1)
            h = self.decoder.stem(torch.cat([context.embeds.to(embeds.dtype), embeds], 1), positions)
            keys = torch.cat([context.slot_mask, mask], 1)
            h = self.decoder.run(
                h, positions, keys, bias=bias, checkpoint=checkpoint, adapters=adapters
            ).hidden
            last = (context.slot_mask * torch.arange(1, S + 1, device=h.device)).argmax(1)
            first = self.decoder.head(h[torch.arange(B, device=h.device), last])
            return self.decoder.head(h[:, S:]), first
        past = None if context is None or context.layers is None else self.lower(context)
        h = self.decoder.stem(embeds, positions)
        h = self.decoder.run(h, positions, mask, past=past, checkpoint=checkpoint, adapters=adapters).hidden
        return self.decoder.head(h), None

    def forward(
        self,
        context_ids: Tensor,
        input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        objective: str = "lm",
        *,
        context_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        source_ids: Tensor | None = None,
        source_mask: Tensor | None = None,
        ratio: float | None = None,
        budget: int | None = None,
    ) -> CompressorOutput:
        """Compress `context_ids`, read `input_ids` after it, score it.

        objective: lm (every text token), ae (the context itself is the text), qa (`labels` required, -100 on
        the prompt), distill (KL to the same decoder with the whole context, nats per token).
        source_ids, source_mask: the context in the decoder's own tokens, for ae and distill; needed where an
        encoder with a vocabulary of its own reads `context_ids`.
        """
        if objective not in OBJECTIVES:
            raise ValueError(f"objective {objective!r}{did_you_mean(objective, OBJECTIVES)}")
        if objective == "qa" and labels is None:
            raise ValueError("objective 'qa' scores the answer alone: give labels with -100 on the prompt")
        if source_ids is None:
            source_ids, source_mask = context_ids, context_mask
            if objective in ("ae", "distill") and self.reader is not self.decoder:
                raise ValueError(
                    f"objective {objective!r} shows the context to the decoder, and an encoder's tokens "
                    "are not its own: give source_ids"
                )
        context = self.compress(context_ids, context_mask, ratio=ratio, budget=budget)
        if objective == "ae":
            mask = checked_mask(source_ids, source_mask, self.decoder.config.pad_token_id, "forward")
            input_ids, attention_mask = pack(source_ids, mask)
        elif input_ids is None:
            raise ValueError(f"objective {objective!r} needs input_ids")
        assert input_ids is not None
        mask = checked_mask(input_ids, attention_mask, self.decoder.config.pad_token_id, "forward")
        logits, first = self.decode(context, input_ids, mask)
        labels = (input_ids if labels is None else labels).masked_fill(~mask, -100)
        if objective == "distill":
            losses = {"distill": self._distill(source_ids, source_mask, input_ids, mask, logits)}
        else:
            nll = token_losses(logits, labels, first)
            scored = labels.ne(-100).sum() if first is not None else labels[:, 1:].ne(-100).sum()
            losses = {objective: nll.sum() / scored.clamp_min(1)}
        losses |= context.aux.losses
        total = torch.stack(list(losses.values())).sum()
        return CompressorOutput(total, logits, context, losses, dict(context.aux.stats))

    def _distill(self, source_ids, source_mask, input_ids, mask, logits) -> Tensor:
        with torch.no_grad():
            whole = checked_mask(source_ids, source_mask, self.decoder.config.pad_token_id, "forward")
            teacher, _ = self.decode(self.full_context(*pack(source_ids, whole)), input_ids, mask, False)
        student = logits.float().log_softmax(-1)
        kl = (teacher.float().softmax(-1) * (teacher.float().log_softmax(-1) - student)).sum(-1)
        return (kl * mask).sum() / mask.sum().clamp_min(1)

    def _width(self, context: CompressedContext) -> int:
        if context.layers is not None:
            return max(layer.keys.shape[2] for layer in context.layers)
        assert context.embeds is not None
        return context.embeds.shape[1]

    # ------------------------------------------------------------------ reporting

    def memory_report(self, context: CompressedContext, source: int | None = None) -> dict[str, float]:
        """Measured bytes: kept (the artefact as carried), kv (keys and values that decoding holds), full_kv
        (an uncompressed cache of the same rows), ratio (full_kv / kv) and mean slots per row and layer.

        source: tokens of the rows as the decoder reads them; without it, as `reader` read them.
        """
        with torch.no_grad():
            layers = self.lower(context)
        tensors = {t.untyped_storage().data_ptr(): t for x in layers for t in (x.keys, x.values)}
        kv = sum(t.untyped_storage().nbytes() for t in tensors.values())
        size = layers[0].keys.element_size()
        per_token = 2 * self.decoder.n_layers * self.decoder.n_kv_heads * self.decoder.head_dim * size
        full = (int(context.source_length.sum()) if source is None else source) * per_token
        slots = torch.stack([x.mask.sum(1) for x in layers]).float().mean()
        return {
            "kept_bytes": context.bytes(),
            "kv_bytes": kv,
            "full_kv_bytes": full,
            "ratio": full / kv if kv else float("inf"),
            "slots": float(slots),
            "trained_parameters": sum(p.numel() for p in self.parameters() if p.requires_grad),
        }
