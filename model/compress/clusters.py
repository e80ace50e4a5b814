"""Clusters: tokens whose states are alike share one representative, causally, at one or several layers.

    h_j joins the most similar earlier representative c(j) if S_jc > tau_j and it is not protected
    tau_j = clamp(tau_0 + (1 - tau_0) q95(similarities so far) + .1 (sigmoid(w . mean h so far) - 1/2),
                  tau_0, .98)
    h^_j  = c(j) + g * R(h_j - c(j))     R: bottleneck D -> D/4 -> D, stored sparse in 8 bits; g: learned gate

Modes. quality: later layers read h^ at full length. A context keeps the caches up to the first chosen layer
and, in `extras`, the code of the stream at each of them: representatives, whose each token is, residuals. The
caches of later layers are run from the code whenever the context is read (`lower`), so what is stored shrinks
and what is held while decoding does not. In training mode, where gradients must flow, caches are kept.
length: later layers read representatives alone, each moved to the mean of its cluster (through the same gate
and bottleneck), at its original position; the cache of those layers shrinks, and no code is kept.
Either way `CompressedContext.bytes` measures every bit that is stored.
Without residuals, adaptive threshold and importance there is nothing to train: the post-hoc mode.

Shape legend: B batch  T time  S slots  D hidden width.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from model.compress.base import CompressorOutput, ContextCompressor, compressor
from model.compress.caches import joined
from model.compress.cluster_layer import Clustered, ClusterLayer, ClustersConfig
from model.compress.clustering import Code
from model.compress.context import CompressedContext, LayerSlots, tight
from model.compress.decoder import Decoder
from model.compress.rows import checked_mask, pack, text_positions, token_losses
from model.core import Aux, merge_aux
from model.ops.pairs import compact


@compressor("clusters")
class Clusters(ContextCompressor):
    """A cache: full length up to the first chosen layer, representatives (or the code of rebuilt tokens)
    after it."""

    Config = ClustersConfig
    gives = "cache"

    def __init__(self, decoder: Decoder, config: ClustersConfig) -> None:
        for name, allowed in (("mode", ("length", "quality")), ("residual", ("bottleneck", "identity"))):
            if getattr(config, name) not in allowed:
                raise ValueError(
                    f"clusters {name}={getattr(config, name)!r}; there are {' and '.join(allowed)}"
                )
        if not 0 <= config.residual_bits <= 8:
            raise ValueError(
                f"clusters residual_bits={config.residual_bits}: stored values are bytes of 1 to 8 bits, "
                "or exact (0)"
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
        self,
        ids: Tensor,
        mask: Tensor,
        state: CompressedContext | None = None,
        budget: Tensor | None = None,
        keep_code: bool = False,
    ) -> tuple[Tensor, list[LayerSlots], dict[int, Code], Aux]:
        """Packed ids [B, T] through all layers: h [B, T', D], every layer's slots, the code of the stream at
        the chosen layers (with keep_code), losses and statistics."""
        start = mask.sum(1) * 0 if state is None else state.next_position
        past = None if state is None else self.lower(state)
        positions = text_positions(mask, start)
        self.decoder.check_length(int(positions.max()) + 1 if positions.numel() else 0, ids.shape[1])
        h, kv, aux = self.decoder.stem(self.decoder.embed(ids), positions), [], []
        codes: dict[int, Code] = {}
        options: dict[str, Any] = {
            "past": past,
            "checkpoint": self.config.gradient_checkpointing and self.training,
        }
        begin = 0
        for layer in self.config.layer_idx:
            run = self.decoder.run(
                h, positions, mask, start=begin, stop=layer + 1, keep_states=True, **options
            )
            kv += [LayerSlots(k, v, mask) for k, v in run.kv]
            attention = self._attention(layer, run.states[-1], positions, mask)
            made: Clustered = self._layer(layer)(run.hidden, mask, ids, attention, budget)
            aux.append(made.aux)
            if keep_code:
                codes[layer] = self._layer(layer).code(run.hidden, made, mask)
            h, budget, begin = made.rebuilt, None, layer + 1
            if self.config.mode == "length":
                index, mask = compact(made.shown)
                h = made.centred.gather(1, index[..., None].expand(-1, -1, h.shape[2]))
                positions, ids = positions.gather(1, index), ids.gather(1, index)
        run = self.decoder.run(h, positions, mask, start=begin, **options)
        kv += [LayerSlots(k, v, mask) for k, v in run.kv]
        total = merge_aux(aux)
        means = {k: v / len(aux) for k, v in total.stats.items()}
        return run.hidden, kv, codes, Aux(total.losses, means)

    def _layer(self, i: int) -> ClusterLayer:
        layer = self.layers[str(i)]
        assert isinstance(layer, ClusterLayer)
        return layer

    def _compress(self, ids, mask, slots, state):
        budget = slots if bool((slots < mask.sum(1)).any()) else None
        coded = self.config.mode == "quality" and not self.training
        _, kv, codes, aux = self.run(ids, mask, state, budget, keep_code=coded)
        start = mask.sum(1) * 0 if state is None else state.next_position
        source = mask.sum(1) + (0 if state is None else state.source_length)
        extras: dict[str, Tensor] = {}
        if coded:
            extras = {} if state is None else dict(state.extras)
            first, piece = self.config.layer_idx[0] + 1, len(self._pieces(extras))
            none = mask[:, :0].clone()
            kv[first:] = [LayerSlots(x.keys[:, :, :0], x.values[:, :, :0], none) for x in kv[first:]]
            extras |= {f"{piece}.{i}.{k}": tight(v) for i, code in codes.items() for k, v in code.items()}
        held = None if state is None else super().lower(state) if coded else self.lower(state)
        layers = tuple(kv) if held is None else joined(held, kv)
        return self._cached(layers, source, start + mask.sum(1), aux=aux, extras=extras)

    @staticmethod
    def _pieces(extras: dict[str, Tensor]) -> list[dict[int, Code]]:
        """The codes of a context's pieces (one for each call that `state` continued), by layer."""
        pieces: list[dict[int, Code]] = []
        for name, tensor in sorted(extras.items(), key=lambda x: int(x[0].split(".")[0])):
            piece, layer, key = name.split(".")
            if int(piece) == len(pieces):
                pieces.append({})
            pieces[-1].setdefault(int(layer), {})[key] = tensor
        return pieces

    def lower(self, context: CompressedContext) -> tuple[LayerSlots, ...]:
        """The cache: what is kept of it, and the later layers run from the codes, piece after piece."""
        layers, pieces = super().lower(context), self._pieces(context.extras)
        rows = [next(iter(codes.values()))["member"].ge(0).sum(1) for codes in pieces]
        for p, codes in enumerate(pieces):
            start = context.next_position - torch.stack(rows[p:]).sum(0)
            new = []
            for begin, end in pairwise([*self.config.layer_idx, self.decoder.n_layers - 1]):
                h, mask = self._layer(begin).rebuild(codes[begin])
                run = self.decoder.run(
                    h, text_positions(mask, start), mask, past=layers, start=begin + 1, stop=end + 1
                )
                new += [LayerSlots(k, v, mask) for k, v in run.kv]
            first = self.config.layer_idx[0] + 1
            layers = (*layers[:first], *joined(layers[first:], new))
        return layers

    def through(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None):
        """Mode quality over a text itself: every position reads rebuilt states of the positions before it.

        input_ids [B, T] in any padding; logits [B, T, V] and the loss over `labels` belong to rows packed
        left.
        """
        if self.config.mode != "quality":
            raise ValueError("`through` needs mode quality: in mode length most positions have no output")
        mask = checked_mask(input_ids, attention_mask, self.decoder.config.pad_token_id, "through")
        ids, keep = pack(input_ids, mask)
        h, _, _, aux = self.run(ids, keep)
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
        return (
            {}
            if self.config.mode != "quality"
            else {i: partial(self._hook, i) for i in self.config.layer_idx}
        )

    def _hook(self, i: int, h: Tensor, mask: Tensor) -> Tensor:
        """The rebuilt stream inside the decoder's own forward, which tells neither ids nor attention."""
        for name in ("protect_ids", "attention_weight"):
            if getattr(self.config, name) > 0:
                raise ValueError(
                    f"clusters {name}={getattr(self.config, name)}: inside `attached` the decoder reads text "
                    "without the ids or the attention this needs; `through` and `compress` have them"
                )
        return self._layer(i)(h, mask, None).rebuilt

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
