"""Vector quantization: codes are learned vectors. Plain, grouped, residual, and with a turned table.

Shape legend: B batch  T time  D model width  C channels  N codes  G groups  S stages  c channels of a code
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from model.core import Aux, Cost
from model.quant.base import Quantizer, code_stats, straight_through
from model.quant.codebook import Codebook, commitment, nearest
from model.registry import quantizer

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class VectorQuantizer(Quantizer):
    """What quantizers with tables share: `books` of N codes each, one code of each book per token."""

    sizes: Tensor

    def __init__(self, dim: int, *, channels: int, books: int, codes: int, commit: float, norm: bool) -> None:
        super().__init__(dim, channels=channels, norm=norm)
        self.codes, self.commit = codes, commit
        self.register_buffer("sizes", torch.full((books,), codes), persistent=False)

    @property
    def bits_per_token(self) -> float:
        return len(self.sizes) * math.log2(self.codes)

    def stats(self, codes: Tensor, keep: Tensor | None) -> dict[str, Tensor]:
        return code_stats(codes, self.sizes, keep, self.bits_per_token)

    @property
    def collects(self) -> bool:
        """A forward counts for the moving averages in training alone; a frozen quantizer's tables rest."""
        return self.training and torch.is_grad_enabled() and self.a.weight.requires_grad

    def check(self, codes: Tensor) -> None:
        if torch.compiler.is_compiling() or not codes.numel():
            return
        if int(codes.min()) < 0 or int(codes.max()) >= self.codes or codes.shape[-1] != len(self.sizes):
            raise IndexError(f"want {len(self.sizes)} codes a token, each in 0..{self.codes - 1}")

    @property
    def tables(self) -> list[Codebook]:
        return [m for m in self.modules() if isinstance(m, Codebook)]

    def upkeep(self, ranks: ProcessGroup | None = None) -> None:
        if self.a.weight.requires_grad:
            for book in self.tables:
                book.upkeep(ranks)


@quantizer("vq")
class VQ(VectorQuantizer):
    """The nearest of N codes for each of G groups of channels; tables move by averages (see `codebook`).

    codes: N a group.  groups: G, divides channels.  commit: weight of |z - sg(code)|^2, which keeps z near
    its code.  cosine: compare on the sphere of radius sqrt(C / G).  decay, dead: see `Codebook`.
    Raises ValueError when groups does not divide channels.
    """

    def __init__(
        self,
        dim: int,
        *,
        channels: int = 32,
        codes: int = 256,
        groups: int = 1,
        commit: float = 0.25,
        cosine: bool = False,
        decay: float = 0.99,
        dead: float = 0.05,
        norm: bool = True,
    ) -> None:
        if groups < 1 or channels % groups:
            raise ValueError(f"groups={groups} must divide channels={channels}")
        super().__init__(dim, channels=channels, books=groups, codes=codes, commit=commit, norm=norm)
        self.books = nn.ModuleList(
            Codebook(codes, channels // groups, decay=decay, dead=dead, cosine=cosine) for _ in range(groups)
        )

    def encode_z(self, z: Tensor) -> Tensor:
        parts = z.unflatten(-1, (len(self.books), -1)).unbind(-2)
        return torch.stack([book.nearest(part) for book, part in zip(self.tables, parts)], dim=-1)

    def decode_codes(self, codes: Tensor) -> Tensor:
        self.check(codes)
        return torch.cat([book.lookup(k) for book, k in zip(self.tables, codes.unbind(-1))], dim=-1).float()

    def quantize(self, z: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Aux]:
        codes = self.encode_z(z)
        parts = z.unflatten(-1, (len(self.books), -1)).unbind(-2)
        grid = torch.cat([book.lookup(k) for book, k in zip(self.tables, codes.unbind(-1))], -1).to(z.dtype)
        if self.collects:
            for book, part, k in zip(self.tables, parts, codes.unbind(-1)):
                book.collect(part, k, keep)
        losses = {"commit": self.commit * commitment(z, grid, keep)}
        return straight_through(z, grid), Aux(losses, self.stats(codes, keep))

    def cost(self, T: int) -> Cost:
        return Cost(flops=2.0 * T * self.code_dim * self.codes)


@quantizer("rvq")
class ResidualVQ(VectorQuantizer):
    """S tables in a row, each for what the ones before left over (SoundStream, arXiv 2107.03312).

    codes: N a stage.  stages: S.  Others as in `vq`.
    The search is greedy: what decodes may, encoded anew, get other codes that lie as near.
    Raises ValueError when stages < 1.
    """

    def __init__(
        self,
        dim: int,
        *,
        channels: int = 32,
        codes: int = 256,
        stages: int = 4,
        commit: float = 0.25,
        decay: float = 0.99,
        dead: float = 0.05,
        norm: bool = True,
    ) -> None:
        if stages < 1:
            raise ValueError(f"stages={stages} must be at least 1")
        super().__init__(dim, channels=channels, books=stages, codes=codes, commit=commit, norm=norm)
        self.books = nn.ModuleList(Codebook(codes, channels, decay=decay, dead=dead) for _ in range(stages))
        for s, book in enumerate(self.tables):  # what is left shrinks, and so do the tables at first
            book.table *= 2.0**-s
            book.mean *= 2.0**-s

    def _search(self, z: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Codes [..., S], their sum [..., C], and what each stage was given."""
        left, found, given = z.detach(), [], []
        for book in self.tables:
            given.append(left)
            found.append(book.nearest(left))
            left = left - book.lookup(found[-1]).to(z.dtype)
        return torch.stack(found, dim=-1), z.detach() - left, given

    def encode_z(self, z: Tensor) -> Tensor:
        return self._search(z)[0]

    def decode_codes(self, codes: Tensor) -> Tensor:
        self.check(codes)
        parts = [book.lookup(k) for book, k in zip(self.tables, codes.unbind(-1))]
        return torch.stack(parts).sum(0).float()

    def quantize(self, z: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Aux]:
        codes, grid, given = self._search(z)
        if self.collects:
            for book, left, k in zip(self.tables, given, codes.unbind(-1)):
                book.collect(left, k, keep)
        losses = {"commit": self.commit * commitment(z, grid, keep)}
        return straight_through(z, grid), Aux(losses, self.stats(codes, keep))

    def cost(self, T: int) -> Cost:
        return Cost(flops=2.0 * T * self.code_dim * self.codes * len(self.sizes))


@quantizer("simvq")
class SimVQ(VectorQuantizer):
    """A fixed random table turned by one learned matrix, so that every code moves at every step and none
    dies (SimVQ, arXiv 2411.02038): codes = table W, loss |sg(z) - code|^2 + commit |z - sg(code)|^2.

    codes: N.  commit: see above.  No moving averages: `upkeep` has nothing to do.
    """

    table: Tensor

    def __init__(
        self, dim: int, *, channels: int = 32, codes: int = 256, commit: float = 0.25, norm: bool = True
    ) -> None:
        super().__init__(dim, channels=channels, books=1, codes=codes, commit=commit, norm=norm)
        if codes < 2:
            raise ValueError(f"codes={codes} must be at least 2")
        self.register_buffer("table", torch.randn(codes, channels))
        self.turn = nn.Parameter(torch.eye(channels))

    def turned(self, dtype: torch.dtype) -> Tensor:
        """[N, C]: the codes as they are."""
        return self.table.to(dtype) @ self.turn.to(dtype)

    def encode_z(self, z: Tensor) -> Tensor:
        with torch.no_grad():
            return nearest(z, self.turned(z.dtype))[..., None]

    def decode_codes(self, codes: Tensor) -> Tensor:
        self.check(codes)
        return self.turned(torch.float32)[codes[..., 0]]

    def quantize(self, z: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Aux]:
        table = self.turned(z.dtype)
        codes = nearest(z.detach(), table.detach())
        grid = nn.functional.embedding(codes, table)
        losses = {
            "codes": commitment(z.detach(), grid, keep),
            "commit": self.commit * commitment(z, grid.detach(), keep),
        }
        return straight_through(z, grid), Aux(losses, self.stats(codes[..., None], keep))

    def cost(self, T: int) -> Cost:
        """The search. Turning the table, 2 N C^2 once a call, belongs to no row and is not counted."""
        return Cost(flops=2.0 * T * self.code_dim * self.codes)
