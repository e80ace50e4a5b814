"""What every compression method has to be compared with, on the same interface.

none            no context at all
full            the whole context
last            the last m tokens
random_eviction a cache of m random tokens
sink_window     a cache of the first few and the last tokens (StreamingLLM, arXiv 2309.17453)
snapkv          a cache of what the last tokens attend to, chosen per head (SnapKV, arXiv 2404.14469)
mean_pool       a cache of windows, keys averaged before rotation and rotated to the window's start
oracle          m embeddings optimised for each sample: a bound, not a method

Shape legend: B batch  T time  S slots  G key/value heads  K head width.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.compress.base import CompressorConfig, ContextCompressor, compressor
from model.compress.caches import join, pool, prefill, take, top_slots, window_of
from model.compress.context import CompressedContext, LayerSlots, join_embeds
from model.compress.rows import token_losses


@compressor("none")
class NoContext(ContextCompressor):
    """Drops the context: the loss that any method must beat."""

    def _compress(self, ids, mask, slots, state):
        embeds = self.decoder.embed(ids[:, :0])
        return self._embeds(
            embeds, mask[:, :0].clone(), mask.sum(1) + (0 if state is None else state.source_length)
        )


@compressor("full")
class FullContext(ContextCompressor):
    """Keeps everything; any split of a context into chunks is the same as one call."""

    def slots_wanted(self, lengths, ratio, budget):
        if (ratio or 1) > 1 or (budget is not None and bool((lengths > budget).any())):
            raise ValueError("method full keeps every token: it can meet a ratio of 1 and no smaller budget")
        return lengths

    def _compress(self, ids, mask, slots, state):
        return join_embeds(state, self.full_context(ids, mask))


@compressor("last")
class LastTokens(ContextCompressor):
    """Truncation to the last m tokens, read as if the context began there."""

    def _compress(self, ids, mask, slots, state):
        first = mask.sum(1) - slots
        column = torch.arange(int(slots.max()), device=ids.device)
        index = (first[:, None] + column).clamp_max(max(ids.shape[1] - 1, 0))
        new = self._embeds(self.decoder.embed(ids.gather(1, index)), column < slots[:, None], mask.sum(1))
        return join_embeds(state, new)


class Eviction(ContextCompressor):
    """Prefills the context and keeps m entries of the cache, at their original positions."""

    gives = "cache"
    accepts = frozenset({"tokens", "cache"})
    selects = True

    @abstractmethod
    def scores(self, mask: Tensor) -> Tensor:
        """Worth [B, S] of each slot; mask [B, S] marks those that exist, packed left."""

    def _compress(self, ids, mask, slots, state):
        run, _ = prefill(self.decoder, ids, mask, state)
        layers = self._thin([LayerSlots(k, v, mask) for k, v in run.kv], slots)
        start = 0 if state is None else state.next_position
        source = mask.sum(1) + (0 if state is None else state.source_length)
        return self._cached(join(self.decoder, state, layers), source, start + mask.sum(1))

    def _thin(self, layers: list[LayerSlots], slots: Tensor) -> list[LayerSlots]:
        mask = layers[0].mask
        index, keep = top_slots(self.scores(mask), mask, slots)
        return [LayerSlots(take(x.keys, index), take(x.values, index), keep) for x in layers]

    def recompress(self, context, slots):
        if not context.uniform:
            raise ValueError(f"{self.registered_name} evicts from caches whose layers hold the same slots")
        layers = list(self.decoder.lower(context))
        return self._cached(self._thin(layers, slots), context.source_length, context.next_position)


@compressor("random_eviction")
class RandomEviction(Eviction):
    """Each place in a context has a fixed random worth (config seed), so batches equal single rows."""

    def scores(self, mask):
        generator = torch.Generator().manual_seed(self.config.seed)
        worth = torch.rand(mask.shape[1], generator=generator)
        return worth.to(mask.device).expand(mask.shape)


@dataclass(frozen=True)
class SinkWindowConfig(CompressorConfig):
    """sinks: first tokens that are always kept; the rest of the budget is the most recent ones."""

    sinks: int = 4


@compressor("sink_window")
class SinkWindow(Eviction):
    Config = SinkWindowConfig

    def scores(self, mask):
        t = torch.arange(mask.shape[1], device=mask.device).float().expand(mask.shape)
        return torch.where(t < self.config.sinks, t + mask.shape[1], t)


@dataclass(frozen=True)
class SnapKVConfig(CompressorConfig):
    """window: last tokens whose queries score the rest, and which are kept while they fit in half the budget.
    kernel: scores are max-pooled over this many neighbours (odd)."""

    window: int = 16
    kernel: int = 5


@compressor("snapkv")
class SnapKV(ContextCompressor):
    """Every key/value head keeps the tokens that the last tokens attend to most."""

    Config = SnapKVConfig
    gives = "cache"

    def _compress(self, ids, mask, slots, state):
        run, positions = prefill(self.decoder, ids, mask, state, keep_states=True)
        layers, shared = [], None
        for i, (k, v) in enumerate(run.kv):
            q = self.decoder.rotate(self.decoder.qkv(i, run.states[i])[0], positions)
            index, keep = top_slots(self._scores(q, k, mask, slots), mask, slots)
            shared = keep if shared is None else shared
            layers.append(LayerSlots(take(k, index), take(v, index), shared))
        start = 0 if state is None else state.next_position
        source = mask.sum(1) + (0 if state is None else state.source_length)
        return self._cached(join(self.decoder, state, layers), source, start + mask.sum(1))

    def _scores(self, q: Tensor, k: Tensor, mask: Tensor, slots: Tensor) -> Tensor:
        """q [B, H, T, K], k [B, G, T, K] -> worth of every key for every key head, [B, G, T]."""
        B, G, T, K = k.shape
        window = torch.minimum(torch.full_like(slots, self.config.window), (slots + 1) // 2)
        t = torch.arange(T, device=k.device)
        asking = mask & (t >= (mask.sum(1) - window)[:, None])
        q = q.view(B, G, -1, T, K)
        logits = torch.einsum("bgntk,bgsk->bgnts", q, k) * K**-0.5
        seen = torch.ones(T, T, dtype=torch.bool, device=k.device).tril() & mask[:, None, :]
        weights = logits.masked_fill(~seen[:, None, None], torch.finfo(logits.dtype).min).softmax(-1)
        worth = (weights * asking[:, None, None, :, None]).sum(3).mean(2)
        worth = nn.functional.max_pool1d(worth, self.config.kernel, 1, self.config.kernel // 2)
        return worth.masked_fill(asking[:, None], float("inf"))


@compressor("mean_pool")
class MeanPool(ContextCompressor):
    """Equal windows of the context, each one cache entry:
    the mean of its values and of its unrotated keys."""

    gives = "cache"

    def _compress(self, ids, mask, slots, state):
        run, positions = prefill(self.decoder, ids, mask, state, keep_states=True)
        column = torch.arange(int(slots.max()), device=ids.device)
        keep = column < slots[:, None]
        starts = (
            (window_of(mask, slots)[:, None, :] < column[:, None]).sum(-1).clamp_max(max(ids.shape[1] - 1, 0))
        )
        starts = positions.gather(1, starts)
        layers = []
        for i, h in enumerate(run.states):
            _, k, v = self.decoder.qkv(i, h)
            k = self.decoder.rotate(pool(k, mask, slots), starts)
            layers.append(LayerSlots(k, pool(v, mask, slots), keep))
        start = 0 if state is None else state.next_position
        source = mask.sum(1) + (0 if state is None else state.source_length)
        return self._cached(join(self.decoder, state, layers), source, start + mask.sum(1))


@dataclass(frozen=True)
class OracleConfig(CompressorConfig):
    """steps, lr: of Adam, on every sample's own slots."""

    steps: int = 60
    lr: float = 0.03


@compressor("oracle")
class OraclePrompt(ContextCompressor):
    """Slots optimised per sample: to restore the context, or, in `compress_for`, for the very text that is
    scored. The latter looks at the answers and is only ever an upper bound."""

    Config = OracleConfig

    def _compress(self, ids, mask, slots, state):
        return join_embeds(state, self._fit(ids, mask, slots, ids, mask))

    def compress_for(self, ids, mask, input_ids, attention_mask, slots):
        return self._fit(ids, mask, slots, input_ids, attention_mask)

    def _fit(self, ids, mask, slots, target, target_mask) -> CompressedContext:
        keep = torch.arange(int(slots.max()), device=ids.device) < slots[:, None]
        start = pool(self.decoder.embed(ids), mask, slots).detach()
        labels = target.masked_fill(~target_mask, -100)
        with torch.enable_grad():
            embeds = nn.Parameter(start.clone())
            optimizer = torch.optim.Adam([embeds], self.config.lr)
            for _ in range(self.config.steps):
                logits, first = self.decode(self._embeds(embeds, keep, mask.sum(1)), target, target_mask)
                nll = token_losses(logits, labels, first).sum(1) / target_mask.sum(1).clamp_min(1)
                (gradient,) = torch.autograd.grad(nll.sum(), embeds)
                embeds.grad = gradient
                optimizer.step()
        return self._embeds(embeds.detach(), keep, mask.sum(1))
