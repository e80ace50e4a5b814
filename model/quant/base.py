"""The bracket of a quantizer: down to a few channels, onto a grid, and up again.

Shape legend: B batch  T time  D model width  C channels of the code

    enter: z = a(rms(x));  code = q(z)      exit: y = b(code)

From `a` to the rounding everything is fp32 (fp64 for fp64), under autocast too: bf16 pre-activations move
7.6 % of 256-level codes to a neighbour. `a` starts orthonormal and `b` as its pseudo-inverse, so that the
bracket starts near the identity on the channels it keeps.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.core import Aux, Bottleneck, Ctx, Entered, State, Step, at_least_fp32, docs_of
from model.ops.selection import Selector

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Quantizer(Bottleneck):
    """What all quantizers share; a subclass gives `encode_z`, `decode_codes` and `quantize`.

    channels: C, width of the code (an onion's `to`).
    norm:     divide each token by its root mean square before `a`, so that z has unit scale whatever the
              stream's scale is, which is what the grid is laid out for.

    Raises ValueError when channels < 1.
    """

    def __init__(self, dim: int, *, channels: int = 32, norm: bool = True) -> None:
        super().__init__(dim)
        if channels < 1:
            raise ValueError(f"channels={channels}: a code needs at least one channel")
        self.code_dim = channels
        self.norm = norm
        self.a = nn.Linear(dim, channels, bias=False)
        self.b = nn.Linear(channels, dim, bias=False)
        nn.init.orthogonal_(self.a.weight)
        with torch.no_grad():
            self.b.weight.copy_(self.a.weight.T)

    # ------------------------------------------------------------------------- the two halves

    def enter(self, x: Tensor, state: State | None = None, ctx: Ctx | None = None) -> Entered:
        """x [B, T, D] -> code [B, T, C] on the grid, in x's dtype."""
        docs = docs_of(ctx)
        keep = docs.tokens if docs is not None and docs.padded else None
        with torch.autocast(x.device.type, enabled=False):
            z_q, aux = self.quantize(self.down(x), keep)
        return Entered(z_q.to(x.dtype), ctx=ctx, aux=aux)

    def exit(
        self, code: Tensor, saved: object = None, state: State | None = None, ctx: Ctx | None = None
    ) -> Step:
        """code [B, T, C] -> y [B, T, D]."""
        return Step(self.b(code).to(code.dtype))

    def down(self, x: Tensor) -> Tensor:
        """x [B, T, D] -> z [B, T, C] before the grid, in fp32 at least."""
        dtype = at_least_fp32(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(dtype)
            if self.norm:
                x = F.rms_norm(x, (self.dim,), eps=1e-8)
            return F.linear(x, self.a.weight.to(dtype))

    # ------------------------------------------------------------------------- the grid

    def bound(self, z: Tensor) -> Tensor:
        """The smooth part of the map onto the grid, whose gradient `quantize` has; here none."""
        return z

    @abstractmethod
    def quantize(self, z: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Aux]:
        """z [B, T, C] -> (z_q [B, T, C] on the grid, by-products). Gradients pass straight through.

        keep: [B, T] bool, tokens that count in statistics and losses; None is all of them.
        """

    @abstractmethod
    def encode_z(self, z: Tensor) -> Tensor:
        """z [..., C] -> codes, int64 [..., K]."""

    @abstractmethod
    def decode_codes(self, codes: Tensor) -> Tensor:
        """Codes [..., K] -> their grid values [..., C], fp32."""

    def encode(self, x: Tensor) -> Tensor:
        """x [B, T, D] -> codes, int64 [B, T, K]: what to store. K is C for a quantizer of channels."""
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            return self.encode_z(self.down(x))

    @property
    @abstractmethod
    def bits_per_token(self) -> float:
        """What a token's codes take when each is written in full."""


def upkeep(model: nn.Module, ranks: ProcessGroup | None = None) -> None:
    """The upkeep of every bracket and selector of a model: once after each optimizer step, on every rank.

    ranks: the process group that trains this one model; None: this process alone. Statistics are summed over
    these ranks and no others: DiLoCo workers in one launch must not mix theirs.
    """
    for module in model.modules():
        if isinstance(module, Bottleneck | Selector):
            module.upkeep(ranks)


def straight_through(z: Tensor, grid: Tensor) -> Tensor:
    """The value of `grid` with the gradient of `z`."""
    return z + (grid - z).detach()


@torch.no_grad()
def code_stats(codes: Tensor, sizes: Tensor, keep: Tensor | None, bits: float) -> dict[str, Tensor]:
    """What a batch of codes looks like; padding (keep False) does not count. Empty for T = 1: a step of
    generation is no sample, and must not pay for one.

    codes: int64 [B, T, K].  sizes: int64 [K], codes there are.
    usage:        share of the codes that occur, mean over K.
    perplexity:   2^entropy, mean over K: how many codes are in effective use.
    entropy_bits: sum of the K entropies, bits per token after ideal coding of each by itself.
    bits:         nominal bits per token.
    """
    if codes.shape[-2] == 1:
        return {}
    K, size = codes.shape[-1], int(sizes.max())
    flat = codes.reshape(-1, K) + torch.arange(K, device=codes.device) * size
    weight = torch.ones_like(flat, dtype=torch.float32)
    if keep is not None:
        weight = weight * keep.reshape(-1, 1)
    counts = torch.zeros(K * size, device=codes.device).scatter_add_(0, flat.flatten(), weight.flatten())
    counts = counts.view(K, size)
    p = counts / counts.sum(1, keepdim=True).clamp_min(1)
    entropy = -torch.special.xlogy(p, p).sum(1) / math.log(2)
    return {
        "usage": ((counts > 0).sum(1) / sizes).mean(),
        "perplexity": torch.exp2(entropy).mean(),
        "entropy_bits": entropy.sum(),
        "bits": torch.tensor(bits, device=codes.device),
    }
