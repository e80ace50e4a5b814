"""The final block of block-wise heads: a few slots, which see each other and the trunk's last states.

Shape legend: B batch  T time  D model width  N blocks  L slots of a block  W trunk states in sight  S = P + T
H query heads  G key/value heads  K head width

A block stands after an anchor, the last token that is finished: slot j is for the token j places after it. A
slot sees every slot of its block and the trunk's states at the anchor and the W - 1 tokens before it in the
document; nothing after the anchor, and no other block. Rotary positions count from the oldest of these.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from model.combine import Residual
from model.core import Docs
from model.heads.history import segments_of
from model.ops.attention import Places, attend
from model.ops.norm import RMSNorm
from model.ops.rope import rope, rope_tables
from model.registry import make_block
from model.schema import HeadConfig


class Blocks(NamedTuple):
    """Every token but the first of a document, in one block each.

    anchor [N] and token [N, L]: places in the flattened B*T; valid [N, L]: there is such a token.
    """

    anchor: Tensor
    token: Tensor
    valid: Tensor


def blocks_of(docs: Docs | None, B: int, T: int, size: int, phase: int, device: torch.device) -> Blocks:
    """Blocks of `size` tokens in every document, the first shortened by `phase` (0..size-1) tokens.

    Blocks with no token are left out.
    """
    segments = segments_of(docs, B, T, device)[0].flatten()
    if docs is None:
        positions = torch.arange(T, device=device).expand(B, T).flatten()
    else:
        positions = docs.positions.flatten()
    starts = (positions == 0) | ((positions + phase) % size == 0)
    anchor = (starts & (segments != -1)).nonzero().flatten()
    token = anchor[:, None] + torch.arange(1, size + 1, device=device)
    until = torch.cat([anchor[1:], anchor.new_full((1,), B * T - 1)])[: len(anchor)]
    safe = token.clamp_max(max(B * T - 1, 0))
    valid = (token <= until[:, None]) & (segments[safe] == segments[anchor][:, None])
    some = valid.any(1)
    return Blocks(anchor[some], safe[some], valid[some])


class Sight(NamedTuple):
    """Which trunk states each block sees: places [N, W] in the flattened B*S, seen [N, W] bool."""

    places: Tensor
    seen: Tensor


def sight_of(anchor: Tensor, segments: Tensor, window: int) -> Sight:
    """The `window` places up to each anchor [N], of its document; anchors and segments [B, S] flattened."""
    flat = segments.flatten()
    index = anchor[:, None] - window + 1 + torch.arange(window, device=anchor.device)
    safe = index.clamp_min(0)
    return Sight(safe, (index >= 0) & (flat[safe] == flat[anchor][:, None]))


class SlotLayer(nn.Module):
    """s -> s + attention(rms s; rms trunk), then a residual MLP. One softmax over trunk states and slots."""

    def __init__(self, dim: int, config: HeadConfig, norm_eps: float) -> None:
        super().__init__()
        # The registered block's parameters, and its checks of them, without its causal mask.
        params = {key: value for key, value in (config.attn or {}).items() if key != "window"}
        shape = make_block("attention", dim, **params)
        if (
            shape.position != "rope"
            or shape.sinks is not None
            or shape.q_norm
            or shape.conv_weight is not None
        ):
            raise ValueError(
                "attn of a head that says blocks: position, sinks, qk_norm and conv are not for it;"
                " it takes head_dim, group, heads and theta"
            )
        self.heads, self.kv_heads, self.head_dim = shape.heads, shape.kv_heads, shape.head_dim
        self.theta = shape.theta
        self.norm, self.trunk_norm = RMSNorm(dim, norm_eps), RMSNorm(dim, norm_eps)
        self.q_proj, self.k_proj = shape.q_proj, shape.k_proj
        self.v_proj, self.o_proj = shape.v_proj, shape.o_proj
        self.ffn = Residual(make_block("mlp", dim, **(config.ffn or {})), norm_eps)

    def forward(self, s: Tensor, trunk: Tensor, sight: Sight) -> Tensor:
        """s [N, L, D], trunk [B, S, D] -> [N, L, D]."""
        N, L, _ = s.shape
        W = sight.places.shape[1]
        x, memory = self.norm(s), self.trunk_norm(trunk).flatten(0, 1)
        place = torch.arange(W + L, device=s.device)[None]
        cos, sin = rope_tables(place, self.head_dim, self.theta, x.dtype)
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))
        k, v = (
            torch.cat([p(memory)[sight.places], p(x)], dim=1).unflatten(-1, (-1, self.head_dim))
            for p in (self.k_proj, self.v_proj)
        )
        q, k = rope(q, cos[:, W:], sin[:, W:]), rope(k, cos, sin)
        # All keys of a block stand at one place, so none is hidden as future; what is not seen is padding.
        at = Places(*(torch.zeros(N, L, dtype=torch.int64, device=s.device),) * 2)
        unseen = torch.cat([(~sight.seen).long(), at.positions], dim=1)
        y = attend(q, k.to(q.dtype), v.to(q.dtype), at=at, key_at=Places(torch.zeros_like(unseen), -unseen))
        return self.ffn(s + self.o_proj(y.flatten(2))).y

    def rest_flops(self, T: int, blocks: int, slots: int, window: int) -> float:
        """Beyond one use of every Linear a slot: keys and values of T trunk states, and the attention."""
        width = self.kv_heads * self.head_dim
        trunk = 2.0 * 2 * T * self.norm.weight.numel() * width
        return trunk + blocks * 4.0 * slots * (window + slots) * self.heads * self.head_dim


class SlotStack(nn.Module):
    """`layers` of them and a norm: slot inputs to the states that the table reads."""

    def __init__(self, dim: int, config: HeadConfig, norm_eps: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(SlotLayer(dim, config, norm_eps) for _ in range(config.layers))
        self.norm = RMSNorm(dim, norm_eps)

    def forward(self, s: Tensor, trunk: Tensor, sight: Sight) -> Tensor:
        for layer in self.layers:
            s = layer(s, trunk, sight)
        return self.norm(s)

    def rest_flops(self, T: int, blocks: int, slots: int, window: int) -> float:
        return sum(cast(SlotLayer, m).rest_flops(T, blocks, slots, window) for m in self.layers)
