"""SparseK attention (Lou et al., arXiv 2406.16747) beside a window: constant memory, linear time.

Shape legend: B batch  T time  D model width  H query heads  G key/value heads  K head width
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.blocks._heads import GroupedHeads
from model.core import Cost, Ctx, Step, at_least_fp32, docs_of, positions_of
from model.ops.attention import Places
from model.ops.select import known_backend
from model.ops.sparsek import Sizes, SparseKState, sparsek, sparsek_flops
from model.registry import block


@block("sparsek")
class SparseK(GroupedHeads):
    """Attention to the last `window` tokens and to the best of those before them, by learned scores.

        u_j = w x_j + slope * j / window          p = clip(u - tau, 0, 1), sum p = keep

    one score per token and key/value head, independent of the query; values outside the window are scaled
    by p, which is how the scores learn. At most `slots` tokens outside the window are held: the causal,
    constant-memory form in which the paper generates, used for training too. See `model.ops.sparsek`.

    head_dim, group, heads, theta: as for `attention`.    slope: starts at 0.
    backend: of `model.ops.sparsek`.

    State: `SparseKState`, whose size does not depend on the context.
    Raises ValueError for widths that do not divide, or sizes that do not fit each other.
    """

    def __init__(
        self,
        dim: int,
        *,
        head_dim: int = 64,
        group: int = 1,
        heads: int | None = None,
        keep: int = 64,
        slots: int = 128,
        window: int = 256,
        theta: float = 10_000.0,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim, head_dim, group, heads, theta=theta)
        self.sizes = Sizes(keep, slots, window)
        self.sizes.check()
        self.backend = known_backend("sparsek", backend)
        self.score_proj = nn.Linear(dim, self.kv_heads, bias=False)
        self.slope = nn.Parameter(torch.zeros(self.kv_heads))

    def init_state(self, batch: int, like: Tensor, capacity: int | None = None) -> SparseKState:
        kv = like.new_zeros(batch, 0, self.kv_heads, self.head_dim)
        u = like.new_zeros(batch, 0, self.kv_heads, dtype=at_least_fp32(like.dtype))
        return SparseKState.empty(kv, kv, u, self.sizes)

    def forward(self, x: Tensor, state: SparseKState | None = None, ctx: Ctx | None = None) -> Step:
        docs, seen = docs_of(ctx), None if state is None else state.seen
        B, T, _ = x.shape
        q, k, v = self.turned(x, ctx, seen)
        positions = positions_of(docs, seen, B, T, x.device).expand(B, T)
        if docs is None:
            at = Places(positions, torch.zeros_like(positions))
            carried = torch.zeros(B, dtype=torch.int64, device=x.device)
        else:
            at, carried = Places(positions, docs.segments), docs.first_segment()
        y, after = sparsek(
            q, k, v, self._scores(x, positions), sizes=self.sizes, at=at, carried=carried, state=state,
            backend=self.backend,
        )  # fmt: skip
        if state is not None and after is not None:
            after = SparseKState(*(a.to(s.dtype) for a, s in zip(after, state)))
        return Step(self.o_proj(y.flatten(2)), after)

    def _scores(self, x: Tensor, positions: Tensor) -> Tensor:
        """[B, T, G] in fp32 at least: they choose, and equal scores in bf16 would not be equal in fp32."""
        wide = at_least_fp32(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            u = nn.functional.linear(x.to(wide), self.score_proj.weight.to(wide))
            return u + self.slope.to(wide) * (positions[..., None] / self.sizes.window)

    def cost(self, T: int) -> Cost:
        """FLOPs of the products, masked ones included."""
        number = self.k_proj.weight.element_size()
        token = self.kv_heads * (2 * self.head_dim * number + max(number, 4))
        held = (self.sizes.slots + self.sizes.window - 1) * token
        return Cost(float(sparsek_flops(T, self.heads, self.head_dim, self.sizes)), state_fixed=8.0 + held)
