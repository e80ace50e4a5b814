"""`make test-gpu`: one table of everything that runs on a GPU, held against fp64 references on the same GPU.

Operators: every backend, errors of outputs and gradients, and speed against our torch form.
Blocks: every registered block on the GPU beside itself on the CPU: outputs, final states, gradients.
Then the tests marked `gpu`.
Exit code 0 without a GPU (it says so), 1 when something is out of tolerance or failed.
"""

from __future__ import annotations

import sys

import pytest
import torch
from rich.console import Console
from rich.table import Table

from tests.gpu.blocks import compare_blocks
from tests.gpu.operators import Row, compare

TOLERANCE = {torch.float32: 5e-3, torch.bfloat16: 5e-2}  # of the largest value; fp32 kernels may use TF32


def table(rows: list[tuple[str, Row]]) -> Table:
    out = Table("dtype", "operator or block", "backend", "rows", "output", "gradients", "ms", "x torch", "")
    for dtype, r in rows:
        numbers = [f"{x:.0e}" if x is not None else "-" for x in (r.output, r.gradient)]
        times = [f"{r.ms:.2f}" if r.ms is not None else "-", f"{r.ratio:.2f}" if r.ratio is not None else "-"]
        out.add_row(dtype, r.operator, r.backend, r.rows, *numbers, *times, r.why)
    return out


def wrong(r: Row, tolerance: float) -> bool:
    if r.why:
        return r.why.startswith("FAILED")
    return not max(r.output or 0, r.gradient or 0) <= tolerance  # nan is wrong too


def main() -> int:
    console = Console(width=170)
    if not torch.cuda.is_available():
        console.print("no CUDA device here: nothing was run on a GPU")
        return 0
    console.print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    rows, bad = [], 0
    for dtype, tolerance in TOLERANCE.items():
        for row in compare("cuda", dtype):
            rows.append((str(dtype).removeprefix("torch."), row))
            bad += wrong(row, tolerance)
    for row in compare_blocks("cuda"):
        rows.append(("float32", row))
        bad += wrong(row, TOLERANCE[torch.float32])
    console.print(table(rows))
    console.print(f"{len(rows)} rows, {bad} out of tolerance or failed; tests marked gpu:")
    failed = pytest.main(["-m", "gpu"]) not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
    return 1 if bad or failed else 0


if __name__ == "__main__":
    sys.exit(main())
