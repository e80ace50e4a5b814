"""One bit a channel: the sign. No table and no search.

Shape legend: B batch  T time  D model width  C channels of the code

lfq  Yu et al., "Language model beats diffusion: tokenizer is key" (arXiv 2310.05737): code = sign(z).
bsq  Zhao et al., "Image and video tokenization with binary spherical quantization" (arXiv 2406.07548):
     z is first put on the sphere of radius sqrt(C), whose points lie within a bounded distance of a code.

Both add entropy * (mean entropy of a bit given its token - entropy of the mean bit), channel by channel:
each token should be sure of its bits, and over tokens each bit should be used both ways. With bits
independent given the token this is BSQ's closed form of LFQ's loss over all 2^C codes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model.core import Aux
from model.quant.base import Quantizer, code_stats, straight_through
from model.quant.codebook import commitment
from model.registry import quantizer


@quantizer("lfq")
class LFQ(Quantizer):
    """Bits sign(z) on the grid {-1, 1}.

    entropy: weight of the entropy loss.  commit: weight of |z - sg(code)|^2.
    sharpness: k of p(bit = 1 | z) = sigmoid(4 k z), the softmax over -k (z -+ 1)^2.
    """

    sizes: Tensor

    def __init__(
        self,
        dim: int,
        *,
        channels: int = 32,
        entropy: float = 0.1,
        commit: float = 0.25,
        sharpness: float = 1.0,
        norm: bool = True,
    ) -> None:
        super().__init__(dim, channels=channels, norm=norm)
        self.entropy, self.commit, self.sharpness = entropy, commit, sharpness
        self.register_buffer("sizes", torch.full((channels,), 2), persistent=False)

    @property
    def bits_per_token(self) -> float:
        return float(self.code_dim)

    def encode_z(self, z: Tensor) -> Tensor:
        """z [..., C] -> bits, int64 [..., C]."""
        return (z > 0).to(torch.int64)

    def decode_codes(self, codes: Tensor) -> Tensor:
        """Bits [..., C] -> -1 or 1. Raises IndexError for anything but 0 and 1."""
        if not torch.compiler.is_compiling() and bool(((codes < 0) | (codes > 1)).any()):
            raise IndexError("a code of one bit must be 0 or 1")
        return codes.float() * 2 - 1

    def quantize(self, z: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Aux]:
        z = self.bound(z)
        codes = self.encode_z(z)
        grid = codes.to(z.dtype) * 2 - 1
        losses = {
            "entropy": self.entropy * self._entropy_loss(z, keep),
            "commit": self.commit * commitment(z, grid, keep),
        }
        return straight_through(z, grid), Aux(
            losses, code_stats(codes, self.sizes, keep, self.bits_per_token)
        )

    def _entropy_loss(self, z: Tensor, keep: Tensor | None) -> Tensor:
        """Mean over channels of H(bit | token) - H(bit), in nats."""
        p = torch.sigmoid(4 * self.sharpness * z).flatten(0, -2)
        weight = torch.ones_like(p[:, :1]) if keep is None else keep.reshape(-1, 1).to(p.dtype)
        total = weight.sum().clamp_min(1)
        return ((_entropy(p) * weight).sum(0) / total - _entropy((p * weight).sum(0) / total)).mean()


@quantizer("bsq")
class BSQ(LFQ):
    """`lfq` on the sphere of radius sqrt(C); the parameters are the same."""

    def bound(self, z: Tensor) -> Tensor:
        return F.normalize(z, dim=-1) * self.code_dim**0.5


def _entropy(p: Tensor) -> Tensor:
    """Entropy of a bit with probability p, in nats; its gradient is finite at 0 and 1."""
    p = p.clamp(1e-6, 1 - 1e-6)
    return -(p * p.log() + (1 - p) * (1 - p).log())
