"""A learned table of vectors, kept up by moving averages and never by gradients.

Shape legend: N codes  c channels of a code  M vectors

After van den Oord et al. (arXiv 1711.00937, appendix A): a code is the moving average of the vectors that
chose it. Forward only looks up and counts; `upkeep`, called once after the optimizer's step, sums the
counts over the ranks that train this model and moves the codes. (Inside forward it would break autograd,
run twice under activation checkpointing, and differ between ranks.) Counts enter as shares of the step's
vectors, so that a forward which is replayed changes nothing.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class Codebook(nn.Module):
    """N codes of c channels.

    decay:  of the moving averages, per step.
    dead:   a code whose average share falls below dead / N is moved onto a vector of the step.
    cosine: codes and vectors are compared, and codes kept, on the sphere of radius sqrt(c).

    Raises ValueError when codes < 2 or decay is outside [0, 1).
    """

    table: Tensor
    share: Tensor
    mean: Tensor

    def __init__(
        self, codes: int, channels: int, *, decay: float = 0.99, dead: float = 0.05, cosine: bool = False
    ) -> None:
        super().__init__()
        if codes < 2 or not 0 <= decay < 1:
            raise ValueError(f"codes={codes} must be at least 2 and decay={decay} in [0, 1)")
        self.decay, self.dead, self.cosine = decay, dead, cosine
        table = self.fit(torch.randn(codes, channels))
        self.register_buffer("table", table)
        self.register_buffer("share", torch.full((codes,), 1 / codes))
        self.register_buffer("mean", table / codes)  # share-weighted sum of the vectors of each code
        # Plain attributes: DDP copies buffers from rank 0 before every forward.
        self._counts: Tensor | None = None
        self._sums: Tensor | None = None
        self._sample: Tensor | None = None

    def fit(self, z: Tensor) -> Tensor:
        """z [..., c] as it is compared: itself, or on the sphere."""
        return F.normalize(z, dim=-1) * z.shape[-1] ** 0.5 if self.cosine else z

    @torch.no_grad()
    def nearest(self, z: Tensor) -> Tensor:
        """z [..., c] -> int64 [...]: the code with the least squared distance, the lower of equals."""
        return nearest(self.fit(z), self.table.to(z.dtype))

    def lookup(self, codes: Tensor) -> Tensor:
        """int64 [...] -> [..., c]."""
        return F.embedding(codes, self.table)

    @torch.no_grad()
    def collect(self, z: Tensor, codes: Tensor, keep: Tensor | None) -> None:
        """Remember which vectors z [..., c] chose which codes [...]; keep [...] False is padding."""
        z, codes = self.fit(z.detach()).flatten(0, -2).to(self.table.dtype), codes.flatten()
        if keep is not None:
            z, codes = z[keep.flatten()], codes[keep.flatten()]
        if not len(z):
            return
        counts = torch.zeros_like(self.share).index_add_(0, codes, torch.ones_like(z[:, 0]))
        sums = torch.zeros_like(self.table).index_add_(0, codes, z)
        self._counts = counts if self._counts is None else self._counts + counts
        self._sums = sums if self._sums is None else self._sums + sums
        # Evenly spaced vectors, so that no random state is needed to restart codes.
        rows = torch.arange(len(self.table), device=z.device) * len(z) // len(self.table)
        self._sample = z[rows]

    @torch.no_grad()
    def upkeep(self, ranks: dist.ProcessGroup | None = None) -> None:
        """Move the codes by what was collected since the last call; the same on every rank of the group
        `ranks` (None: this process alone). Collected vectors that are not finite are dropped, as the
        optimizer drops such a step."""
        counts, sums, sample = self._gathered(ranks)
        if not counts.any() or not (torch.isfinite(sums).all() and torch.isfinite(sample).all()):
            return
        total = counts.sum()
        self.share.lerp_(counts / total, 1 - self.decay)
        self.mean.lerp_(sums / total, 1 - self.decay)
        dead = self.share < self.dead / len(self.share)
        self.mean[dead] = sample[dead] / len(self.share)
        self.share[dead] = 1 / len(self.share)
        self.table.copy_(self.fit(self.mean / self.share[:, None]))

    def _gathered(self, ranks: dist.ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor]:
        """What all ranks of the group collected; a rank that saw no token takes part with zeros."""
        counts = torch.zeros_like(self.share) if self._counts is None else self._counts
        sums = torch.zeros_like(self.table) if self._sums is None else self._sums
        sample = self.table.clone() if self._sample is None else self._sample
        self._counts = self._sums = self._sample = None
        if ranks is not None:
            dist.all_reduce(counts, group=ranks)
            dist.all_reduce(sums, group=ranks)
            dist.broadcast(sample, group=ranks, group_src=0)
        return counts, sums, sample


def nearest(z: Tensor, table: Tensor) -> Tensor:
    """z [..., c], table [N, c] -> int64 [...]: index of the nearest row, 2 N c operations a vector."""
    flat = z.flatten(0, -2)
    score = torch.addmm(table.pow(2).sum(1), flat, table.T, alpha=-2)
    return score.argmin(1).view(z.shape[:-1])


def commitment(z: Tensor, grid: Tensor, keep: Tensor | None) -> Tensor:
    """Mean squared distance of z [..., c] to grid, over the tokens that count; gradients reach both."""
    off = (z - grid).pow(2).mean(-1)
    if keep is None:
        return off.mean() if off.numel() else off.sum()
    return (off * keep).sum() / keep.sum().clamp_min(1)
