"""Pairs: the memory's tokens are merged two by two, and the pairs the window attends to most come back whole.

Two modes, both exact where nothing is compressed (T <= T_w, r = 1, or M >= memory):
    kv      the keys and values of the chosen layers are shortened, every query is kept
    stream  the stream itself is shortened where it enters a chosen layer, for all layers from there on

The mathematics is in `model.ops.pairs`. In `stream`, the window's queries choose what earlier positions
become, so only positions of the window may be supervised (`pairs_model.ModelWrapperPretrained` does that).

Shape legend: B batch  T time  P pairs  S slots  D hidden width  G key/value heads  K head width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.compress.base import CompressorConfig, ContextCompressor, compressor
from model.compress.caches import join, prefill, take
from model.compress.context import CompressedContext, LayerSlots
from model.compress.decoder import Decoder
from model.compress.rows import text_positions
from model.ops import pairs as ops


class TokenCompressor(ops.PairMerge):
    """Merges the memory's pairs and leaves the window as it is: TokenCompressor(dim, hidden_dim)(x, T_w)."""

    def forward(self, x: Tensor, T_w: int) -> Tensor:
        """x [B, T, D] -> [B, P + W, D]: merged memory,
        then the window of the last T_w tokens (one more if odd)."""
        L = memory_length(x.shape[1], T_w)
        return torch.cat([self.merge(ops.pair_up(x[:, :L])), x[:, L:]], 1)


class WindowAttentionScore(nn.Module):
    """Importance of memory pairs by the attention the window pays them, with projections of its own."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim {dim} does not divide into {num_heads} heads")
        self.num_heads = num_heads
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, dim, bias=False)

    def ImportanceScore(self, x: Tensor, T_w: int, x_compressed: Tensor | None = None) -> Tensor:
        """x [B, T, D] -> [B, P]. Keys come from the first P vectors of `x_compressed` [B, >= P, D], by
        default from the means of the pairs. With T <= T_w there is no memory, and P = 0."""
        L = memory_length(x.shape[1], T_w)
        pairs = ops.pair_up(x[:, :L])
        merged = pairs.mean(-2) if x_compressed is None else x_compressed[:, : L // 2]
        q, k = (
            p(t).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for p, t in ((self.q_proj, x[:, L:]), (self.k_proj, merged))
        )
        asking = torch.ones(x.shape[0], x.shape[1] - L, dtype=torch.bool, device=x.device)
        there = torch.ones(x.shape[0], L // 2, dtype=torch.bool, device=x.device)
        return ops.importance(q, k, q.shape[-1] ** -0.5, asking, there)

    forward = ImportanceScore


def memory_length(T: int, T_w: int) -> int:
    """L, even, for a stream of T tokens."""
    return T - int(ops.window_length(torch.tensor([T]), T_w)[0])


def select_tokens(x: Tensor, scores: Tensor, T_w: int, r: float, M: float = 0) -> Tensor:
    """Indices int64 [B, n] of the pairs to expand, in order, from their scores [B, P]; x
    [B, T, D] gives T."""
    P = memory_length(x.shape[1], T_w) // 2
    if scores.shape[1] != P:
        raise ValueError(
            f"{x.shape[1]} tokens with T_w={T_w} have {P} pairs, and {scores.shape[1]} scores were given"
        )
    n = int(ops.selected_count(torch.tensor([P]), r, M)[0])
    return scores.argsort(dim=-1, descending=True, stable=True)[:, :n].sort(-1).values


def interleave_selected_pure_tensor(x: Tensor, x_compressed: Tensor, selected_indices: Tensor) -> Tensor:
    """Put selected pairs back: x [B, T, D], x_compressed [B, P+W, D], indices
    [B, n] in any order -> [B, P+n+W, D]."""
    P = x.shape[1] - x_compressed.shape[1]
    selected = torch.zeros(x.shape[0], P, dtype=torch.bool, device=x.device)
    selected = selected.scatter(1, selected_indices, True)
    grid = ops.expand(ops.pair_up(x[:, : 2 * P]), x_compressed[:, :P], selected)
    index, _ = ops.compact(ops.places(selected, torch.ones_like(selected)))
    memory = grid.gather(1, index[..., None].expand(-1, -1, x.shape[2]))
    return torch.cat([memory, x[:, 2 * P :]], 1)


@dataclass(frozen=True)
class PairsConfig(CompressorConfig):
    """layer_idx: layers to compress; None: all in mode kv, the first in mode stream.
    T_w: window that is never compressed.  r: share of pairs that come back.  M: memory tokens left alone.
    mode: kv or stream.  positions: original or compact ids for a shortened stream.
    hidden_dim: of the pair MLP; None: a quarter of the decoder's own MLP.
    sinks: first pairs of a memory that always come back. Pretrained decoders park their attention on the
    first token (Xiao et al. 2309.17453); merged with the second, it no longer serves.
    straight_through: let the loss reach the importance scores.
    """

    layer_idx: tuple[int, ...] | None = None
    T_w: int = 100
    r: float = 0.8
    M: float | None = 0
    mode: str = "kv"
    positions: str = "original"
    hidden_dim: int | None = None
    sinks: int = 0
    straight_through: bool = False


class Split(NamedTuple):
    """Places of a packed row: pairs int64 [B, P, 2] with there [B, P]; window int64
    [B, W] with asking [B, W]."""

    pairs: Tensor
    there: Tensor
    window: Tensor
    asking: Tensor


def split_rows(mask: Tensor, T_w: int) -> Split:
    """Where memory pairs and window of packed rows [B, T] lie."""
    length = mask.sum(1)
    window = ops.window_length(length, T_w)
    memory = length - window
    P, W = (int(t.max()) if t.numel() else 0 for t in (memory // 2, window))
    last = max(mask.shape[1] - 1, 0)
    pair = torch.arange(P, device=mask.device)
    place = torch.arange(W, device=mask.device)
    return Split(
        (2 * pair[:, None] + torch.arange(2, device=mask.device)).expand(mask.shape[0], P, 2),
        pair < (memory // 2)[:, None],
        (memory[:, None] + place).clamp_max(last),
        place < window[:, None],
    )


class CompressedAttention(nn.Module):
    """The compressing part of one layer: merges pairs and scores them with the layer's own projections.
    Called, it shortens a stream (mode stream); `slots` shortens the layer's keys and values (mode kv)."""

    def __init__(self, decoder: Decoder, layer: int, config: PairsConfig) -> None:
        super().__init__()
        own = decoder.config
        wide = getattr(own, "intermediate_size", None) or getattr(own, "ffn_dim", None) or 4 * decoder.width
        self.__dict__["decoder"] = decoder
        self.layer, self.config = layer, config
        self.token_compressor = TokenCompressor(decoder.width, config.hidden_dim or wide // 4)

    decoder: Decoder

    def choose(self, h: Tensor, split: Split, n: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Merged pairs [B, P, D] of the stream h [B, T, D], which n [B] of them come back [B, P],
        and the straight-through gate."""
        P = split.there.shape[1]
        flat = split.pairs.flatten(1)[..., None].expand(-1, -1, h.shape[2])
        merged = self.token_compressor.merge(h.gather(1, flat).unflatten(1, (P, 2)))
        asking = h.gather(1, split.window[..., None].expand(-1, -1, h.shape[2]))
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.config.straight_through):
            q = self.decoder.qkv(self.layer, asking)[0]
            k = self.decoder.qkv(self.layer, merged)[1]
            k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
            scores = ops.importance(q, k, q.shape[-1] ** -0.5, split.asking, split.there)
        first = torch.arange(P, device=h.device) < self.config.sinks
        scores = scores.masked_fill(first, float("inf"))
        selected = ops.select(scores, n.clamp_min(self.config.sinks), split.there)
        gate = ops.straight_through(scores, selected, split.there) if self.config.straight_through else None
        return merged, selected, gate

    def slots(
        self, h: Tensor, keys: Tensor, values: Tensor, positions: Tensor, split: Split, n: Tensor
    ) -> LayerSlots:
        """Mode kv: the layer's keys and values [B, G, T, K] with merged pairs in place of those not selected.

        A merged key is made from the merged vector and rotated to the position of the pair's first token.
        """
        merged, selected, gate = self.choose(h, split, n)
        _, k, v = self.decoder.qkv(self.layer, merged)
        k = self.decoder.rotate(k, positions.gather(1, split.pairs[..., 0]))
        index, mask = ops.compact(torch.cat([ops.places(selected, split.there), split.asking], 1))
        out = []
        for whole, short in ((keys, k), (values, v)):
            two = take(whole, split.pairs.flatten(1)).unflatten(2, (-1, 2))
            grid = ops.expand(two, short, selected, gate)
            out.append(take(torch.cat([grid, take(whole, split.window)], 2), index))
        return LayerSlots(out[0], out[1], mask)

    def forward(
        self, h: Tensor, mask: Tensor, positions: Tensor, n: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """h [B, T, D], mask, positions [B, T], packed -> the same three, shortened.

        n: [B] pairs that come back; None: by r and M.
        """
        split = split_rows(mask, self.config.T_w)
        if n is None:
            n = ops.selected_count(split.there.sum(1), self.config.r, self.config.M or 0)
        merged, selected, gate = self.choose(h, split, n)
        index, kept = ops.compact(torch.cat([ops.places(selected, split.there), split.asking], 1))
        flat = split.pairs.flatten(1)
        two = h.gather(1, flat[..., None].expand(-1, -1, h.shape[2])).unflatten(1, (-1, 2))
        window = h.gather(1, split.window[..., None].expand(-1, -1, h.shape[2]))
        stream = torch.cat([ops.expand(two, merged, selected, gate), window], 1)
        stream = stream.gather(1, index[..., None].expand(-1, -1, h.shape[2]))
        if self.config.positions == "compact":
            return stream, kept, text_positions(kept, positions[:, 0])
        ids = positions.gather(1, torch.cat([flat, split.window], 1)).gather(1, index)
        return stream, kept, ids


@compressor("pairs")
class Pairs(ContextCompressor):
    """A cache whose chosen layers hold pairs; other layers keep every token (kv) or follow the stream."""

    Config = PairsConfig
    gives = "cache"

    def __init__(self, decoder: Decoder, config: PairsConfig) -> None:
        for name, allowed in (("mode", ("kv", "stream")), ("positions", ("original", "compact"))):
            if getattr(config, name) not in allowed:
                raise ValueError(f"pairs {name}={getattr(config, name)!r}; there are {' and '.join(allowed)}")
        ops.selected_count(torch.tensor([0]), config.r, config.M or 0)
        if config.sinks < 0:
            raise ValueError(f"pairs sinks={config.sinks}: a count of pairs, 0 or more")
        every = tuple(range(decoder.n_layers)) if config.mode == "kv" else (0,)
        chosen = every if config.layer_idx is None else tuple(sorted(set(config.layer_idx)))
        if not chosen or chosen[0] < 0 or chosen[-1] >= decoder.n_layers:
            raise ValueError(
                f"pairs layer_idx={config.layer_idx}: the decoder has layers 0 to {decoder.n_layers - 1}"
            )
        super().__init__(decoder, replace(config, layer_idx=chosen))
        self.layers = nn.ModuleDict({str(i): CompressedAttention(decoder, i, self.config) for i in chosen})

    def trainable_share(self) -> float:
        """Trained parameters over all parameters."""
        own = sum(p.numel() for p in self.parameters())
        return own / (own + sum(p.numel() for p in self.decoder.model.parameters()))

    def slots_wanted(self, lengths: Tensor, ratio: float | None, budget: int | None) -> Tensor:
        """Slots [B] of a compressed layer: by r and M, or as many as ratio or budget allow, at least P + W
        and the sinks."""
        window = ops.window_length(lengths, self.config.T_w)
        pairs = (lengths - window) // 2
        sinks = pairs.clamp_max(self.config.sinks)
        if ratio is None and budget is None:
            n = ops.selected_count(pairs, self.config.r, self.config.M or 0)
            return pairs + window + torch.maximum(n, sinks)
        most = super().slots_wanted(lengths, ratio, budget)
        least = pairs + window + sinks
        if bool((most < least).any()):
            row = int((least - most).argmax())
            raise ValueError(
                f"{int(lengths[row])} tokens with T_w={self.config.T_w} need at least "
                f"{int(least[row])} slots, as pairs halve the memory at most; "
                f"{int(most[row])} were asked for"
            )
        return most

    def _compress(self, ids, mask, slots, state):
        split = split_rows(mask, self.config.T_w)
        n = (slots - split.there.sum(1) - split.asking.sum(1)).clamp_min(0)
        start = mask.sum(1) * 0 if state is None else state.next_position
        source = mask.sum(1) + (0 if state is None else state.source_length)
        if self.config.mode == "stream":
            layers, following = self._stream(ids, mask, n, state)
            return self._cached(join(self.decoder, state, layers), source, following)
        with torch.no_grad():
            run, positions = prefill(self.decoder, ids, mask, state, keep_states=True)
        layers = []
        shared: dict[str, Tensor] = {}
        for i, (k, v) in enumerate(run.kv):
            if str(i) not in self.layers:
                layers.append(LayerSlots(k, v, mask))
                continue
            made = self.layers[str(i)].slots(run.states[i], k, v, positions, split, n)  # type: ignore[operator]
            layers.append(replace(made, mask=shared.setdefault("mask", made.mask)))
        return self._cached(join(self.decoder, state, layers), source, start + mask.sum(1))

    def _stream(self, ids: Tensor, mask: Tensor, n: Tensor, state: CompressedContext | None):
        """Layers and next position [B] of a context whose stream is shortened on the way."""
        _, kept, positions, kv = self.stream(ids, mask, n, state)
        following = torch.where(kept, positions + 1, 0).amax(1)
        return [LayerSlots(k, v, m) for k, v, m in kv], following

    def stream(
        self, ids: Tensor, mask: Tensor, n: Tensor | None = None, state: CompressedContext | None = None
    ):
        """Run packed ids [B, T] with the stream shortened: h [B, T', D], mask and positions [B, T'], and for
        every layer its keys, values and mask.

        n: pairs that come back at the first chosen layer; None: by r and M, as at all others.
        """
        start = mask.sum(1) * 0 if state is None else state.next_position
        past = None if state is None else self.lower(state)
        positions = text_positions(mask, start)
        self.decoder.check_length(int(positions.max()) + 1 if positions.numel() else 0, ids.shape[1])
        h, kv = self.decoder.stem(self.decoder.embed(ids), positions), []
        checkpoint = self.config.gradient_checkpointing and self.training
        bounds = [*self.config.layer_idx, self.decoder.n_layers]
        if bounds[0] > 0:
            run = self.decoder.run(h, positions, mask, past=past, stop=bounds[0], checkpoint=checkpoint)
            h, kv = run.hidden, [(k, v, mask) for k, v in run.kv]
        for begin, end in pairwise(bounds):
            h, mask, positions = self.layers[str(begin)](h, mask, positions, n)
            n = None
            run = self.decoder.run(
                h, positions, mask, past=past, start=begin, stop=end, checkpoint=checkpoint
            )
            h = run.hidden
            kv += [(k, v, mask) for k, v in run.kv]
        return h, mask, positions, kv
