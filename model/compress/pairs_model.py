"""Pairs around a whole model, and training on the window alone: the names of the published code.

    model = ModelWrapperPretrained(original_model, layer_idx=[10], T_w=100, r=0.8, M=100)
    WindowedLossSFTTrainer(model=model, tokenizer=tokenizer, train_dataset=rows, T_w=100).train()

Shape legend: B batch  T time  T' shortened time  V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model.compress.base import CompressorOutput
from model.compress.pairs import Pairs, PairsConfig
from model.compress.rows import checked_mask, pack
from model.compress.saving import write_json
from model.compress.wrap import wrap


class CompressedDecoderLayer(nn.Module):
    """One layer that shortens its stream before it runs: (h, mask, positions) in, the same shorter out."""

    def __init__(self, compressor: Pairs, layer: int) -> None:
        super().__init__()
        self.compressor, self.layer = compressor, layer
        self.attention = compressor.layers[str(layer)]

    def forward(
        self, h: Tensor, mask: Tensor, positions: Tensor, n: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """h [B, T, D], mask bool and positions int64 [B, T], n [B] pairs back (None: by r and M)."""
        h, mask, positions = self.attention(h, mask, positions, n)
        run = self.compressor.decoder.run(h, positions, mask, start=self.layer, stop=self.layer + 1)
        return run.hidden, mask, positions


class ModelWrapperPretrained(nn.Module):
    """A decoder whose stream is compressed at the layers `layer_idx`;
    everything but the pair MLPs is frozen."""

    def __init__(
        self,
        original_model: Any,
        layer_idx: Sequence[int],
        T_w: int,
        r: float,
        M: float | None = 0,
        **options: Any,
    ) -> None:
        super().__init__()
        config = PairsConfig(mode="stream", layer_idx=tuple(layer_idx), T_w=T_w, r=r, M=M, **options)
        self.compressor: Any = wrap(original_model, config)
        self.T_w = T_w

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        T_w: int | None = None,
    ) -> CompressorOutput:
        """input_ids [B, T] in any padding -> logits [B, T', V], each row aligned to the right.

        Row by row the last positions are the window's, so a loss over `labels` [B, T] scores the last T_w
        tokens
        of each row, each from the position before it; the window is the only part that later tokens did not
        shape. T_w: score fewer than the model's window; more raises ValueError. A row's first token is never
        scored.
        """
        c, scored = self.compressor, self.T_w if T_w is None else T_w
        if scored > self.T_w:
            raise ValueError(
                f"T_w={scored}: the loss covers the model's window of T_w={self.T_w} tokens at most"
            )
        mask = checked_mask(input_ids, attention_mask, c.decoder.config.pad_token_id, "forward")
        ids, packed = pack(input_ids, mask)
        h, kept, _, _ = c.stream(ids, packed)
        h, kept = _to_the_right(h, kept)
        logits = c.decoder.head(h)
        if labels is None:
            return CompressorOutput(None, logits)
        targets, keep = pack(labels, mask, left=False)
        targets = targets.masked_fill(keep.cumsum(1) <= 1, -100)
        span = min(scored + 1, logits.shape[1])
        loss = nn.functional.cross_entropy(
            logits[:, -span:-1].flatten(0, 1).float(), targets[:, targets.shape[1] - span + 1 :].flatten(),
            ignore_index=-100,
        )  # fmt: skip
        return CompressorOutput(loss, logits, losses={"window": loss})

    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
        """All but the last token as compressed context, then the decoder's own `generate`; returns
        [B, T + new]."""
        c = self.compressor
        mask = checked_mask(input_ids, attention_mask, c.decoder.config.pad_token_id, "generate")
        ids, mask = pack(input_ids, mask, left=False)
        was = c.training
        c.eval()
        try:
            if ids.shape[1] < 2:
                return c.generate(ids, None, mask, **options)
            context = c.compress(ids[:, :-1], mask[:, :-1])
            tail = c.generate(ids[:, -1:], context, **options)
        finally:
            c.train(was)
        return torch.cat([ids[:, :-1].repeat_interleave(tail.shape[0] // ids.shape[0], 0), tail], 1)

    def save_pretrained(self, folder: str | Path) -> None:
        """The compressor's files, and compression_config.json under the published names."""
        self.compressor.save(folder)
        config = self.compressor.config
        described = {
            "compressed_layer_indices": list(config.layer_idx),
            "T_w": config.T_w,
            "r": config.r,
            "M": config.M,
        }
        write_json(Path(folder) / "compression_config.json", described)


def _to_the_right(h: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [B, T, D] packed left, moved to the right edge."""
    T = mask.shape[1]
    shift = T - mask.sum(1)
    index = (torch.arange(T, device=h.device) - shift[:, None]).clamp_min(0)
    return h.gather(1, index[..., None].expand(-1, -1, h.shape[2])), mask.gather(1, index) & (
        torch.arange(T, device=h.device) >= shift[:, None]
    )


class WindowedLossSFTTrainer:
    """Trains a wrapped model's pair MLPs with the loss of the last T_w tokens.

    train_dataset: rows of ids, texts, or mappings with `input_ids` or `text`.  AdamW, linear warm-up over
    `warmup`
    of the steps, cosine to zero. Rows longer than max_length are refused rather than cut.
    """

    def __init__(
        self, model: ModelWrapperPretrained, tokenizer: Any, train_dataset: Sequence[Any], T_w: int, *,
        steps: int = 12_000, learning_rate: float = 3e-3, weight_decay: float = 0.01, warmup: float = 0.05,
        batch_size: int = 4, accumulate: int = 8, max_length: int = 512, seed: int = 0,
    ) -> None:  # fmt: skip
        self.model, self.T_w, self.max_length = model, T_w, max_length
        self.rows = [self._ids(tokenizer, row) for row in train_dataset]
        if not self.rows:
            raise ValueError("train_dataset is empty")
        self.steps, self.batch_size, self.accumulate = steps, batch_size, accumulate
        self.generator = torch.Generator().manual_seed(seed)
        self.optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=weight_decay)
        ramp = max(1, round(warmup * steps))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda s: (
                min(1.0, (s + 1) / ramp)
                * 0.5
                * (1 + math.cos(math.pi * max(0, s - ramp) / max(1, steps - ramp)))
            ),
        )
        self.losses: list[float] = []

    def _ids(self, tokenizer: Any, row: Any) -> list[int]:
        if isinstance(row, dict):
            row = row["input_ids"] if "input_ids" in row else row["text"]
        ids = list(tokenizer(row)["input_ids"]) if isinstance(row, str) else [int(i) for i in row]
        if not 2 <= len(ids) <= self.max_length:
            raise ValueError(f"a row of {len(ids)} tokens; rows have 2 to max_length={self.max_length}")
        return ids

    def train(self) -> list[float]:
        """Run all steps; returns the loss of each, in nats per token."""
        share = self.model.compressor.trainable_share()
        own = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        print(f"training {own:,} parameters, {share:.2%} of all; the decoder is frozen")
        self.model.train()
        while len(self.losses) < self.steps:
            self.optimizer.zero_grad()
            total = 0.0
            for _ in range(self.accumulate):
                picked = torch.randint(len(self.rows), (self.batch_size,), generator=self.generator)
                device = self.model.compressor.decoder.device
                rows = [torch.tensor(self.rows[i], device=device) for i in picked.tolist()]
                ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
                mask = nn.utils.rnn.pad_sequence([torch.ones_like(r) for r in rows], batch_first=True)
                loss = self.model(ids, mask, labels=ids, T_w=self.T_w).loss / self.accumulate
                loss.backward()
                total += float(loss.detach())
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.schedule.step()
            self.losses.append(total)
        self.model.eval()
        return self.losses
