"""The token table: trained, or frozen rows of a pretrained model behind a trained linear map.

Shape legend: V vocabulary  W width of the stored rows  D model width  B batch  T time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.schema import EmbedConfig


class Embed(nn.Module):
    """Token ids -> [B, T, D], and the matrix [V, D] that logits are read off.

    weight:  [V, W]. Without `from:` it is trained from N(0, std²) with W = D.
    project: [D, W] linear map, initialised with orthonormal rows, when W is another width than D.
    scale:   factor on the rows. Pretrained rows are brought to RMS 1/sqrt(D), so that tied logits of a
             normalised state start with unit variance; trained ones are left alone.
    unembed: [V, D], a second table, where logits are not tied to the first.
    """

    scale: Tensor

    def __init__(
        self,
        vocab: int,
        dim: int,
        config: EmbedConfig | None = None,
        rows: Tensor | None = None,
        std: float = 0.02,
    ) -> None:
        super().__init__()
        config = config or EmbedConfig()
        if rows is None:
            rows = torch.empty(vocab, dim).normal_(std=std)
            scale = 1.0
        else:
            scale = 1.0 / (float(rows.float().square().mean().sqrt()) * dim**0.5)
        if rows.shape[0] != vocab:
            raise ValueError(f"the pretrained table has {rows.shape[0]} rows for a vocabulary of {vocab}")
        width = rows.shape[1]
        if width != dim and config.project is None:
            raise ValueError(
                f"the pretrained rows are {width} wide and the model {dim}: set `dim: {width}`,"
                f" or `embed: {{project: {dim}}}` for a trained map between them"
            )
        self.vocab, self.dim = vocab, dim
        self.scaled = config.from_ is not None or config.scale is not None
        self.weight = nn.Parameter(rows.float(), requires_grad=not config.frozen)
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
            return self.weight * self.scale if self.scaled else self.weight
        trained = self.weight.requires_grad or self.project.requires_grad
        if trained and (self.training or torch.is_grad_enabled()):
            return F.linear(self.weight * self.scale, self.project)
        device = self.weight.device
        mode = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        key = (self.weight._version, self.project._version, self.scale._version, mode, device)
        if self._kept is None or self._kept[0] != key:
            with torch.no_grad():
                self._kept = (key, F.linear(self.weight * self.scale, self.project))
        return self._kept[1]

    def train(self, mode: bool = True) -> Embed:
        self._kept = None
        return super().train(mode)

    def output_table(self, table: Tensor) -> Tensor:
        """[V, D] matrix that logits are read off, given this call's input table."""
        return table if self.unembed is None else self.unembed

    def forward(self, tokens: Tensor, table: Tensor) -> Tensor:
        """tokens [B, T] int64, table [V, D] from `table()`. Returns [B, T, D]."""
        return F.embedding(tokens, table)
