"""`--profile`: a trace of a few steps by torch.profiler, in the run's folder.

RUN/profile/trace.json       for chrome://tracing or Perfetto
RUN/profile/operators.txt    the operators that take the most time
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

WAIT, WARM = 2, 1  # steps before the trace: the first pay for allocation and compilation
TOP = 40  # operators in the table


class Tracer:
    """Traces `steps` steps after the first few; a context manager whose `step` is called after every step."""

    def __init__(self, run: Path, steps: int, main: bool) -> None:
        self.folder = run / "profile"
        self._profile: Any = nullcontext()
        if steps and main:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self._profile = profile(
                activities=activities,
                schedule=schedule(wait=WAIT, warmup=WARM, active=steps, repeat=1),
                on_trace_ready=self._write,
                record_shapes=True,
            )

    def __enter__(self) -> Tracer:
        self._profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._profile.__exit__(*error)

    def step(self) -> None:
        if isinstance(self._profile, profile):
            self._profile.step()

    def _write(self, done: profile) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        done.export_chrome_trace(str(self.folder / "trace.json"))
        by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = done.key_averages().table(sort_by=by, row_limit=TOP)
        (self.folder / "operators.txt").write_text(table)
