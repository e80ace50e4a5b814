"""Projections of attention with grouped key/value heads, and their rotation by position.

Shape legend: B batch  T time  D model width  H query heads  G key/value heads  K head width
"""

from __future__ import annotations

from torch import Tensor, nn

from model.core import Block, Ctx, rotary_positions
from model.ops.rope import check_rope, rope, rope_tables


class GroupedHeads(Block):
    """q_proj k_proj v_proj o_proj, named as in transformers' Llama; group query heads share a k and a v.

    heads: H; None is dim / head_dim.    rotary: q and k will be turned, which wants an even head_dim.
    Raises ValueError when heads, head_dim and group do not divide, and for sizes below 1.
    """

    def __init__(
        self,
        dim: int,
        head_dim: int,
        group: int,
        heads: int | None,
        *,
        rotary: bool = True,
        theta: float = 10_000.0,
    ) -> None:
        super().__init__(dim)
        heads = _heads(dim, head_dim, heads)
        if group < 1 or heads % group:
            raise ValueError(f"group={group} must divide the {heads} query heads")
        if rotary:
            check_rope(head_dim, theta)
        self.heads, self.kv_heads, self.head_dim, self.theta = heads, heads // group, head_dim, theta
        self.q_proj = nn.Linear(dim, heads * head_dim, bias=False)
        self.k_proj = nn.Linear(dim, self.kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(dim, self.kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(heads * head_dim, dim, bias=False)
        self.o_proj.residual_out = True  # type: ignore[assignment]
        self.row_groups = {"q_proj.weight": heads, "k_proj.weight": self.kv_heads}

    def split(self, project: nn.Linear, x: Tensor) -> Tensor:
        """One projection of x [B, T, D], by heads: [B, T, H or G, K]."""
        return project(x).unflatten(-1, (-1, self.head_dim))

    def turn(self, x: Tensor, positions: Tensor) -> Tensor:
        """Heads [B, T, H, K] turned by their positions [B, T] or [1, T]."""
        return rope(x, *rope_tables(positions, self.head_dim, self.theta, x.dtype))

    def turned(self, x: Tensor, ctx: Ctx | None, seen: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, T, H, K] and k [B, T, G, K], turned, and v. seen: [B], tokens before this call, or None."""
        B, T = x.shape[:2]
        positions = rotary_positions(ctx, seen, B, T, x.device)
        tables = rope_tables(positions, self.head_dim, self.theta, x.dtype)
        q, k = self.split(self.q_proj, x), self.split(self.k_proj, x)
        return rope(q, *tables), rope(k, *tables), self.split(self.v_proj, x)


def _heads(dim: int, head_dim: int, heads: int | None) -> int:
    if head_dim < 1 or (heads is not None and heads < 1):
        raise ValueError(f"head_dim={head_dim}, heads={heads}: must be at least 1")
    if heads is not None:
        return heads
    if dim % head_dim:
        near = [d for d in range(min(dim, head_dim), 0, -1) if dim % d == 0 and d % 2 == 0]
        hint = f" (for example head_dim={near[0]})" if near else ""
        raise ValueError(
            f"dim={dim} is not a multiple of head_dim={head_dim}: change one{hint}, or set heads"
        )
    return dim // head_dim
