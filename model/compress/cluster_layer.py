"""One clustered layer: its options, thresholds and residuals, and its stream as it is stored.

Shape legend: B batch  T time  D hidden width  R representatives  J tokens that joined one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.compress import clustering as ops
from model.compress.base import CompressorConfig
from model.core import Aux
from model.ops.pairs import compact


@dataclass(frozen=True)
class ClustersConfig(CompressorConfig):
    """mode: length (the cache shrinks) or quality (what is stored does).
    compression_layers: k, at layers i n // (k + 1); layer_idx names them instead.
    similarity_threshold: tau_0; 2 or more switches clustering off.  adaptive_threshold: tau_j as above.
    levels, level_step: cluster the representatives again, each time with a threshold lower by level_step.
    importance: learn which tokens to protect (above mean plus deviation of those before).
    protect_ids: token ids below this are protected.
    attention_weight: w_a of the attention term in S.  position_reach: tokens over which S decays by e.
    use_residuals, residual (bottleneck | identity), gated, residual_sparsity, residual_levels.
    residual_bits: 1 to 8 bits, stored as bytes; 0: exact.
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
    """Clustering of one layer's outgoing stream, in the dtype of its own tensors whatever the stream's.
    tau is a buffer, so that the parachute's changes are saved."""

    tau: Tensor

    def __init__(self, width: int, config: ClustersConfig) -> None:
        super().__init__()
        self.config, narrow = config, max(1, width // 4)
        self.code_width = narrow if config.residual == "bottleneck" else width
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

    @property
    def _storage(self) -> tuple[float, int, int]:
        return self.config.residual_sparsity, self.config.residual_bits, self.config.residual_levels

    def latent(self, r: Tensor) -> Tensor:
        """What is stored of residuals r [B, T, D], before it is made sparse and quantised: [B, T, C]."""
        return r if self.config.residual == "identity" else self.down(r)

    def back(self, c: Tensor, z: Tensor) -> Tensor:
        """g * R from stored residuals z [B, T, C] and their representatives c [B, T, D]."""
        if self.config.residual == "identity":
            back = z
        else:
            back = self.up(z)
            back = back + self.enhancer(torch.cat([c, back], -1))
        return back * torch.sigmoid(self.gate(back)) if self.config.gated else back

    def code(self, h: Tensor, made: Clustered, mask: Tensor) -> ops.Code:
        """The clustered stream as it is stored, `made` from h [B, T, D]: heads [B, R, D], the
        representatives; member int32 [B, T], which of them each token belongs to (-1: padding); and the
        residuals [B, J, ...] of the tokens that joined, as `clustering.encode` keeps them."""
        index, keep = compact(made.shown)
        number = made.shown.cumsum(1) - 1
        member = number.gather(1, made.member).masked_fill(~mask, -1).int()
        code = {"heads": rows_at(h, index) * keep[..., None], "member": member}
        if self.config.use_residuals:
            h, (index, keep) = h.to(self.tau.dtype), compact(mask & ~made.shown)
            r = rows_at(h - rows_at(h, made.member), index) * keep[..., None]
            code |= ops.encode(self.latent(r), *self._storage)
        return code

    def rebuild(self, code: ops.Code) -> tuple[Tensor, Tensor]:
        """The rebuilt stream [B, T, D] and its mask [B, T], from what `code` stored."""
        heads, member = code["heads"], code["member"].long()
        mask = member >= 0
        c = rows_at(heads.to(self.tau.dtype), member.clamp_min(0))
        # Representatives are numbered as they come, so each has a higher number than all before it.
        joined = mask & (member <= nn.functional.pad(member.cummax(1).values, (1, -1), value=-1))
        if not self.config.use_residuals or not bool(joined.any()):
            return c.to(heads.dtype), mask
        z = ops.decode({k: v for k, v in code.items() if k not in ("heads", "member")}, self.code_width)
        z = rows_at(z, (joined.cumsum(1) - 1).clamp_min(0))
        return torch.where(joined[..., None], c + self.back(c, z), c).to(heads.dtype), mask

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
        config, given, h = self.config, h.dtype, h.to(self.tau.dtype)
        s = ops.similarity(h, attention, config.attention_weight, config.position_reach)
        worth = cut = torch.zeros(mask.shape, device=h.device)
        if config.importance:
            worth = torch.sigmoid(self.importance(h))[..., 0]
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
        made = self._rebuild(h, s, tau, worth - cut, member, best, shown, mask)
        return made._replace(rebuilt=made.rebuilt.to(given), centred=made.centred.to(given))

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
        c = rows_at(h, candidate)
        back = torch.zeros_like(h)
        if config.use_residuals:
            back = self.back(c, ops.stored(self.latent(h - c), *self._storage))
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
        ratio = mask.sum(1).clamp_min(1) / shown.sum(1).clamp_min(1)
        return Aux(losses, {"ratio": ratio.float().mean(), "tau": self.tau.clone()})


def rows_at(x: Tensor, index: Tensor) -> Tensor:
    """x [B, T, D] at index int64 [B, S] -> [B, S, D]."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))
