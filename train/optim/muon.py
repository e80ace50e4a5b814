"""Muon for the matrices of hidden linear layers, AdamW for everything else, behind one optimizer.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) is torch's. Its update is scaled to the
size of AdamW's (Liu et al. 2025, arXiv 2502.16982), so that one learning rate and weight decay serve both.
"""

from __future__ import annotations

from typing import Any

import torch

from train.optim.groups import Group


class Muon(torch.optim.Optimizer):
    """Groups with `matrix` go to torch.optim.Muon, the others to fused AdamW. State and groups are shared."""

    def __init__(
        self, groups: list[Group], lr: float, momentum: float, betas: tuple[float, float], eps: float
    ) -> None:
        super().__init__(groups, {"lr": lr})
        matrices = [g for g in self.param_groups if g["matrix"]]
        others = [g for g in self.param_groups if not g["matrix"]]
        self.parts: list[torch.optim.Optimizer] = []
        if matrices:
            self.parts.append(
                torch.optim.Muon(matrices, lr=lr, momentum=momentum, adjust_lr_fn="match_rms_adamw")
            )
        if others:
            self.parts.append(torch.optim.AdamW(others, lr=lr, betas=betas, eps=eps, fused=True))
        for part in self.parts:
            part.state = self.state

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()
