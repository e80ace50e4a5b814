"""Condense: N learned tokens read a context through an adapted encoder; what they become are soft tokens for
a frozen decoder.

    [embed_c(context); P] -> encoder with LoRA -> last n hidden states of P, side by side [N, n*dc]
                          -> LayerNorm -> Linear -> soft tokens [N, E]
    decoder input: [soft tokens; embed_d(prompt and answer)]

The encoder is the decoder itself or a model of its own. Then `compress` takes ids of the encoder's tokenizer,
prompts and answers stay in the decoder's, and the trainer and the evaluation read every context with both.
Nearest relatives: ICAE
(arXiv 2307.06945) and CompLLM (arXiv 2509.19228). `slots: mean` replaces P by window means of the context's
own states: the trained mean-pooling baseline that learned tokens have to beat (arXiv 2510.20797).

Shape legend: B batch  T time  N condense tokens  S slots  dc encoder width  E decoder embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model.compress.base import CompressorConfig, ContextCompressor, compressor
from model.compress.caches import pool
from model.compress.context import CompressedContext, join_embeds
from model.compress.decoder import Decoder, load_decoder, load_tokenizer
from model.compress.lora import LoRA
from model.compress.rows import text_positions


@dataclass(frozen=True)
class CondenseConfig(CompressorConfig):
    """num_condense_tokens: N; a call without ratio or budget uses all of them.
    max_tokens: longest context, in encoder tokens; longer ones are refused.
    max_characters: longest context the training data reader lets through, in characters.
    last_states: n, hidden states of the encoder's last layers that are laid side by side.
    slots: learned (P) or mean (windows of the context).
    encoder: name or folder of another encoder and its tokenizer; None: the decoder itself.
    lora_rank, lora_alpha, lora_targets: of the encoder's adapter; None: every projection the family has.
    """

    num_condense_tokens: int = 512
    max_tokens: int = 4096
    max_characters: int = 10_000
    last_states: int = 2
    slots: str = "learned"
    encoder: str | None = None
    lora_rank: int = 128
    lora_alpha: float = 128.0
    lora_targets: tuple[str, ...] | None = None


@compressor("condense")
class Condense(ContextCompressor):
    """Soft tokens [B, S, E], at positions 0, 1, ...; the text follows. Gradients reach P, LoRA,
    norm and linear."""

    Config = CondenseConfig
    pre_condensed_tokens: nn.Parameter

    def __init__(self, decoder: Decoder, config: CondenseConfig) -> None:
        super().__init__(decoder, config)
        if config.slots not in ("learned", "mean"):
            raise ValueError(f"condense slots={config.slots!r}; there are learned and mean")
        encoder = decoder if config.encoder is None else Decoder(load_decoder(config.encoder))
        if not 1 <= config.last_states <= encoder.n_layers:
            raise ValueError(
                f"condense last_states={config.last_states}: the encoder has {encoder.n_layers} layers"
            )
        encoder.model.requires_grad_(False)
        self.__dict__["encoder"] = encoder
        self._tokenizer: Any = None  # the encoder's, once it is asked for
        if config.slots == "learned":
            self.pre_condensed_tokens = nn.Parameter(
                torch.randn(config.num_condense_tokens, encoder.embed_width)
            )
        wide = config.last_states * encoder.width
        self.norm = nn.LayerNorm(wide)
        self.linear = nn.Linear(wide, decoder.embed_width)
        nn.init.xavier_uniform_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.lora = LoRA(encoder.lora_targets(config.lora_targets), config.lora_rank, config.lora_alpha)

    encoder: Decoder

    @property
    def reader(self) -> Decoder:
        return self.encoder

    def context_tokenizer(self, tokenizer: Any) -> Any:
        if self.config.encoder is None:
            return tokenizer
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.config.encoder)
        return self._tokenizer

    def _apply(self, fn, recurse: bool = True):
        if self.encoder is not self.decoder:
            self.encoder.model._apply(fn)
        return super()._apply(fn, recurse)

    def learning_rates(self) -> dict[str, float]:
        return {"pre_condensed_tokens": 1e-5, "": 1e-4}

    def description(self) -> dict[str, Any]:
        return {**super().description(), "encoder_fingerprint": self.encoder.fingerprint}

    def slots_wanted(self, lengths: Tensor, ratio: float | None, budget: int | None) -> Tensor:
        """All N tokens whatever the length, unless a ratio or a budget asks for the first few of them."""
        if ratio is None and budget is None:
            wanted = torch.full_like(lengths, self.config.num_condense_tokens)
        elif budget is not None:
            wanted = torch.full_like(lengths, min(budget, self.config.num_condense_tokens))
        else:
            wanted = super().slots_wanted(lengths, ratio, None)
            if int(wanted.max()) > self.config.num_condense_tokens:
                raise ValueError(
                    f"ratio {ratio} needs {int(wanted.max())} slots and this compressor has "
                    f"num_condense_tokens={self.config.num_condense_tokens}"
                )
        return wanted.minimum(lengths) if self.config.slots == "mean" else wanted

    def _compress(
        self, ids: Tensor, mask: Tensor, slots: Tensor, state: CompressedContext | None
    ) -> CompressedContext:
        longest = int(mask.sum(1).max())
        if longest > self.config.max_tokens:
            raise ValueError(
                f"a context of {longest} tokens is longer than max_tokens={self.config.max_tokens}"
            )
        S = int(slots.max())
        keep = torch.arange(S, device=ids.device) < slots[:, None]
        states = self._states(ids, mask, slots, keep).to(self.linear.weight.dtype)
        soft = self.linear(self.norm(states))
        return join_embeds(state, self._embeds(soft, keep, mask.sum(1)))

    def _states(self, ids: Tensor, mask: Tensor, slots: Tensor, keep: Tensor) -> Tensor:
        """What the slots become: the encoder's last n hidden states, [B, S, n*dc]."""
        encoder, T, learned = self.encoder, ids.shape[1], self.config.slots == "learned"
        embeds, keys = encoder.embed(ids), mask
        if learned:
            tokens = self.pre_condensed_tokens[: keep.shape[1]].to(embeds.dtype)
            embeds = torch.cat([embeds, tokens.expand(ids.shape[0], -1, -1)], 1)
            keys = torch.cat([mask, keep], 1)
        positions = text_positions(keys, torch.zeros_like(slots))
        encoder.check_length(int(positions.max()) + 1 if positions.numel() else 0, keys.shape[1])
        checkpoint = self.config.gradient_checkpointing and self.training
        run = encoder.run(
            encoder.stem(embeds, positions), positions, keys,
            keep_states=True, checkpoint=checkpoint, adapters=self.lora.on,
        )  # fmt: skip
        last = [*run.states[len(run.states) - self.config.last_states + 1 :], encoder.norm(run.hidden)]
        states = torch.cat(last, -1)
        return states[:, T:] if learned else pool(states, mask, slots)

    def prompt_embeds(self, context: CompressedContext, input_ids: Tensor) -> dict[str, Tensor]:
        """Soft tokens and embedded prompt for `decoder.generate(**...)`, all rows unpadded: inputs_embeds
        [B, S+T, E] and a mask of ones."""
        assert context.embeds is not None and context.slot_mask is not None
        embeds = torch.cat([context.embeds, self.decoder.embed(input_ids)], 1)
        mask = torch.cat([context.slot_mask, torch.ones_like(input_ids, dtype=torch.bool)], 1)
        return {"inputs_embeds": embeds, "attention_mask": mask.long()}

    def load_published(self, modules: str | Path, adapter: str | Path | None = None) -> None:
        """Weights of a published checkpoint: `modules.pt` (tokens, linear, norm; read as weights only) and,
        if given, the folder or file of its LoRA adapter.

        Raises RuntimeError or KeyError where shapes or names do not fit this compressor.
        """
        stored: dict[str, Any] = torch.load(modules, map_location="cpu", weights_only=True)["modules"]
        tokens = stored["pre_condensed_tokens"].reshape(-1, self.pre_condensed_tokens.shape[-1])
        if tokens.shape != self.pre_condensed_tokens.shape:
            raise RuntimeError(
                f"{modules} holds {tokens.shape[0]} condense tokens, this compressor "
                f"num_condense_tokens={self.config.num_condense_tokens}"
            )
        self.pre_condensed_tokens.data.copy_(tokens)
        self.linear.load_state_dict(stored["linear_state_dict"])
        self.norm.load_state_dict(stored["norm_state_dict"])
        if adapter is not None:
            self.lora.load_published(adapter)
