"""What remains of a sweep's runs: `summaries.jsonl`, small enough to commit, all that a report reads.

    {"kind": "case", "case", "data", "digest", "identity": {config as written, data, budget, after},
     "measured": {eval_tokens, prefill, tasks, samples}, "dataset": its id, "parameters", "trained",
     "flops_per_token", "state_bytes", "context", "tokens"}
    {"kind": "run", "case", "data", "seed", "digest", "code", "torch", "metrics": {name: number},
     "curve": [[tokens, seconds, held-out nats, bits per byte], ...], "tokens", "seconds", "cpu_seconds",
     "tokens_per_s"}

No metrics: the run diverged. A case's line is written before its first run, so that a later change of its
base is noticed.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, overload

from dataset.files import canonical, digest, write_bytes
from experiments.sweep import Run, Sweep
from train.errors import UserError
from train.metrics import plain
from train.metrics import read as records_of
from train.rundir import flat

FILE = "summaries.jsonl"
Line = dict[str, Any]


def file_of(sweep: Sweep) -> Path:
    return sweep.measured_in or sweep.path.parent / (
        FILE if sweep.path.stem == "sweep" else f"{sweep.path.stem}.{FILE}"
    )


def read(path: Path) -> list[Line]:
    """The lines of a summary file, none if there is no file. Raises UserError for a damaged one."""
    if not path.is_file():
        return []
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); put the committed file back") from None


def place(line: Line) -> tuple[str, str, str, int]:
    """What a line is about; a file has one line of each."""
    return line["kind"], line["data"], line["case"], line.get("seed", -1)


def put(sweep: Sweep, *new: Line) -> None:
    """Write lines in place of earlier ones about the same, in the sweep's order; safe among processes."""
    path = file_of(sweep)
    with _locked(path.parent):
        lines = {place(line): line for line in [*read(path), *(plain(line) for line in new)]}
        names = {name: n for n, name in enumerate(sweep.cases)}
        order = sorted(lines.values(), key=lambda x: (place(x)[:2], names.get(x["case"], 1 << 30), place(x)))
        write_bytes(path, "".join(json.dumps(line) + "\n" for line in order).encode())


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time. The folder itself is locked, so that no lock file is left."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def identity_digest(sweep: Sweep, run: Run) -> str:
    return digest(canonical(sweep.identity(run)))[:16]


def changed(sweep: Sweep, lines: Iterable[Line]) -> dict[tuple[str, str], str]:
    """{(case, data): what differs} where base, data, budget or measure are not those of the runs."""
    runs = {(run.data, run.case): run for run in sweep.runs}
    out = {}
    for line in lines:
        run = runs.get((line["data"], line["case"]))
        if line["kind"] != "case" or run is None:
            continue
        old = flat({**line["identity"], "measured": line["measured"]})
        new = flat({**sweep.identity(run), "measured": sweep.measured(run)})
        keys = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)]
        if not keys:
            continue
        differences = "; ".join(f"{k}: {old.get(k)!r} then, {new.get(k)!r} now" for k in keys[:4])
        more = f" and {len(keys) - 4} more" if len(keys) > 4 else ""
        out[run.case, run.data] = f"{run.case} on {run.data}: {differences}{more}"
    return out


def refuse_changed(sweep: Sweep) -> None:
    """Runs of another base would be compared with runs of this one. Raises UserError that names them."""
    if lines := changed(sweep, read(file_of(sweep))).values():
        raise UserError(
            f"{sweep.path}: what its runs were made of has changed since:\n  "
            + "\n  ".join(lines)
            + f"\nput it back, or drop those runs with\n  python -m experiments forget {sweep.path}"
        )


def merge(sweep: Sweep, files: Iterable[Path]) -> int:
    """Take in the lines of other machines' files; how many runs were new.

    Raises UserError, and takes in nothing, when a file is damaged or missing, was made of another sweep, or
    has another length or dataset for a case.
    """
    have = {place(line): line for line in read(file_of(sweep))}
    new: dict[tuple[str, str, str, int], Line] = {}
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: no such file; want a {FILE} that `python -m experiments run` wrote")
        lines = read(file)
        if stale := changed(sweep, lines).values():
            raise UserError(f"{file}: was made of another sweep:\n  " + "\n  ".join(stale))
        for line in lines:
            other = {**have, **new}.get(place(line))
            if other is not None and line["kind"] == "case" and line != other:
                keys = [k for k in line if line[k] != other.get(k)]
                raise UserError(
                    f"{file}: {line['case']} differs in {', '.join(keys)} from the runs that are here"
                )
            if other is None:
                new[place(line)] = line
    put(sweep, *new.values())
    return sum(line["kind"] == "run" for line in new.values())


def forget(sweep: Sweep, wanted: Callable[[Line], bool]) -> int:
    """Drop lines; how many. Run folders stay where they are; safe among processes."""
    path = file_of(sweep)
    with _locked(path.parent):
        lines = read(path)
        kept = [line for line in lines if not wanted(line)]
        if len(kept) < len(lines):
            write_bytes(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
    return len(lines) - len(kept)


# ----------------------------------------------------------------------------- from a run's folder


def measure(folder: Path, head: str) -> dict[str, Any]:
    """Curve, time and speed from the records of a finished run; head: the one that the curve shows."""
    train = [r for r in records_of(folder) if r["kind"] == "train"]
    seconds = {r["step"]: r["seconds"] for r in train}
    curve = []
    for r in records_of(folder):
        if r["kind"] == "eval":
            at = max((s for s in seconds if s <= r["step"]), default=None)
            bits = (r.get("bpb") or {}).get(head)
            spent = seconds[at] if at is not None else 0.0
            curve.append([r["tokens"], short(spent), short(r["losses"].get(head)), short(bits)])
    last = train[-1] if train else {"tokens": 0, "seconds": 0.0, "cpu_seconds": 0.0}
    speed = last["tokens"] / last["seconds"] if last["seconds"] else None
    return {
        "curve": curve,
        "tokens": last["tokens"],
        "seconds": short(last["seconds"]),
        "cpu_seconds": short(last["cpu_seconds"]),
        "tokens_per_s": short(speed),
    }


def metrics_of(evaluation: dict[str, Any], head: str) -> dict[str, float]:
    """An evaluation (`train.evaluate`) as named numbers: `bits_per_byte`, `bits_per_byte/HEAD`,
    `nats 256-511` past the training length, `mqar`, `mqar pairs=8`, ..."""
    out = {}
    for name, row in evaluation["heads"].items():
        out[f"bits_per_byte/{name}"] = row["bits_per_byte"]
        if name == head:
            out["bits_per_byte"] = row["bits_per_byte"]
    for row in evaluation["positions"]:
        if row["beyond"]:
            out[f"nats {row['first']}-{row['last']}"] = row["nats"][head]
    for spec, cells in evaluation["tasks"].items():
        name = spec.partition(":")[0]
        for cell, scores in cells.items():
            out[name if cell == "all" else f"{name} {cell}"] = scores["accuracy"]
    return {k: short(v) for k, v in out.items() if v is not None and math.isfinite(v)}


@overload
def short(value: float) -> float: ...
@overload
def short(value: None) -> None: ...
def short(value: float | None) -> float | None:
    """Six digits: what a measurement is worth, and lines that can be read."""
    return None if value is None else float(f"{value:.6g}")
