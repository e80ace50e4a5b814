"""Choosing tokens by a learned score, each by itself: causal, in training too.

Shape legend: B batch  T time  D width
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from model.ops.dtypes import at_least_fp32


class Selector(nn.Module):
    """s = w . rms(x); a token is chosen when s exceeds a moving average of the scores' (1 - keep)-quantile.

    So the share `keep` of the tokens is chosen on average, and a token's choice depends on itself and on past
    batches alone. The choice has no gradient: whoever uses it scales what it takes by a function of s.

    keep:  share, in (0, 1]; 1 chooses every token.
    decay: of the moving average, per optimizer step (`upkeep`). Scores drift fast early in training, and a
           slow average then keeps far too few tokens or too many.
    Raises ValueError outside these ranges.
    """

    threshold: Tensor

    def __init__(self, dim: int, keep: float, decay: float = 0.5) -> None:
        super().__init__()
        if not 0 < keep <= 1:
            raise ValueError(f"keep={keep}: a share of the tokens, above 0 and up to 1")
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay}: must be in [0, 1)")
        self.keep, self.decay = keep, decay
        self.score = nn.Linear(dim, 1, bias=False)
        nn.init.normal_(self.score.weight, std=dim**-0.5)  # scores of unit variance, whose quantile is known
        quantile = math.sqrt(2) * torch.erfinv(torch.tensor(1 - 2 * keep, dtype=torch.float64, device="cpu"))
        self.register_buffer("threshold", torch.full((), float(quantile)))  # -inf for keep = 1
        self._sum: Tensor | None = None
        self._calls = 0

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, D] -> scores [B, T], in fp32 or fp64."""
        with torch.autocast(x.device.type, enabled=False):
            wide = x.to(at_least_fp32(x.dtype))
            normed = F.rms_norm(wide, wide.shape[-1:], eps=1e-6)
            return F.linear(normed, self.score.weight.to(wide.dtype))[..., 0]

    def choose(self, score: Tensor, tokens: Tensor | None = None) -> Tensor:
        """score [B, T] -> chosen, bool [B, T]. tokens: bool [B, T], False for padding.

        Scores count for the moving average in training alone; a frozen selector's threshold rests.
        """
        if self.training and self.score.weight.requires_grad:
            self.collect(score.detach().flatten() if tokens is None else score.detach()[tokens])
        chosen = score > self.threshold
        return chosen if tokens is None else chosen & tokens

    @torch.no_grad()
    def collect(self, score: Tensor) -> None:
        """Remember the quantile of a batch's scores [n]; counting a batch twice does not move the mean."""
        if self.keep < 1 and len(score):
            rank = min(max(math.ceil((1 - self.keep) * len(score)), 1), len(score))
            value = score.kthvalue(rank).values.to(self.threshold.dtype)
            self._sum = value if self._sum is None else self._sum + value
            self._calls += 1

    @torch.no_grad()
    def upkeep(self, ranks: dist.ProcessGroup | None = None) -> None:
        """Move the threshold towards what was collected since the last call; the same on every rank of the
        group `ranks` (None: this process alone)."""
        both = torch.stack([torch.zeros_like(self.threshold) if self._sum is None else self._sum,
                            self.threshold.new_tensor(float(self._calls))])  # fmt: skip
        self._sum, self._calls = None, 0
        if ranks is not None:
            dist.all_reduce(both, group=ranks)
        if both[1] > 0 and torch.isfinite(both).all():
            self.threshold.lerp_(both[0] / both[1], 1 - self.decay)
