"""Gradient release: each parameter is updated inside the backward pass, and its gradient freed at once.

The gradients of a model never exist together (LOMO, Lv et al. 2023, arXiv 2306.09782). A parameter that is
used at several sites is updated once, when all of its gradient has come together. Reentrant checkpointing
breaks that: each of its inner backward passes would count as the whole, so it is refused when it is met.

An update cannot be taken back when a later gradient is not finite. What is not finite in a gradient acts as
zero, so that no weight becomes NaN; the norm tells, and the step is counted among the refused.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from train.errors import UserError
from train.optim.groups import named_parameters


class Release:
    """Hooks that step `optimizer` (one that has `step(param=...)`) parameter by parameter."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer: Any = optimizer
        self._done: set[str] = set()
        self._squares: list[Tensor] = []
        for name, p in named_parameters(optimizer):
            p.register_post_accumulate_grad_hook(partial(self._update, name))

    def begin(self) -> None:
        """Before the backward pass of a step; the learning rates are set by then."""
        self._done.clear()
        self._squares.clear()

    def norm(self) -> float:
        """Global norm of the gradients of the step, though they never existed together."""
        return float(torch.stack(self._squares).sum().sqrt()) if self._squares else 0.0

    def _update(self, name: str, p: Tensor) -> None:
        if name in self._done:
            raise UserError(
                f"optim.release: the gradient of {name} came in two parts in one backward pass; a shared "
                "weight under reentrant checkpointing would be updated twice. Checkpoint with "
                "use_reentrant=False, or set optim.release: false"
            )
        assert p.grad is not None
        self._done.add(name)
        self._squares.append(p.grad.float().square().sum())
        p.grad.nan_to_num_(0.0, 0.0, 0.0)
        self.optimizer.step(param=p)
        p.grad = None
