"""`prepare --dry-run`: do a small part for real, in a temporary folder, and say what the whole would take."""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from dataset.format import DTYPES, SPLITS
from dataset.plan import Request, plan
from dataset.work import Sink, encoder_for, read_input
from dataset.writer import ShardWriter

SAMPLE_INPUTS = 64
SAMPLE_BYTES = 64 * 2**20  # of input, as stored
SAMPLE_SECONDS = 20.0


class _Enough(Exception):
    pass


def estimate(request: Request, fast: bool = True) -> dict[str, Any]:
    """Counts, disk and core-hours of the whole corpus, from the first parts of inputs spread evenly over it.

    At most 64 MiB of input or 20 s of work are used. Raises DatasetError as `prepare` would.
    """
    the_plan = plan(request)
    encoder = encoder_for(the_plan.tokenizer) if fast else None
    inputs = [one for task in the_plan.tasks for one in task.inputs]
    chosen = np.unique(np.linspace(0, len(inputs) - 1, min(SAMPLE_INPUTS, len(inputs))).astype(int))
    share = max(SAMPLE_BYTES // len(chosen), 2**20)
    counts: Counter[str] = Counter()
    read = 0
    cpu = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        writers = {s: ShardWriter(Path(folder), s, the_plan.dtype) for s in SPLITS}
        sink = Sink(the_plan, writers, encoder)
        for i in chosen.tolist():
            left = share

            def seen(n: int) -> None:
                nonlocal left, read
                if left <= 0:
                    raise _Enough
                left -= n
                read += n

            with suppress(_Enough):
                read_input(inputs[i], the_plan, sink, seen, strict=False)
            sink.flush()
            counts.update(sink.counts)
            if time.process_time() - cpu > SAMPLE_SECONDS:
                break
        for writer in writers.values():
            writer.close()
    seconds = time.process_time() - cpu
    return _extrapolate(the_plan.size, read, seconds, counts, DTYPES[the_plan.dtype].itemsize)


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
