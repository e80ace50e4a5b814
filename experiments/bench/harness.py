"""Side-by-side timing: candidates take turns in one process, and only their ratio is quoted.

A machine's speed drifts and is shared; a ratio of medians over interleaved rounds survives both. Every
candidate has the same allocator, threads and inputs.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rich.progress import Progress

from dataset.files import write_bytes


@dataclass(frozen=True)
class Candidate:
    """One way to do the job. `run` does it once; it is called once before timing (compiles, caches)."""

    name: str
    run: Callable[[], object]


@dataclass(frozen=True)
class Case:
    """Ways to do the same job, and the one that the others are measured against.

    base: name of the candidate that counts as 1.00 (a named peer).
    bars: candidate -> the ratio it should reach; reported, never asserted.
    """

    title: str
    candidates: Sequence[Candidate]
    base: str
    bars: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """Seconds of one candidate (median, quartiles, least, CPU) and its speed relative to the base.

    cpu, cpu_ratio: by CPU seconds of all threads, which a busy machine disturbs far less than the clock.
    """

    name: str
    median: float
    low: float
    high: float
    least: float
    ratio: float
    cpu: float
    cpu_ratio: float
    bar: float | None

    @property
    def spread(self) -> float:
        """Interquartile range over the median."""
        return (self.high - self.low) / self.median


@dataclass(frozen=True)
class Result:
    title: str
    base: str
    rounds: int
    rows: tuple[Row, ...]


def measure(case: Case, rounds: int = 9, show: bool = True) -> Result:
    """Time every candidate once a round, in turn, starting each round one further."""
    clock: dict[str, list[float]] = {c.name: [] for c in case.candidates}
    cpu: dict[str, list[float]] = {c.name: [] for c in case.candidates}
    order = list(case.candidates)
    with Progress(transient=True, disable=not show) as progress:
        task = progress.add_task(case.title, total=(rounds + 2) * len(order))
        for turn in range(-2, rounds):  # two rounds of warm-up: compile, then settle
            shift = turn % len(order)
            for candidate in order[shift:] + order[:shift]:
                seconds, cpu_seconds = timed(candidate.run)
                if turn >= 0:
                    clock[candidate.name].append(seconds)
                    cpu[candidate.name].append(cpu_seconds)
                progress.advance(task)
    return summarize(case.title, case.base, clock, cpu, case.bars)


def timed(run: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds (of all threads) of one call."""
    start, cpu_start = time.perf_counter(), time.process_time()
    kept = run()  # a result must outlive the clock, or freeing it would be timed for some and not for others
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    del kept
    return seconds, cpu_seconds


def summarize(
    title: str,
    base: str,
    clock: dict[str, list[float]],
    cpu: dict[str, list[float]],
    bars: dict[str, float],
) -> Result:
    """The table of a case from the seconds of every candidate, round by round."""
    rows = []
    for name, seconds in clock.items():
        low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
        cpu_middle = statistics.median(cpu[name])
        rows.append(
            Row(
                name,
                median=middle,
                low=low,
                high=high,
                least=min(seconds),
                ratio=statistics.median(clock[base]) / middle,
                cpu=cpu_middle,
                cpu_ratio=statistics.median(cpu[base]) / cpu_middle,
                bar=bars.get(name),
            )
        )
    return Result(title, base, len(clock[base]), tuple(rows))


def markdown(results: Sequence[Result]) -> str:
    """The results as Markdown tables."""
    lines = []
    for result in results:
        lines += [
            f"### {result.title}",
            "",
            f"Median of {result.rounds} interleaved rounds; ratio = speed relative to *{result.base}*.",
            "",
            "| candidate | ms | IQR | ratio | CPU ms | CPU ratio | bar |",
            "|---|---:|---:|---:|---:|---:|---:|",
        ]
        for r in result.rows:
            bar = "" if r.bar is None else f"{r.bar:g} {'reached' if r.ratio >= r.bar else 'MISSED'}"
            lines.append(
                f"| {r.name} | {1e3 * r.median:.1f} | {100 * r.spread:.0f} % | {r.ratio:.2f} "
                f"| {1e3 * r.cpu:.1f} | {r.cpu_ratio:.2f} | {bar} |"
            )
        lines.append("")
    return "\n".join(lines)


def machine() -> dict[str, object]:
    """What the numbers depend on."""
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "amx": bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()),
        "preload": os.environ.get("LD_PRELOAD", ""),
        "load_average": os.getloadavg()[0],
    }


def save(results: Sequence[Result], path: Path) -> None:
    """Write results and machine as JSON, whole or not at all."""
    text = json.dumps({"machine": machine(), "results": [asdict(r) for r in results]}, indent=1)
    write_bytes(path, f"{text}\n".encode())
