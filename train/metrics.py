"""What a run says while it trains: JSON lines (the truth), the console, and wandb.

A record is one line of `metrics.jsonl`:

    {"kind": "train", "step", "tokens", "origin", "loss", "losses": {head}, "aux", "lr", "grad_norm",
                      "tokens_per_s", "mfu", "skipped", "seconds", "cpu_seconds",
                      "outer": {...} where workers meet}
    {"kind": "eval",  "step", "tokens", "origin", "loss", "losses": {head}, "bpb": {head}, "stats": {...},
                      "ema": {"loss", "losses", "bpb"} with run.ema}
    {"kind": "event", "event": "start" | "resume" | "save" | "plateau" | "skip" | "stop" | "done" | ...}
    {"kind": "sites", "activations": {site: {"rms", "max"}}, "stats": {...}}
    {"kind": "sample", "step", "tokens", "prompt", "text"}

Every record has its "time". tokens, tokens_per_s: of this run, all its workers together (under async of this
worker alone); origin: tokens of the runs that its weights come from.

wandb runs in a process of its own that follows the file (`train.mirror`), so it can neither hold up the
training nor bring it down.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from dataset.files import write_bytes
from train.errors import disk_full, is_disk_full

FILE = "metrics.jsonl"
ROOT = Path(__file__).resolve().parents[1]


def plain(value: Any) -> Any:
    """The value with non-finite numbers as None: JSON has no NaN."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read(run: Path) -> Iterator[dict[str, Any]]:
    """The records of a run. A last line cut off by a crash is left out."""
    path = run / FILE
    if not path.is_file():
        return
    with open(path, encoding="utf-8") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                yield record


def rewind(run: Path, step: int | None) -> None:
    """Drop what was recorded after the save of `step` (None: everything): a resumed run records it again."""
    path = run / FILE
    if not path.is_file():
        return
    kept = []
    for record in read(run) if step is not None else ():
        if record["step"] > step:
            break
        kept.append(record)
        if record["step"] == step and record.get("event") == "save":
            break
    write_bytes(path, "".join(json.dumps(r) + "\n" for r in kept).encode())


class Log:
    """Records of one run, on rank 0 alone; the other ranks' calls do nothing.

    run: the folder, or None to print only (a dry run). The file is opened by the first record, so `rewind`
    may still put another in its place after the log is made.
    """

    def __init__(
        self, run: Path | None, main: bool, total: int, wandb: str = "off", quiet: bool = False
    ) -> None:
        self.main = main
        self._path = run / FILE if main and run else None
        self._file: TextIO | None = None
        self.console = Console(quiet=quiet or not main, highlight=False)
        self._bar: Progress | None = None
        if self.console.is_terminal and main:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total}"),
            )
            self._bar = Progress(*columns, console=self.console, transient=True)
            self._task = self._bar.add_task("", total=total)
            self._bar.start()
        self._mirror = start_mirror(run, wandb) if main and run and wandb != "off" else None

    def write(self, kind: str, step: int, **fields: Any) -> None:
        """Append one record. Raises DiskFull."""
        if self._path is None:
            return
        record = plain({"kind": kind, "step": step, **fields, "time": round(time.time(), 3)})
        try:
            if self._file is None:
                self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        except OSError as error:
            if is_disk_full(error):
                raise disk_full(self._path) from error
            raise

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)

    def progress(self, step: int, total: int, line: str) -> None:
        """One line about the training: on the bar of a terminal, else printed."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, total=total, description=line)
        else:
            self.say(f"{line}  step {step}/{total}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._file is not None:
            try:
                self._file.close()
            except OSError as error:  # a full disk was reported when it was met
                if not is_disk_full(error):
                    raise
        if self._mirror is not None:
            stop_mirror(self._mirror)


# ----------------------------------------------------------------------------- wandb, in its own process


def start_mirror(run: Path, mode: str) -> subprocess.Popen[bytes]:
    """Follow the run's records into wandb until our end of the pipe is closed, however we end."""
    with open(run / "wandb.log", "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "train.mirror", str(run.resolve()), mode],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            cwd=ROOT,
            start_new_session=True,  # Ctrl-C is for the training; this one still has lines to send
        )


def stop_mirror(process: subprocess.Popen[bytes], patience_s: float = 20.0) -> None:
    if process.stdin is not None:
        process.stdin.close()
    try:
        process.wait(patience_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


# ----------------------------------------------------------------------------- utilisation


def peak_flops(device: torch.device, precision: str) -> float:
    """Best matrix product that this rank's device does, FLOP/s, measured in well under a second.

    The yardstick of MFU: model FLOPs per second over this. Measured, not looked up, so that a CPU, a
    throttled card and a shared machine all have one.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    sizes = (4096, 8192) if device.type == "cuda" else (1024, 1536)
    best = 0.0
    for n in sizes:
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        out = torch.empty_like(a)
        for _ in range(4):
            _wait(device)
            began = time.perf_counter()
            torch.mm(a, b, out=out)
            _wait(device)
            best = max(best, 2 * n**3 / (time.perf_counter() - began))
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory_mb(device: torch.device) -> float:
    """Most memory that this process has held, MB: of the device on CUDA, resident memory otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    if os.name == "nt":
        return math.nan
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
