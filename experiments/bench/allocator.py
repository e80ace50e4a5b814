"""What `keep_freed_memory` is worth: one training step's worth of a mamba2 block, in pairs of processes.

The setting cannot be undone inside a process, so each round starts one process with it and one without.
"""

from __future__ import annotations

import subprocess
import sys

import torch

from experiments.bench.harness import Result, summarize

STEPS = 4
_CHILD = "import sys; from experiments.bench.allocator import child; child(sys.argv[1], int(sys.argv[2]))"


def child(which: str, threads: int) -> None:
    """Print wall and CPU seconds of some forward and backward passes, after warming up."""
    from experiments.bench.harness import timed
    from model.ops.allocator import keep_freed_memory
    from model.registry import make_block

    if which == "on" and not keep_freed_memory():
        raise SystemExit("this C library is not glibc: there is nothing to compare")
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    block = make_block("mamba2", 512, state=64).bfloat16()
    x = torch.randn(4, 1024, 512, dtype=torch.bfloat16, requires_grad=True)

    def steps() -> None:
        for _ in range(STEPS):
            block(x).y.sum().backward()

    steps()
    print(*timed(steps))


def run(rounds: int) -> list[Result]:
    names = {"on": "keep_freed_memory()", "off": "glibc's defaults"}
    clock: dict[str, list[float]] = {name: [] for name in names.values()}
    cpu: dict[str, list[float]] = {name: [] for name in names.values()}
    for turn in range(rounds):
        for which in ("on", "off") if turn % 2 else ("off", "on"):
            command = [sys.executable, "-c", _CHILD, which, str(torch.get_num_threads())]
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()
            clock[names[which]].append(float(out[-2]))
            cpu[names[which]].append(float(out[-1]))
    title = f"Allocator: mamba2 d512, B4 T1024, bf16, eager, {STEPS} forward + backward"
    return [summarize(title, names["off"], clock, cpu, {})]
