"""How many sequences each step takes: all the same, or fewer at the start (`run.batch_warmup`).

The data order stays arithmetic: step s takes the samples before(s) .. before(s+1), whatever the stages, so
the step is still the only state of the data.
"""

from __future__ import annotations

import math

import numpy as np

from dataset.packing import Arrays
from dataset.views import Samples, local_samples
from model.sections import RunConfig


class BatchPlan:
    """stages: [(first step, sequences per step)], the first at step 0."""

    def __init__(self, run: RunConfig) -> None:
        warm = run.batch_warmup
        self.stages = [(0, run.batch)]
        if warm is None or warm.from_ == run.batch:
            return
        sizes = [warm.from_]
        while sizes[-1] * 2 < run.batch:
            sizes.append(sizes[-1] * 2)
        starts = [round(i * warm.steps / len(sizes)) for i in range(len(sizes))]
        self.stages = [*dict(zip(starts, sizes)).items(), (warm.steps, run.batch)]

    @property
    def sizes(self) -> set[int]:
        """Every number of sequences that a step may take."""
        return {size for _, size in self.stages}

    def size(self, step: int) -> int:
        """Sequences of the global batch of a step."""
        return [size for first, size in self.stages if first <= step][-1]

    def before(self, step: int) -> int:
        """Sequences taken by all steps before this one."""
        ends = [first for first, _ in self.stages[1:]] + [step]
        return sum(max(0, min(end, step) - first) * size for (first, size), end in zip(self.stages, ends))

    def steps_for(self, sequences: float) -> int:
        """The fewest steps that take so many sequences."""
        first, size = self.stages[-1]
        if sequences > self.before(first):
            return first + math.ceil((sequences - self.before(first)) / size)
        return next(step for step in range(first + 1) if self.before(step) >= sequences)


class Staged(Samples):
    """A view whose global batches follow a plan."""

    def __init__(self, view: Samples, plan: BatchPlan) -> None:
        self._view, self._plan = view, plan
        self.context, self.rows, self.id = view.context, view.rows, view.id
        self.text_bytes, self.narrow, self.side_kind = view.text_bytes, view.narrow, view.side_kind
        self.tokenizer_identity = view.tokenizer_identity

    def arrays(self, samples: np.ndarray, dtype: np.dtype | type = np.int64) -> Arrays:
        return self._view.arrays(samples, dtype)

    def step_arrays(self, step: int, global_batch: int, rank: int, world: int, dtype=np.int64) -> Arrays:
        mine = local_samples(0, self._plan.size(step), rank, world) + self._plan.before(step)
        return self._view.arrays(mine, dtype)
