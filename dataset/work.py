"""One task of a preparation: read its inputs, tokenize, write shards, then a receipt.

The receipt is written last; a task without one never happened, and is done again from the start.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import blake3
import numpy as np

from dataset.files import TEMPORARY, DatasetError, read_json, write_json
from dataset.format import SPLITS
from dataset.plan import Plan, Task, is_heldout
from dataset.sources import Damage, Document, Input, read
from dataset.tokenizers import Tokenizer
from dataset.writer import ShardWriter

BATCH_BYTES = 2**20  # text handed to the tokenizer at once
KEEP_ERRORS = 20  # messages kept per input file; all are counted
WORK = ".prepare"


def receipt_path(out: Path, index: int) -> Path:
    return out / WORK / "receipts" / f"{index:06d}.json"


def receipt(out: Path, index: int, plan_digest: str) -> dict[str, Any] | None:
    """The receipt of a finished task whose shards are all there; None when the task has to be done."""
    path = receipt_path(out, index)
    if not path.exists():
        return None
    try:
        found = read_json(path)
    except DatasetError:
        return None
    if found.get("plan") != plan_digest:
        return None
    for shards in found["shards"].values():
        for entry in shards:
            for kind, record in entry["files"].items():
                file = out / "shards" / f"{entry['name']}.{kind}"
                if not file.exists() or file.stat().st_size != record["bytes"]:
                    return None
    return found


class _Sink:
    """Collects documents of one input, tokenizes them by the batch and hands them to the split writers."""

    def __init__(self, plan: Plan, writers: dict[str, ShardWriter]) -> None:
        self._tokenizer: Tokenizer = plan.tokenizer
        self._request, self._heldout, self._writers = plan.request, plan.heldout, writers
        self._texts: list[tuple[str, bytes, bool]] = []
        self._size = 0
        self.counts: Counter[str] = Counter()

    def add(self, text: str, data: bytes) -> None:
        self._texts.append((text, data, is_heldout(data, self._heldout)))
        self._size += len(data)
        if self._size >= BATCH_BYTES:
            self.flush()

    def flush(self) -> None:
        if not self._texts:
            return
        ids = self._tokenizer.encode_checked([text for text, _, _ in self._texts])
        for (_, data, heldout), tokens in zip(self._texts, ids):
            self._write(np.append(tokens, self._tokenizer.eos_id), len(data), SPLITS[heldout])
        self._texts, self._size = [], 0

    def _write(self, ids: np.ndarray, text_bytes: int, split: str) -> None:
        low, high = self._request.min_tokens, self._request.max_tokens
        if len(ids) < low or (high and len(ids) > high):
            self.counts["dropped_by_length"] += 1
            return
        self._writers[split].add(ids, text_bytes)
        self.counts["documents"] += 1
        self.counts["tokens"] += len(ids)
        self.counts["text_bytes"] += text_bytes


def _read_input(
    one: Input, plan: Plan, sink: _Sink, seen: Callable[[int], None], strict: bool
) -> dict[str, Any]:
    """One line of sources.jsonl. Raises DatasetError at the first damage when `strict`."""
    hasher = blake3.blake3()
    sink.counts = Counter()
    errors: list[dict[str, Any]] = []

    def watch(data: memoryview | bytes) -> None:
        hasher.update(data)
        seen(len(data))

    def damage(line: int, message: str) -> None:
        if strict:
            raise DatasetError(f"{one.name}:{line}: {message} (--strict stops at the first)")
        sink.counts["errors"] += 1
        if len(errors) < KEEP_ERRORS:
            errors.append({"line": line, "message": message})

    for item in read(one, plan.request.reading, watch):
        if isinstance(item, Damage):
            damage(item.line, item.message)
        elif not item.text:
            sink.counts["empty"] += 1
        elif (bad := plan.tokenizer.unspellable(item.text)) is not None:
            damage(_line_of(item, bad), f"character {bad!r} cannot be spelled with this vocabulary")
        else:
            sink.add(item.text, item.text.encode())
    sink.flush()
    record = {"name": one.name, "size": one.size, "blake3": hasher.hexdigest(), **dict(sink.counts)}
    return record | ({"messages": errors} if errors else {})


def _line_of(item: Document, bad: str) -> int:
    """Line of the first bad character; lines of a jsonl document all count as its own."""
    return item.line + (item.text.count("\n", 0, item.text.index(bad)) if item.line == 1 else 0)


def run_task(plan: Plan, task: Task, out: Path, seen: Callable[[int], None], strict: bool) -> dict[str, Any]:
    """Do one task and write its receipt. Raises DatasetError; nothing half-done carries a final name."""
    folder = out / "shards"
    for stale in folder.glob(f"*-{task.index:06d}-*{TEMPORARY}"):
        stale.unlink(missing_ok=True)
    writers = {
        split: ShardWriter(folder, f"{split}-{task.index:06d}", plan.dtype, plan.request.shard_bytes)
        for split in SPLITS
    }
    sink = _Sink(plan, writers)
    try:
        inputs = [_read_input(one, plan, sink, seen, strict) for one in task.inputs]
        shards = {split: writer.close() for split, writer in writers.items()}
    finally:
        for writer in writers.values():
            writer.abort()
    done = {"plan": plan.digest, "task": task.index, "shards": shards, "inputs": inputs}
    write_json(receipt_path(out, task.index), done)
    return done


# ----------------------------------------------------------------------------- in a worker process

_plan: Plan
_settings: tuple[Path, bool]
_counter: Any


def start_worker(plan: Plan, out: Path, strict: bool, counter: Any) -> None:
    """Initialiser of a worker process: it keeps the plan, and leaves when its parent is gone."""
    global _plan, _settings, _counter
    _plan, _settings, _counter = plan, (out, strict), counter
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core a worker
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    import multiprocessing

    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def work(index: int) -> int:
    """Do task `index` in this process."""
    out, strict = _settings

    def seen(n: int) -> None:
        with _counter.get_lock():
            _counter.value += n

    run_task(_plan, _plan.tasks[index], out, seen, strict)
    return index


def all_receipts(out: Path, plan: Plan) -> Iterator[tuple[int, dict[str, Any] | None]]:
    for task in plan.tasks:
        yield task.index, receipt(out, task.index, plan.digest)
