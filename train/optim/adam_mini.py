"""Adam-mini (Zhang et al. 2024, arXiv 2406.16793): one second moment for a block of weights.

    m = b1 m + (1-b1) g                        per weight
    v = b2 v + (1-b2) mean over the block g²   per block
    w = w - lr (m / (1-b1^t)) / (sqrt(v / (1-b2^t)) + eps) - lr decay w

Blocks follow the structure that the modules declare (`row_groups`): the heads of queries and keys are a
block each, the token table has a second moment for each element (as Adam), every other tensor is one block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from train.optim.groups import Group


class AdamMini(torch.optim.Optimizer):
    """groups carry `rows`: blocks of equal rows of each of their tensors; 0: every element is a block."""

    def __init__(self, groups: list[Group], lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "rows": 1})
        for group in self.param_groups:
            for name, p in zip(group["names"], group["params"]):
                if group["rows"] > 1 and p.shape[0] % group["rows"]:
                    raise ValueError(f"{name}: {p.shape[0]} rows do not make {group['rows']} equal blocks")

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad, group)

    def _update(self, p: Tensor, grad: Tensor, group: Group) -> None:
        beta1, beta2 = group["betas"]
        state = self.state[p]
        square = block_mean_square(grad, group["rows"])
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(p)
            state["block_sq"] = torch.zeros_like(square)
        state["step"] += 1
        t, lr = state["step"], group["lr"]
        state["exp_avg"].lerp_(grad, 1 - beta1)
        state["block_sq"].lerp_(square, 1 - beta2)
        size = (state["block_sq"] / (1 - beta2**t)).sqrt_().add_(group["eps"])
        p.mul_(1 - lr * group["weight_decay"])
        step = state["exp_avg"] / (1 - beta1**t)
        blocks = size.shape[0] if size.dim() == 1 and group["rows"] else 0
        if blocks:
            step.view(blocks, -1).div_(size[:, None])
        else:
            step.div_(size)
        p.sub_(step, alpha=lr)


def block_mean_square(grad: Tensor, rows: int) -> Tensor:
    """[rows] mean square of each block of rows of `grad`; rows 0: grad², per element."""
    if rows == 0:
        return grad.square()
    return grad.reshape(rows, -1).square().mean(1)
