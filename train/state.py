"""Everything that a run must remember to go on as if it had never stopped.

Random numbers and the data order need no state of their own: both follow from the seed and the step
(`world.seed_step`, `dataset.order`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from model.lm import LanguageModel
from train import optim
from train.activations import Noise
from train.checkpoint import Checkpoint
from train.ema import Ema
from train.errors import CheckpointError
from train.guard import Guard
from train.meter import Meter
from train.nowcast import Nowcast
from train.objective import Objective
from train.optim.release import Release
from train.outer.none import NoOuter
from train.plateau import Plateau
from train.schedule import Schedule
from train.sharding import like


@dataclass
class TrainState:
    """model is the bare module; `forward` is what is called: the same, or its data-parallel wrapper.

    step:    optimizer steps of this worker; `at` is the place in the schedule.
    tokens:  tokens seen by the whole run, all its workers (under async by this worker alone).
    skipped: steps that the guard refused, and in a row.
    origin:  tokens that the weights had seen before this run (growth, --init-from).
    release: the hooks of gradient release, or None.     noise: of compressed activations, or None.
    """

    model: LanguageModel
    forward: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    plateau: Plateau
    outer: NoOuter
    guard: Guard
    ema: Ema
    objective: Objective | None = None
    release: Release | None = None
    nowcast: Nowcast | None = None
    noise: Noise | None = None
    meter: Meter = field(default_factory=Meter)
    step: int = 0
    tokens: int = 0
    origin: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0

    @property
    def at(self) -> int:
        """Steps of the schedule behind the weights: those of the run, or under async of the shard in hand."""
        return self.schedule.total if self.outer.finished(self) else self.outer.place(self.step).step

    def begin_step(self, lr: float) -> None:
        """Tell those who act inside the passes of this step: which step it is, and at what rate."""
        if self.objective is not None:
            self.objective.advance(self.at, self.schedule.total)
        if self.noise is not None:
            self.noise.begin(self.step)
        if self.release is not None:
            optim.set_lr(self.optimizer, lr)
            self.release.begin()

    def model_tensors(self) -> dict[str, Tensor]:
        """The model by name, as it is evaluated and saved: of a schedule-free optimizer the average."""
        with optim.averaged(self.optimizer) as swapped:
            tensors = dict(self.model.state_dict())
            return {n: t.clone() for n, t in tensors.items()} if swapped else tensors

    def state_dict(self) -> dict[str, Any]:
        """Nested dicts and lists of tensors and JSON values: all but the model's own tensors."""
        return {
            "counters": {name: getattr(self, name) for name in COUNTERS},
            "optimizer": optim.state_by_name(self.optimizer),
            "schedule": self.schedule.state_dict(),
            "plateau": self.plateau.state_dict(),
            "outer": self.outer.state_dict(),
            "meter": self.meter.state_dict(),
            **{name: part.state_dict() for name, part in self._later().items()},
        }

    def _later(self) -> dict[str, Any]:
        """Parts that checkpoints from before they were there lack; those start anew."""
        parts: dict[str, Any] = {"guard": self.guard, "ema": self.ema}
        return parts if self.nowcast is None else parts | {"nowcast": self.nowcast}

    def load(self, checkpoint: Checkpoint) -> None:
        """Become what was saved. Raises CheckpointError when it belongs to another model."""
        load_model(self.model, checkpoint.model, str(checkpoint.path))
        state = checkpoint.train
        try:
            optim.load_by_name(self.optimizer, state["optimizer"])
            for name in COUNTERS:
                setattr(self, name, int(state["counters"][name]))
            self.schedule.load_state_dict(state["schedule"])
            self.plateau.load_state_dict(state["plateau"])
            self.outer.load_state_dict(state["outer"])
            self.meter.load_state_dict(state["meter"])
            for name, part in self._later().items():
                if name in state:
                    part.load_state_dict(state[name])
        except (KeyError, ValueError, TypeError) as error:
            raise CheckpointError(f"{checkpoint.path}: does not fit this run ({error!r})") from error


COUNTERS = ("step", "tokens", "origin", "skipped", "skipped_in_a_row")


def load_model(model: nn.Module, tensors: dict[str, Tensor], where: str) -> None:
    """Copy tensors into a model, names and shapes strictly equal. Raises CheckpointError."""
    own = model.state_dict()
    problems = [f"lacks {n}" for n in own if n not in tensors]
    problems += [f"has {n}, which the model lacks" for n in tensors if n not in own]
    problems += [
        f"{n} has shape {list(tensors[n].shape)}, the model {list(t.shape)}"
        for n, t in own.items()
        if n in tensors and tensors[n].shape != t.shape
    ]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise CheckpointError(f"{where}: is of another model: {'; '.join(problems[:3])}{more}")
    model.load_state_dict({n: like(tensors[n], t) for n, t in own.items()})
