"""The Wiener gain: the closed-form estimate of the gradient that a much larger batch would give.

A gradient g = mu + noise, with the moments that Adam keeps, m of g and v of g² (both without bias), has
signal m² and noise v - m². The linear estimate of mu from g with the least square error is

    g m² / (m² + max(v - m², 0) / batches)

per coordinate. The moments are those of the step's own averaged gradient, so `batches` is 1; more says that
the gradient at hand is the mean of so many that the moments describe one by one.
"""

from __future__ import annotations

import torch
from torch import Tensor


def wiener_gain(m: Tensor, v: Tensor, batches: float = 1.0) -> Tensor:
    """Gain in [0, 1] per coordinate; 1 where nothing was ever seen."""
    signal = m.square()
    noise = (v - signal).clamp_min(0) / batches
    total = signal + noise
    return torch.where(total > 0, signal / total.clamp_min(1e-38), 1.0)


@torch.no_grad()
def shrink(optimizer: torch.optim.Optimizer, batches: float = 1.0) -> None:
    """Multiply every gradient by its gain, from the moments before this step. The first step is untouched."""
    for group in optimizer.param_groups:
        beta1, beta2 = group["betas"] if "betas" in group else (group["beta1"], group["beta2"])
        for p in group["params"]:
            state = optimizer.state.get(p, {})
            if p.grad is None or "exp_avg" not in state:
                continue
            m, v = state["exp_avg"].to(p.grad.dtype), state["exp_avg_sq"].to(p.grad.dtype)
            if (
                "betas" in group
            ):  # torch's moments start at 0 and are biased; optimi's are debiased as they go
                t = float(state["step"])
                m, v = m / (1 - beta1**t), v / (1 - beta2**t)
            p.grad.mul_(wiener_gain(m, v, batches))
