"""Run inside the oracles' environment by `python -m tests.oracles`: measure, print and write the table."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from model.core import Docs

from . import shim

TOLERANCE = 2e-5  # of the largest value; the peers' own tests allow 5e-3
PAGE = Path(__file__).resolve().parents[2] / "model" / "ops" / "ORACLES.md"
HEADER = """# Operators against their peers

Written by `make oracles` (tests/oracles): the peers' own kernels, run on a CPU through Triton's interpreter
in fp32, beside ours on the same inputs. Each number is the largest difference, relative to the largest
value: of outputs, of final states, and of the worst gradient (of every input, weight and initial state).
"ours" is our fast form against our fp64 recurrence, "peer" the peer's kernel against it: what both lose
to fp32. Whole rows start from a state where the peer takes one; packed rows hold documents of 1, 29, 1 and
49 tokens. A dash: the peer gives no such thing.

| operator | peer | rows | output | state | gradients | ours, fp64 | peer, fp64 | seconds |
|---|---|---|---|---|---|---|---|---|
"""


class Row(NamedTuple):
    name: str
    peer: str
    rows: str
    output: float
    state: float | None
    gradients: float
    ours: float
    theirs: float
    seconds: float

    def cells(self) -> list[str]:
        numbers = [
            "-" if x is None else f"{x:.0e}"
            for x in (self.output, self.state, self.gradients, self.ours, self.theirs)
        ]
        return [self.name, self.peer, self.rows, *numbers, f"{self.seconds:.1f}"]


def off(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-6)).item()


def run(fn, leaves: list[Tensor], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and the gradients of a fixed random function of them."""
    leaves = [x.detach().to(dtype, copy=True).requires_grad_() for x in leaves]
    outputs = list(fn(*leaves))
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(o.shape, generator=generator).to(dtype) for o in outputs]
    loss = sum((o * w).sum() for o, w in zip(outputs, weights) if o.requires_grad)
    return outputs, list(torch.autograd.grad(loss, leaves))


def measure(name: str, peer: str, build, docs: Docs | None) -> Row:
    ours, theirs, leaves = build(docs)
    shim.patch_kernels()
    start = time.perf_counter()
    theirs_o, theirs_g = run(theirs, leaves, torch.float32)
    seconds = time.perf_counter() - start
    detached = [not o.requires_grad for o in theirs_o]

    def like_theirs(fn):
        return lambda *a: [o.detach() if d else o for o, d in zip(fn(*a), detached)]

    ours_o, ours_g = run(like_theirs(ours("chunked")), leaves, torch.float32)
    true_o, true_g = run(like_theirs(ours("reference")), leaves, torch.float64)
    return Row(
        name,
        peer,
        "whole" if docs is None else "packed",
        off(theirs_o[0], ours_o[0]),
        max((off(t, o) for t, o in zip(theirs_o[1:], ours_o[1:])), default=None),
        max(off(t, o) for t, o in zip(theirs_g, ours_g)),
        max(off(o, t) for o, t in zip(ours_o + ours_g, true_o + true_g)),
        max(off(o, t) for o, t in zip(theirs_o + theirs_g, true_o + true_g)),
        seconds,
    )


def write_page(rows: list[Row]) -> None:
    """Put the rows into the page; those of comparisons that were not run this time stay as they are."""
    lines = {tuple(r.cells()[:3]): f"| {' | '.join(r.cells())} |" for r in rows}
    old = PAGE.read_text().splitlines() if PAGE.is_file() else []
    kept = [line for line in old if line.startswith("| ") and not line.startswith("| operator")]
    table = {tuple(line[2:-2].split(" | ")[:3]): line for line in kept} | lines
    partial = PAGE.with_suffix(".tmp")
    partial.write_text(HEADER + "".join(f"{line}\n" for line in table.values()))
    partial.replace(PAGE)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="")
    only = parser.parse_args().only
    torch.set_num_threads(1)
    from tests.oracles.peers import PACKED, PAIRS

    rows = []
    for (name, peer), build in PAIRS.items():
        if only in f"{name} {peer}":
            for docs in (None, Docs.packed(PACKED)):
                rows.append(measure(name, peer, build, docs))
                print("  ".join(rows[-1].cells()), flush=True)
                write_page(rows)
    if not rows:
        print(f"no comparison's name contains {only!r}", file=sys.stderr)
        return 2
    table = Table("operator", "peer", "rows", "output", "state", "gradients", "ours, fp64", "peer, fp64", "s")
    for row in rows:
        table.add_row(*row.cells())
    Console(width=160).print(table)
    print(f"written: {PAGE.relative_to(PAGE.parents[2])}")
    wrong = [r for r in rows if not max(r.output, r.state or 0, r.gradients) <= TOLERANCE]
    for r in wrong:
        print(f"out of tolerance ({TOLERANCE:g}): {r.name} against {r.peer}, {r.rows}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
