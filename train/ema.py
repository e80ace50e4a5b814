"""An exponential moving average of the weights, kept beside them (`run.ema`).

    e <- d e + (1 - d) w    after every applied step, with d = min(decay, (1 + n) / (10 + n)) after n steps,
                            so that the start is soon forgotten

It is evaluated beside the weights and saved in the checkpoint's training state.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from train import checkpoint
from train.errors import UserError
from train.sharding import like

PREFIX = "ema/weights/"  # in a checkpoint's training tensors


def load_into(model: nn.Module, folder: Path) -> None:
    """Give `model` the averaged weights that a checkpoint holds. Raises UserError when it holds none."""
    tensors = {} if checkpoint.is_weights_alone(folder) else load_file(folder / checkpoint.TRAIN)
    found = {n.removeprefix(PREFIX): t for n, t in tensors.items() if n.startswith(PREFIX)}
    if not found:
        raise UserError(f"{folder}: no averaged weights in it; the run was trained without run.ema")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in found:
                p.copy_(found[name])


class Ema:
    """Averages of the trainable parameters of `model`, fp32, by name. decay 0: keeps nothing."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.steps = decay, 0
        self._model = model
        self.weights: dict[str, Tensor] = {}
        if decay:
            self.weights = {n: p.detach().float().clone() for n, p in self._trained()}

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((n, p) for n, p in self._model.named_parameters() if p.requires_grad)

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after a step."""
        if not self.decay:
            return
        self.steps += 1
        d = min(self.decay, (1 + self.steps) / (10 + self.steps))
        for name, p in self._trained():
            self.weights[name].lerp_(p.detach().float(), 1 - d)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within, the model has the averaged weights; afterwards its own again, bit for bit."""
        kept = {}
        with torch.no_grad():
            for name, p in self._trained():
                kept[name] = p.detach().clone()
                p.copy_(self.weights[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for name, p in self._trained():
                    p.copy_(kept[name])

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "weights": self.weights} if self.decay else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError when other parameters were averaged."""
        if set(state.get("weights", {})) != set(self.weights):
            raise ValueError("the averaged weights are of other parameters")
        self.steps = int(state.get("steps", 0))
        for name, value in state.get("weights", {}).items():
            self.weights[name] = like(value, self.weights[name])
