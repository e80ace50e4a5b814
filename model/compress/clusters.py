"""Clusters: tokens whose states are alike share one representative, causally, at one or several layers.

    h_j joins the most similar earlier representative c(j) if S_jc > tau_j and it is not protected
    tau_j = clamp(tau_0 + (1 - tau_0) q95(similarities so far) + .1 (sigmoid(w . mean h so far) - 1/2),
                  tau_0, .98)
    h^_j  = c(j) + g * R(h_j - c(j))     R: bottleneck D -> D/4 -> D, stored sparse in 8 bits; g: learned gate

Modes. quality: later layers read h^ at full length; what shrinks is the code of the stream, not the cache.
length: later layers read representatives alone, each moved to the mean of its cluster (through the same gate
and
bottleneck), at its original position; the cache of those layers shrinks.
Without residuals, adaptive threshold and importance there is nothing to train: the post-hoc mode.

Shape legend: B batch  T time  S slots  D hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from model.compress import clustering as ops
from model.compress.base import CompressorConfig, CompressorOutput, ContextCompressor, compressor
from model.compress.caches import join
from model.compress.context import CompressedContext, LayerSlots
from model.compress.decoder import Decoder
from model.compress.rows import checked_mask, pack, text_positions, token_losses
from model.core import Aux, merge_aux
from model.ops.pairs import compact


@dataclass(frozen=True)
class ClustersConfig(CompressorConfig):
    """mode: length or quality.  compression_layers: k, at layers i n // (k + 1); layer_idx names them
    instead.
    similarity_threshold: tau_0; 2 or more switches clustering off.  adaptive_threshold: tau_j as above.
    levels, level_step: cluster the representatives again, each time with a threshold lower by level_step.
    importance: learn which tokens to protect (above mean plus deviation of those before).
    protect_ids: token ids below this are protected.
    attention_weight: w_a of the attention term in S.  position_reach: tokens over which S decays by e.
    use_residuals, residual (bottleneck | identity), gated, residual_sparsity, residual_bits, residual_levels.
    contrastive_weight, contrastive_margin, reconstruction_weight: of the extra losses.
    temperature: of the straight-through decision.  freeze_base: False trains the decoder too.
    """

    mode: str = "length"
    compression_layers: int = 1
    layer_idx: tuple[int, ...] | None = None
    similarity_threshold: float = 0.85
    adaptive_threshold: bool = False
    levels: int = 1
    level_step: float = 0.1
    importance: bool = True
    protect_ids: int = 0
    attention_weight: float = 0.0
    position_reach: float | None = None
    use_residuals: bool = False
    residual: str = "bottleneck"
    gated: bool = True
    residual_sparsity: float = 0.9
    residual_bits: int = 8
    residual_levels: int = 1
    contrastive_weight: float = 0.1
    contrastive_margin: float = 0.2
    reconstruction_weight: float = 0.05
    temperature: float = 0.1
    freeze_base: bool = True


class Clustered(NamedTuple):
    """rebuilt [B, T, D]: h^.  centred [B, T, D]: representatives moved to their cluster's mean.
    member int64 [B, T].  shown bool [B, T]: representatives.  aux: losses and statistics."""

    rebuilt: Tensor
    centred: Tensor
    member: Tensor
    shown: Tensor
    aux: Aux


class ClusterLayer(nn.Module):
    """Clustering of one layer's outgoing stream. tau is a buffer,
    so that the parachute's changes are saved."""

    tau: Tensor

    def __init__(self, width: int, config: ClustersConfig) -> None:
        super().__init__()
        self.config, narrow = config, max(1, width // 4)
        self.register_buffer("tau", torch.tensor(float(config.similarity_threshold)))
        if config.importance:
            self.importance = nn.Linear(width, 1)
        if config.adaptive_threshold:
            self.modulator = nn.Linear(width, 1)
        if config.use_residuals and config.residual == "bottleneck":
            self.down = nn.Linear(width, narrow, bias=False)
            self.up = nn.Linear(narrow, width, bias=False)
            last = nn.Linear(narrow, width)
            nn.init.normal_(last.weight, std=0.02 / narrow**0.5)
            nn.init.zeros_(last.bias)
            self.enhancer = nn.Sequential(nn.Linear(2 * width, narrow), nn.GELU(), last)
        if config.use_residuals and config.gated:
            self.gate = nn.Sequential(nn.Linear(width, narrow), nn.GELU(), nn.Linear(narrow, width))
        if config.contrastive_weight > 0:
            self.projection = nn.Linear(width, 128, bias=False)

    def thresholds(self, h: Tensor, s: Tensor, mask: Tensor) -> Tensor:
        """tau_j [B, T], differentiable in the modulator."""
        tau = self.tau
        if not self.config.adaptive_threshold or float(tau) >= 1:
            return tau.expand(mask.shape)
        m = mask[..., None].to(h.dtype)
        mean = (h * m).cumsum(1) / m.cumsum(1).clamp_min(1)
        shift = 0.1 * (torch.sigmoid(self.modulator(mean))[..., 0] - 0.5)
        raised = tau + (1 - tau) * ops.prefix_quantile(s.detach(), mask, 0.95) + shift
        return raised.clamp(min=float(tau), max=max(0.98, float(tau)))

    def residual(self, r: Tensor, c: Tensor) -> Tensor:
        """g * R(r) for residuals r and their representatives c, both [B, T, D]."""
        config = self.config
        if not config.use_residuals:
            return torch.zeros_like(r)
        options = (config.residual_sparsity, config.residual_bits, config.residual_levels)
        if config.residual == "identity":
            back = ops.stored(r, *options)
        else:
            back = self.up(ops.stored(self.down(r), *options))
            back = back + self.enhancer(torch.cat([c, back], -1))
        return back * torch.sigmoid(self.gate(back)) if config.gated else back

    def forward(
        self,
        h: Tensor,
        mask: Tensor,
        ids: Tensor | None,
        attention: Tensor | None = None,
        budget: Tensor | None = None,
    ) -> Clustered:
        """h [B, T, D], mask bool [B, T], ids int64 [B, T] or None, attention [B, T, T] where w_a > 0.
        budget int64 [B]: most representatives; the threshold then follows from it."""
        config = self.config
        s = ops.similarity(h, attention, config.attention_weight, config.position_reach)
        worth = cut = torch.zeros(mask.shape, device=h.device)
        if config.importance:
            worth = torch.sigmoid(self.importance(h.float()))[..., 0]
            cut = ops.prefix_cut(worth, mask)
        protect = worth > cut
        if ids is not None:
            protect = protect | (ids < config.protect_ids)
        if budget is None:
            tau = self.thresholds(h, s, mask)
        else:
            tau = ops.budget_threshold(s.detach(), protect, mask, budget)[:, None].expand(mask.shape)
        member, best = ops.assign(s.detach(), tau.detach(), protect, mask)
        for level in range(1, config.levels):
            member = self._again(s.detach(), tau.detach() - level * config.level_step, protect, member, mask)
        shown = ops.representatives(member, mask)
        return self._rebuild(h, s, tau, worth - cut, member, best, shown, mask)

    @staticmethod
    def _again(s: Tensor, tau: Tensor, protect: Tensor, member: Tensor, mask: Tensor) -> Tensor:
        """One level up: representatives join representatives; every token follows its own."""
        above, _ = ops.assign(s, tau, protect, ops.representatives(member, mask))
        return above.gather(1, member)

    def _rebuild(self, h, s, tau, excess, member, best, shown, mask) -> Clustered:
        config = self.config
        joined = mask & ~shown
        # A token that stays alone still learns whether it should have joined: its candidate takes part with
        # weight 0.
        candidate = torch.where(joined, member, best)
        close = torch.sigmoid((s.gather(2, candidate[..., None])[..., 0] - tau) / config.temperature)
        soft = close * (1 - torch.sigmoid(excess / config.temperature)) if config.importance else close
        weight = (joined.to(soft.dtype) + (soft - soft.detach()) * mask)[..., None].to(h.dtype)
        c = h.gather(1, candidate[..., None].expand_as(h))
        back = self.residual(h - c, c)
        rebuilt = h + weight * (c + back - h)
        share = back if config.use_residuals else h - c
        sums = torch.zeros_like(h).scatter_add(1, candidate[..., None].expand_as(h), weight * share)
        size = torch.zeros_like(weight[..., 0]).scatter_add(1, member, mask.to(h.dtype)).clamp_min(1)
        centred = h + sums / size[..., None]
        return Clustered(rebuilt, centred, member, shown, self._aux(h, rebuilt, member, joined, shown, mask))

    def _aux(self, h, rebuilt, member, joined, shown, mask) -> Aux:
        config, losses = self.config, {}
        if config.contrastive_weight > 0 and self.training:
            z = nn.functional.normalize(self.projection(h), dim=-1)
            losses["contrastive"] = config.contrastive_weight * ops.contrastive(
                z, member, mask, config.contrastive_margin
            )
        if config.use_residuals and self.training:
            error = ((rebuilt - h) ** 2).mean(-1)
            losses["reconstruction"] = (
                config.reconstruction_weight * (error * joined).sum() / joined.sum().clamp_min(1)
            )
        narrow = max(1, h.shape[-1] // 4) if config.residual == "bottleneck" else h.shape[-1]
        bits = ops.code_bits(
            member, mask, h.shape[-1], h.element_size(), narrow if config.use_residuals else 0,
            config.residual_sparsity, config.residual_bits, config.residual_levels,
        )  # fmt: skip
        ratio = mask.sum(1).clamp_min(1) / shown.sum(1).clamp_min(1)
        return Aux(
            losses,
            {"ratio": ratio.float().mean(), "code_bits": torch.tensor(float(bits)), "tau": self.tau.clone()},
        )


@compressor("clusters")
class Clusters(ContextCompressor):
    """A cache: full length up to the first chosen layer, representatives (or rebuilt tokens) after it."""

    Config = ClustersConfig
    gives = "cache"

    def __init__(self, decoder: Decoder, config: ClustersConfig) -> None:
        for name, allowed in (("mode", ("length", "quality")), ("residual", ("bottleneck", "identity"))):
            if getattr(config, name) not in allowed:
                raise ValueError(
                    f"clusters {name}={getattr(config, name)!r}; there are {' and '.join(allowed)}"
                )
        n, k = decoder.n_layers, config.compression_layers
        chosen = config.layer_idx
        if chosen is None:  # never after the last layer, where nothing would read the result
            chosen = tuple(sorted({min(i * (n // (k + 1)), n - 2) for i in range(1, k + 1)}))
        if not chosen or min(chosen) < 0 or max(chosen) > n - 2:
            raise ValueError(
                f"clusters layers {chosen}: a decoder of {n} layers can be clustered after 0 to {n - 2}"
            )
        super().__init__(decoder, replace(config, layer_idx=tuple(sorted(set(chosen)))))
        self.layers = nn.ModuleDict(
            {str(i): ClusterLayer(decoder.width, self.config) for i in self.config.layer_idx}
        )

    @property
    def trains_base(self) -> bool:
        return not self.config.freeze_base

    def slots_wanted(self, lengths: Tensor, ratio: float | None, budget: int | None) -> Tensor:
        """The threshold decides, unless a ratio or budget (for the first chosen layer) is asked for."""
        if ratio is None and budget is None:
            return lengths
        if self.config.mode == "quality":
            raise ValueError(
                "clusters in mode quality keep every position: a ratio or budget needs mode length"
            )
        return super().slots_wanted(lengths, ratio, budget)

    def _attention(self, i: int, h: Tensor, positions: Tensor, mask: Tensor) -> Tensor | None:
        """Head-mean attention [B, T, T] of layer i over the stream that enters it,
        where the config uses it."""
        if self.config.attention_weight <= 0:
            return None
        q, k, _ = self.decoder.qkv(i, h)
        q, k = self.decoder.rotate(q, positions), self.decoder.rotate(k, positions)
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        T = mask.shape[1]
        seen = torch.ones(T, T, dtype=torch.bool, device=h.device).tril() & mask[:, None, :]
        logits = (q @ k.mT).float() * q.shape[-1] ** -0.5
        return logits.masked_fill(~seen[:, None], torch.finfo(torch.float32).min).softmax(-1).mean(1)

    def run(
        self, ids: Tensor, mask: Tensor, state: CompressedContext | None = None, budget: Tensor | None = None
    ):
        """Packed ids [B, T] through all layers: (h, mask, layers [(keys, values, mask)], aux)."""
        start = mask.sum(1) * 0 if state is None else state.next_position
        past = None if state is None else self.lower(state)
        positions = text_positions(mask, start)
        self.decoder.check_length(int(positions.max()) + 1 if positions.numel() else 0, ids.shape[1])
        h, kv, aux = self.decoder.stem(self.decoder.embed(ids), positions), [], []
        options: dict[str, Any] = {
            "past": past,
            "checkpoint": self.config.gradient_checkpointing and self.training,
        }
        begin = 0
        for layer in self.config.layer_idx:
            run = self.decoder.run(
                h, positions, mask, start=begin, stop=layer + 1, keep_states=True, **options
            )
            kv += [(k, v, mask) for k, v in run.kv]
            attention = self._attention(layer, run.states[-1], positions, mask)
            made: Clustered = self.layers[str(layer)](run.hidden, mask, ids, attention, budget)
            aux.append(made.aux)
            h, budget, begin = made.rebuilt, None, layer + 1
            if self.config.mode == "length":
                index, mask = compact(made.shown)
                h = made.centred.gather(1, index[..., None].expand(-1, -1, h.shape[2]))
                positions, ids = positions.gather(1, index), ids.gather(1, index)
        run = self.decoder.run(h, positions, mask, start=begin, **options)
        kv += [(k, v, mask) for k, v in run.kv]
        total = merge_aux(aux)
        return run.hidden, kv, Aux(total.losses, {k: v / len(aux) for k, v in total.stats.items()})

    def _compress(self, ids, mask, slots, state):
        budget = slots if bool((slots < mask.sum(1)).any()) else None
        _, kv, aux = self.run(ids, mask, state, budget)
        start = mask.sum(1) * 0 if state is None else state.next_position
        source = mask.sum(1) + (0 if state is None else state.source_length)
        layers = join(self.decoder, state, [LayerSlots(*x) for x in kv])
        return self._cached(layers, source, start + mask.sum(1), aux=aux)

    def through(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None):
        """Mode quality over a text itself: every position reads rebuilt states of the positions before it.

        input_ids [B, T] in any padding; logits [B, T, V] and the loss over `labels` belong to rows packed
        left.
        """
        if self.config.mode != "quality":
            raise ValueError("`through` needs mode quality: in mode length most positions have no output")
        mask = checked_mask(input_ids, attention_mask, self.decoder.config.pad_token_id, "through")
        ids, keep = pack(input_ids, mask)
        h, _, aux = self.run(ids, keep)
        logits = self.decoder.head(h)
        if labels is None:
            return CompressorOutput(None, logits, stats=dict(aux.stats))
        targets = pack(labels, mask)[0].masked_fill(~keep, -100)
        losses = {
            "lm": token_losses(logits, targets).sum() / targets[:, 1:].ne(-100).sum().clamp_min(1),
            **aux.losses,
        }
        return CompressorOutput(
            torch.stack(list(losses.values())).sum(), logits, None, losses, dict(aux.stats)
        )

    def layer_hooks(self):
        if self.config.mode != "quality" or self.config.attention_weight > 0:
            return {}
        return {
            i: lambda h, mask, i=i: self.layers[str(i)](h, mask, None).rebuilt for i in self.config.layer_idx
        }

    def parachute(self, ratio: float) -> float:
        """Loosen or tighten after a validation: ratio = compressed loss / base loss. Above 1.5 thresholds
        rise by
        .05 (to .95 at most), below .8 they fall by .01 (to .75 at least). Returns the new threshold."""
        tau = 0.0
        for layer in self.layers.values():
            assert isinstance(layer, ClusterLayer)
            tau = float(layer.tau)
            if ratio > 1.5:
                tau = min(tau + 0.05, max(0.95, tau))
            elif ratio < 0.8:
                tau = max(tau - 0.01, min(0.75, tau))
            layer.tau.fill_(tau)
        return tau
