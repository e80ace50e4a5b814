"""AutoCompressor with a memory of variable length: the decoder says itself when a segment is summed up.

    z_0 = state at <sum>, which closes the segment;   z_t = state after the input embedding x_t
    x_t = step_t + g |step_t| z_{t-1} / |z_{t-1}|   (feedback `gated`, g learned from 0) or z_{t-1} (`state`)
    p_t = P(<eoc> | z_t);   s_1 = 1,  s_{t+1} = s_t (1 - p_t);   E[length] = sum of s_t
    training:  all z_t are kept, slot t seen through an attention bias log s_t (gate `bias`) or as s_t z_t
    (`scale`)
    inference: z_1 .. z_L are kept, L the first t at which it stops: 1 - s_{t+1} > threshold, or by a draw
    from p_t
    penalty:   lambda * E[length] / (n_text + alpha * memory slots), the mean over segments

States fed back as they are make a recurrence through the whole decoder, whose gradients explode with its
length (figures in experiments/compression). With g = 0 the steps are the summary embeddings of the fixed
AutoCompressor, read one after the other, and the recurrence grows from there.

The stopping vector is kept in both, so that the draw's mean length is exactly E[length]. <sum> and <eoc> are
vectors of this module: the vocabulary is never resized, and neither can be generated.

Shape legend: B batch  T time  L slots of a segment  E embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from model.compress.autocompressor import SegmentCompressor, SegmentConfig
from model.compress.base import compressor
from model.compress.context import CompressedContext, LayerSlots
from model.compress.decoder import Decoder
from model.core import Aux


@dataclass(frozen=True)
class VariableAutoCompressorConfig(SegmentConfig):
    """compression_max_len: most slots per segment.  compression_lambda, compression_alpha: see the penalty.
    compress_stop_threshold: stop once the chance of having stopped exceeds it; None: draw.
    recompress_memory: each summary replaces the memory it has read; False: memories accumulate.
    gate: how training weighs slot t, bias or scale.
    feedback: what a step reads, gated or state (as published; gradients explode with compression_max_len).
    """

    compression_max_len: int = 8
    compression_lambda: float = 0.0
    compression_alpha: float = 1.0
    compress_stop_threshold: float | None = None
    recompress_memory: bool = True
    gate: str = "bias"
    feedback: str = "gated"


@compressor("variable_autocompressor")
class VariableAutoCompressor(SegmentCompressor):
    """Between 1 and compression_max_len slots per segment. In training mode `compress` keeps the soft memory.

    sampler: a generator for independent stops in every row; None: one seeded draw per step, shared by the
    rows, so that batches equal single rows.
    """

    Config = VariableAutoCompressorConfig
    sampler: torch.Generator | None = None

    def __init__(self, decoder: Decoder, config: VariableAutoCompressorConfig) -> None:
        super().__init__(decoder, config)
        for name, allowed in (("gate", ("bias", "scale")), ("feedback", ("gated", "state"))):
            if getattr(config, name) not in allowed:
                raise ValueError(f"{name}={getattr(config, name)!r}; there are {' and '.join(allowed)}")
        self.embed_sum = nn.Parameter(self.eos_row()[None])
        self.embed_eoc = nn.Parameter(self.eos_row())
        if config.feedback == "gated":
            self.embed_step = nn.Parameter(self.eos_row().expand(config.compression_max_len, -1).clone())
            self.feedback_gain = nn.Parameter(torch.zeros(()))

    @property
    def per_segment(self) -> int:
        return self.config.compression_max_len

    @property
    def closing(self) -> int:
        return self.per_segment + 1 if self.per_segment else 0  # <sum>, then the steps

    @property
    def accumulates(self) -> bool:
        return not self.config.recompress_memory

    def stop_logit(self, z: Tensor) -> Tensor:
        """Log odds [B] of <eoc> against the whole vocabulary after z [B, E]; p_t is their sigmoid."""
        return z.float() @ self.embed_eoc.float() - self.decoder.model.lm_head(z).float().logsumexp(-1)

    def summarise(self, memory, embeds, mask, keep=True):
        longest = self.config.compression_max_len
        tail = self.embed_sum if keep and longest else None
        text, z, kv, (visible, bias, after) = self.segment(memory, embeds, mask, tail)
        if not keep:
            return text, None
        alive = mask.any(1)
        if longest == 0:
            return text, self._embeds(embeds[:, :0], mask[:, :0].clone(), mask.sum(1))
        layers = [LayerSlots(k, v, visible, bias) for k, v in kv]
        going, survival = alive, torch.ones_like(z[:, 0, 0], dtype=torch.float32)
        zs, kept, gates = [], [], []
        draws = torch.Generator().manual_seed(self.config.seed)
        for t in range(longest):
            z, layers = self._think(self._reentry(z, t), layers, alive, after + t)
            zs.append(z)
            kept.append(going)
            gates.append(survival)
            p = self.stop_logit(z[:, 0]).sigmoid()
            survival = survival * (1 - p)
            if not self.training:
                going = going & ~self._stops(p, survival, draws)
                if not bool(going.any()):
                    break
        new = self._memory(torch.cat(zs, 1), torch.stack(kept, 1), torch.stack(gates, 1), mask)
        return text, replace(new, aux=self._penalty(torch.stack(gates, 1), mask, memory))

    def _reentry(self, z: Tensor, t: int) -> Tensor:
        """The input embedding [B, 1, E] of step t, from the state z [B, 1, E] before it."""
        if self.config.feedback == "state":
            return z
        step, state = self.embed_step[t].float(), z.float()
        return (step + self.feedback_gain * step.norm() * nn.functional.normalize(state, dim=-1)).to(z.dtype)

    def _think(
        self, z: Tensor, layers: list[LayerSlots], alive: Tensor, position: Tensor
    ) -> tuple[Tensor, list[LayerSlots]]:
        """One step: an input embedding z [B, 1, E] in, the next state out, and what it adds to the cache."""
        where = position[:, None] if self.decoder.rotary else torch.full_like(position, -1)[:, None]
        self.decoder.check_length(int(where.max()) + 1, layers[0].mask.shape[1] + 1)
        h, step = self.decoder.stem(z, where), alive[:, None]
        layerwise = self.config.gradient_checkpointing and self.training
        run = self.decoder.run(h, where, step, past=layers, checkpoint=layerwise, adapters=self.reading)
        seen = torch.cat([layers[0].mask, step], 1)
        bias = layers[0].bias
        bias = None if bias is None else nn.functional.pad(bias, (0, 1))
        layers = [
            LayerSlots(torch.cat([x.keys, k], 2), torch.cat([x.values, v], 2), seen, bias)
            for x, (k, v) in zip(layers, run.kv)
        ]
        return self.decoder.features(run.hidden), layers

    def _stops(self, p: Tensor, survival: Tensor, draws: torch.Generator) -> Tensor:
        threshold = self.config.compress_stop_threshold
        if threshold is not None:
            return 1 - survival > threshold
        if self.sampler is not None:
            return torch.rand(p.shape, generator=self.sampler).to(p.device) < p
        return torch.rand(1, generator=draws).to(p.device) < p

    def _memory(self, z: Tensor, kept: Tensor, gates: Tensor, mask: Tensor) -> CompressedContext:
        """Slots at positions 0..L-1. The text after them begins at compression_max_len whatever L is, so that
        soft and hard memory put it at the same place."""
        B, L, _ = z.shape
        place = torch.arange(L, device=z.device).expand(B, L).clone()
        positions = place if self.decoder.rotary else torch.full_like(place, -1)
        bias = None
        if self.training and self.config.gate == "bias":
            bias = gates.clamp_min(1e-9).log()
        elif self.training:
            z = z * gates[..., None].to(z.dtype)
        new = self._embeds(z, kept, mask.sum(1), positions=positions, slot_bias=bias)
        if self.decoder.rotary:
            new = replace(new, next_position=mask.any(1).long() * self.config.compression_max_len)
        return new

    def _penalty(self, gates: Tensor, mask: Tensor, memory: CompressedContext | None) -> Aux:
        expected = gates.sum(1)
        if not self.training:
            return Aux()
        n_memory = 0 if memory is None or memory.embeds is None else memory.embeds.shape[1]
        weight = self.config.compression_lambda / (
            mask.sum(1) + self.config.compression_alpha * n_memory
        ).clamp_min(1)
        alive = mask.any(1)
        rows = alive.sum().clamp_min(1)
        loss = (expected * weight * alive).sum() / rows
        return Aux({"length": loss}, {"expected_length": (expected * alive).sum().detach() / rows})
