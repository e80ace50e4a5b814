"""The token table: trained, or frozen rows of a pretrained model behind a trained linear map; whole, or
product-quantized.

Shape legend: V vocabulary  W width of the stored rows  D model width  B batch  T time
G groups  K codes of a group  c channels of a code
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import product
from model.schema import EmbedConfig, TableVQ


class Embed(nn.Module):
    """Token ids -> [B, T, D], and the matrix [V, D] that logits are read off.

    weight:  [V, W]. Without `from:` it is trained from N(0, std²) with W = D; std None: 1/sqrt(D).
             With `vq:` the tables [G, K, c] from which rows are put together by their codes.
    codes:   [V, G] ints, with `vq:` alone; fixed: the rows' nearest where they are pretrained, else random.
    project: [D, W] linear map, initialised with orthonormal rows, when W is another width than D.
    scale:   factor on the rows. Pretrained rows are brought to RMS 1/sqrt(D), so that tied logits of a
             normalised state start with unit variance; trained ones are left alone.
    unembed: [V, D], a second table, where logits are not tied to the first.
    """

    scale: Tensor
    codes: Tensor | None

    def __init__(
        self,
        vocab: int,
        dim: int,
        config: EmbedConfig | None = None,
        rows: Tensor | None = None,
        std: float | None = None,
    ) -> None:
        super().__init__()
        config, std = config or EmbedConfig(), dim**-0.5 if std is None else std
        if rows is not None and rows.shape[0] != vocab:
            raise ValueError(f"the pretrained table has {rows.shape[0]} rows for a vocabulary of {vocab}")
        width = dim if rows is None else rows.shape[1]
        scale = 1.0
        if rows is not None and not rows.is_meta:
            scale = 1.0 / (float(rows.float().square().mean().sqrt()) * dim**0.5)
        if width != dim and config.project is None:
            raise ValueError(
                f"the pretrained rows are {width} wide and the model {dim}: set `dim: {width}`,"
                f" or `embed: {{project: {dim}}}` for a trained map between them"
            )
        self.vocab, self.dim, self.width = vocab, dim, width
        self.scaled = config.from_ is not None or config.scale is not None
        if config.vq is None:
            self.codes = None
            weight = torch.empty(vocab, dim).normal_(std=std) if rows is None else rows.float()
        else:
            weight, codes = _quantized(vocab, width, rows, config.vq, std)
            self.register_buffer("codes", codes)
        self.weight = nn.Parameter(weight, requires_grad=not config.frozen)
        self.register_buffer("scale", torch.tensor(scale if config.scale is None else config.scale))
        self.project: nn.Parameter | None = None
        if config.project is not None:
            self.project = nn.Parameter(nn.init.orthogonal_(torch.empty(dim, width)))
        self.unembed: nn.Parameter | None = None
        if not config.tied:
            self.unembed = nn.Parameter(torch.empty(vocab, dim).normal_(std=std))
        self._kept: tuple[tuple[object, ...], Tensor] | None = None

    def freeze_input(self) -> None:
        """Freeze all that the first block reads: the rows and the map behind them."""
        self.weight.requires_grad_(False)
        if self.project is not None:
            self.project.requires_grad_(False)

    def table(self) -> Tensor:
        """[V, D] input table. A map that nothing trains, or that a model in evaluation mode reads without
        gradients, is applied once and kept until a weight is loaded or the mode changes. (An optimizer's
        fused step changes weights without counting up their version, so training never reads what is kept.)
        """
        if self.project is None:
            return self._rows(self.codes) * self.scale if self.scaled else self._rows(self.codes)
        trained = self.weight.requires_grad or self.project.requires_grad
        if trained and (self.training or torch.is_grad_enabled()):
            return F.linear(self._rows(self.codes) * self.scale, self.project)
        device = self.weight.device
        mode = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        key = (self.weight._version, self.project._version, self.scale._version, mode, device)
        if self._kept is None or self._kept[0] != key:
            with torch.no_grad():
                self._kept = (key, F.linear(self._rows(self.codes) * self.scale, self.project))
        return self._kept[1]

    def train(self, mode: bool = True) -> Embed:
        self._kept = None
        return super().train(mode)

    def output_table(self, table: Tensor) -> Tensor:
        """[V, D] matrix that logits are read off, given this call's input table."""
        return table if self.unembed is None else self.unembed

    @property
    def stored_bits(self) -> float:
        """Bits of the stored rows: of their numbers in fp32 and, with `vq:`, of V G codes of log2 K bits."""
        codes = 0.0 if self.codes is None else self.codes.numel() * math.log2(self.weight.shape[1])
        return 32.0 * self.weight.numel() + codes

    @property
    def gathers(self) -> bool:
        """Rows and tied logits can be had without the table [V, D], from the codes."""
        return self.codes is not None and self.unembed is None

    def _rows(self, codes: Tensor | None) -> Tensor:
        """Stored rows, unscaled: all of them [V, W], or those of codes [..., G]."""
        return self.weight if codes is None else product.lookup(self.weight, codes)

    def forward(self, tokens: Tensor, table: Tensor | None) -> Tensor:
        """tokens [...] int64, table [V, D] from `table()`, or None where it `gathers`. Returns [..., D]."""
        if table is not None:
            return F.embedding(tokens, table)
        assert self.codes is not None
        rows = self._rows(self.codes[tokens])
        rows = rows * self.scale if self.scaled else rows
        return rows if self.project is None else F.linear(rows, self.project)

    def logits(self, h: Tensor, table: Tensor | None) -> Tensor:
        """h [..., D] times every row of table [V, D] -> [..., V] fp32; None: its own, where it `gathers`."""
        if table is not None:
            return F.linear(h, table.to(h.dtype)).float()
        assert self.codes is not None
        h = h if self.project is None else F.linear(h, self.project.T)
        found = product.products(h, self.weight, self.codes).float()
        return found * self.scale if self.scaled else found


def _quantized(
    vocab: int, width: int, rows: Tensor | None, config: TableVQ, std: float
) -> tuple[Tensor, Tensor]:
    """Tables [G, K, c] and codes [V, G]. Rows on the meta device only give their shape."""
    if width % config.groups:
        raise ValueError(f"embed.vq: groups: {config.groups} must divide the rows' width {width}")
    if rows is not None and not rows.is_meta:
        books, codes = product.fit(rows.float(), config.groups, config.codes)
        return books, product.smallest(codes, config.codes)
    books = torch.empty(config.groups, config.codes, width // config.groups).normal_(std=std)
    if rows is not None:
        codes = torch.zeros(vocab, config.groups, dtype=torch.int64)
    else:
        codes = product.assign(vocab, config.groups, config.codes)
    return books, product.smallest(codes, config.codes)


def stored_rows(tensors: Mapping[str, Tensor]) -> tuple[int, Tensor]:
    """(V, rows [V, W]) of a saved model; product-quantized ones are there in shape alone, on the meta device:
    their codes are loaded, not sought again."""
    weight, codes = tensors["embed.weight"], tensors.get("embed.codes")
    if codes is None:
        return weight.shape[0], weight
    return codes.shape[0], torch.empty(codes.shape[0], weight.shape[0] * weight.shape[2], device="meta")
