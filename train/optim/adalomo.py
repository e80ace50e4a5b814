"""AdaLOMO (Lv et al. 2023, arXiv 2310.10195): no first moment, a factored second one, grouped normalisation.

For a matrix g [n, m] of the t-th step, b = 1 - t^-0.8 as in Adafactor (Shazeer & Stern 2018):

    row = b row + (1-b) mean over columns g²,  col = b col + (1-b) mean over rows g²
    v = row col' / mean(row)                   exact when g² has rank 1
    u = g / sqrt(v)
    w = w - lr u / max(1, RMS(u)) * max(1e-3, RMS(w)) - lr decay w

Vectors keep v in full. The learning rate is relative to the size of the weights: 1e-3 to 1e-2 is usual.
With gradient release it is LOMO's fused backward: no gradient outlives its update.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from train.optim.groups import Group

TINY, LEAST_RMS, CLIP, POWER = 1e-30, 1e-3, 1.0, -0.8


class AdaLomo(torch.optim.Optimizer):
    def __init__(self, groups: list[Group], lr: float) -> None:
        super().__init__(groups, {"lr": lr})
        self._group = {p: group for group in self.param_groups for p in group["params"]}

    @torch.no_grad()
    def step(self, closure: Any = None, param: Tensor | None = None) -> None:  # type: ignore[override]
        """param: update this one alone (gradient release)."""
        for p in [param] if param is not None else list(self._group):
            if p.grad is not None:
                self._update(p, p.grad, self._group[p])

    def _update(self, p: Tensor, grad: Tensor, group: Group) -> None:
        state = self.state[p]
        grad = grad.float()
        square = grad.square().add_(TINY)
        if not state:
            state["step"] = 0
            if p.dim() == 2:
                state["row"], state["col"] = square.new_zeros(p.shape[0]), square.new_zeros(p.shape[1])
            else:
                state["exp_avg_sq"] = torch.zeros_like(square)
        state["step"] += 1
        fresh = state["step"] ** POWER  # 1 - b
        if p.dim() == 2:
            state["row"].lerp_(square.mean(1), fresh)
            state["col"].lerp_(square.mean(0), fresh)
            scale = (state["row"] / state["row"].mean()).rsqrt_()[:, None] * state["col"].rsqrt()[None]
        else:
            scale = state["exp_avg_sq"].lerp_(square, fresh).rsqrt()
        update = grad * scale
        lr = group["lr"]
        size = lr / max(1.0, float(rms(update)) / CLIP) * max(LEAST_RMS, float(rms(p)))
        p.mul_(1 - lr * group["weight_decay"])
        p.sub_(update.to(p.dtype), alpha=size)


def rms(x: Tensor) -> Tensor:
    """Root mean square, 0-d fp32."""
    return x.float().square().mean().sqrt()
