"""The training sections of a configuration: run, optim, schedule, outer, grow.

They stand beside the architecture (`model.schema`) because one file says both; a field's name is its key.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class RunConfig:
    """Length, batch and bookkeeping of a run. Give `steps` or `tokens`, not both.

    batch:     global sequences per optimizer step.
    micro:     sequences per forward pass and rank (None: chosen from the batch).
    context:   tokens per sequence.
    precision: compute dtype; master weights, optimizer and losses are fp32 in any case.
    compile:   torch.compile each bank module.
    eval_every, save_every: steps; 0: only at the end.
    eval_tokens: held-out tokens per evaluation.
    keep:      checkpoints kept besides the last one of each stage.
    """

    steps: int | None = None
    tokens: int | None = None
    batch: int = 16
    micro: int | None = None
    context: int = 256
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "bf16"
    compile: bool = False
    eval_every: int = 100
    eval_tokens: int = 65536
    save_every: int = 200
    log_every: int = 10
    keep: int = 2


@dataclass(frozen=True)
class OptimConfig:
    """name: adamw. decay is decoupled weight decay; clip is the global gradient norm (0: off)."""

    name: str = "adamw"
    lr: float = 3e-3
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    decay: float = 0.1
    clip: float = 1.0


@dataclass(frozen=True)
class ScheduleConfig:
    """warmup and decay are shares of the run (below 1) or steps; `final` is a share of lr."""

    kind: Literal["wsd", "cosine", "constant"] = "wsd"
    shape: Literal["linear", "sqrt", "cosine"] = "linear"
    warmup: float = 0.02
    decay: float = 0.2
    final: float = 0.0


@dataclass(frozen=True)
class OuterConfig:
    """The outer loop of the DiLoCo family; none: plain (data-parallel) training."""

    kind: str = "none"
    every: int = 100


@dataclass(frozen=True)
class GrowConfig:
    """Where the weights come from and when a stage is over.

    from_: arch name, run folder or checkpoint of the smaller model (None: from scratch).
    when:  `step`: a stage runs its full length; `plateau`: it may end early, when held-out loss
           has stopped falling by the plateau rule.
    how:   for a plain stack: `copy` its layers or add `zero`-output ones.
    delta, window, patience, tokens_per_param: the plateau rule; see train.plateau.
    head_lr: factor on the learning rate of heads that were loaded.
    """

    from_: str | None = None
    when: Literal["plateau", "step"] = "step"
    how: Literal["copy", "zero"] = "zero"
    delta: float = 0.002
    window: int = 4
    patience: int = 3
    tokens_per_param: float = 5.0
    head_lr: float = 1.0
