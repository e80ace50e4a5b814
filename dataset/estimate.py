"""`prepare --dry-run`: do a small part for real, in a temporary folder, and say what the whole would take."""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from dataset.format import DTYPES, SPLITS
from dataset.plan import Plan, Request, plan
from dataset.readers import TABLES, table_rows
from dataset.sources import Input
from dataset.work import Sink, encoder_for, read_input
from dataset.writer import ShardWriter

SAMPLE_INPUTS = 64
SAMPLE_BYTES = 64 * 2**20  # of input, as stored
SAMPLE_SECONDS = 20.0


class _Enough(BaseException):  # no Exception: readers take those for damage
    pass


class _Sample(Sink):
    """Documents of one input up to `left` bytes of text."""

    left = 0

    def add(self, text: str) -> None:
        if self.left <= 0:
            raise _Enough
        self.left -= len(text.encode())
        super().add(text)


def estimate(request: Request, fast: bool = True) -> dict[str, Any]:
    """Counts, disk and core-hours of the whole corpus, from the first parts of inputs spread evenly over it.

    At most 64 MiB of input or 20 s of work are used; a text file, being one document, is never cut.
    Raises DatasetError as `prepare` would.
    """
    the_plan = plan(request)
    encoder = encoder_for(the_plan.tokenizer) if fast else None
    inputs = [one for task in the_plan.tasks for one in task.inputs]
    chosen = np.unique(np.linspace(0, len(inputs) - 1, min(SAMPLE_INPUTS, len(inputs))).astype(int))
    share = max(SAMPLE_BYTES // len(chosen), 2**20)
    counts: Counter[str] = Counter()
    read = 0
    start, cpu = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        writers = {s: ShardWriter(Path(folder), s, the_plan.dtype) for s in SPLITS}
        sink = _Sample(the_plan, writers, encoder)
        for i in chosen.tolist():
            read += _read_part(inputs[i], the_plan, sink, share)
            counts.update(sink.counts)
            if time.perf_counter() - start > SAMPLE_SECONDS:
                break
        for writer in writers.values():
            writer.close()
    seconds = time.process_time() - cpu
    return _extrapolate(the_plan.size, read, seconds, counts, DTYPES[the_plan.dtype].itemsize)


def _read_part(one: Input, the_plan: Plan, sink: _Sample, share: int) -> int:
    """Tokenize about `share` bytes of an input; how many of its bytes, as stored, these were.

    Lines end after so many stored bytes, tables after so many of text: they are not read from front to back.
    """
    table = one.kind in TABLES
    sink.left = share if table else 2**63
    passed = 0

    def seen(n: int) -> None:
        nonlocal passed
        if one.kind == "jsonl" and passed >= share:
            raise _Enough
        passed += n

    try:
        read_input(one, the_plan, sink, seen, strict=False)
        return passed
    except _Enough:
        sink.flush()
    if not table:
        return passed
    done = sum(sink.counts[key] for key in ("documents", "errors", "empty", "dropped_by_length"))
    return round(one.size * done / max(table_rows(one, the_plan.request.field), done))


def _extrapolate(whole: int, read: int, seconds: float, counts: Counter[str], width: int) -> dict[str, Any]:
    scale = whole / max(read, 1)
    return {
        "input_bytes": whole,
        "sampled_bytes": read,
        "tokens": round(counts["tokens"] * scale),
        "documents": round(counts["documents"] * scale),
        "text_bytes": round(counts["text_bytes"] * scale),
        "errors": counts["errors"],
        "disk_bytes": round((counts["tokens"] * width + counts["documents"] * 8) * scale),
        "text_mb_per_core_second": counts["text_bytes"] / 1e6 / max(seconds, 1e-9),
        "core_hours": seconds * scale / 3600,
    }
