"""One task of a preparation: read its inputs, tokenize, write shards, then a receipt.

The receipt is written last; a task without one never happened, and is done again from the start.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blake3
import numpy as np

from dataset.fast import FastEncoder, Mismatch, fast_encoder
from dataset.files import TEMPORARY, DatasetError, read_json, write_json
from dataset.format import DTYPES, SPLITS
from dataset.plan import Plan, Task
from dataset.readers import Damage, Document, read
from dataset.sources import Input
from dataset.tokenizers import Tokenizer
from dataset.writer import ShardWriter

BATCH_BYTES = 2**20  # text handed to the tokenizer at once
KEEP_ERRORS = 20  # messages kept per input file; all are counted
WORK = ".prepare"
Seen = Callable[[int], None]


@dataclass(frozen=True)
class How:
    """What does not change the bytes. strict: stop at the first damage. fast: use fastokens if it agrees."""

    strict: bool = False
    fast: bool = True


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


def all_receipts(out: Path, plan: Plan) -> Iterator[tuple[int, dict[str, Any] | None]]:
    for task in plan.tasks:
        yield task.index, receipt(out, task.index, plan.digest)


# ----------------------------------------------------------------------------- documents to shards


class Sink:
    """Tokenizes documents by the batch and hands them to the writers of their splits.

    A document's split is decided by the hash of its text: the same on every machine, for every copy of it.
    """

    def __init__(self, plan: Plan, writers: dict[str, ShardWriter], fast: FastEncoder | None) -> None:
        self._tokenizer, self._fast, self._writers = plan.tokenizer, fast, writers
        self._low, self._high = plan.request.min_tokens, plan.request.max_tokens
        self._heldout = round(plan.heldout * 2**64)
        self._dtype = DTYPES[plan.dtype]
        self._end = np.array([plan.tokenizer.eos_id], self._dtype)
        self._texts: list[str] = []
        self._sizes: list[int] = []
        self._hashes: list[int] = []
        self._pending = 0
        self.counts: Counter[str] = Counter()

    def add(self, text: str) -> None:
        data = text.encode()
        self._texts.append(text)
        self._sizes.append(len(data))
        self._hashes.append(int.from_bytes(blake3.blake3(data).digest(8), "little"))
        self._pending += len(data)
        if self._pending >= BATCH_BYTES:
            self.flush()

    def flush(self) -> None:
        """Raises Mismatch when the fast path is wrong."""
        if not self._texts:
            return
        if self._fast is None:
            ids = self._tokenizer.encode_checked(self._texts)
        else:
            ids = self._fast.encode(self._texts, self._hashes)
        for tokens, size, draw in zip(ids, self._sizes, self._hashes):
            whole = np.concatenate([tokens, self._end], dtype=self._dtype, casting="unsafe")
            self._write(whole, size, SPLITS[draw < self._heldout])
        self._texts, self._sizes, self._hashes, self._pending = [], [], [], 0

    def _write(self, ids: np.ndarray, text_bytes: int, split: str) -> None:
        if len(ids) < self._low or (self._high and len(ids) > self._high):
            self.counts["dropped_by_length"] += 1
            return
        self._writers[split].add(ids, text_bytes)
        for key, n in (("documents", 1), ("tokens", len(ids)), ("text_bytes", text_bytes)):
            self.counts[key] += n


def read_input(one: Input, plan: Plan, sink: Sink, seen: Seen, strict: bool) -> dict[str, Any]:
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

    for item in read(one, plan.request.field, watch):
        if isinstance(item, Damage):
            damage(item.line, item.message)
        elif not item.text:
            sink.counts["empty"] += 1
        elif (bad := plan.tokenizer.unspellable(item.text)) is not None:
            damage(_line_of(item, bad), f"character {bad!r} cannot be spelled with this vocabulary")
        else:
            sink.add(item.text)
    sink.flush()
    record = {"name": one.name, "size": one.size, "blake3": hasher.hexdigest(), **dict(sink.counts)}
    return record | ({"messages": errors} if errors else {})


def _line_of(item: Document, bad: str) -> int:
    """Line of the first bad character in a text; a later line of jsonl counts as a whole."""
    return item.line + (item.text.count("\n", 0, item.text.index(bad)) if item.line == 1 else 0)


_encoders: dict[str, FastEncoder | None] = {}


def encoder_for(tokenizer: Tokenizer) -> FastEncoder | None:
    """The fast path, built once a process: for a small corpus, building it is most of the work."""
    if tokenizer.identity not in _encoders:
        _encoders.clear()
        _encoders[tokenizer.identity] = fast_encoder(tokenizer)
    return _encoders[tokenizer.identity]


def run_task(plan: Plan, task: Task, out: Path, seen: Seen, how: How) -> dict[str, Any]:
    """Do one task and write its receipt. Raises DatasetError; nothing half-done carries a final name."""
    try:
        shards, inputs = _write_shards(
            plan, task, out, seen, how, encoder_for(plan.tokenizer) if how.fast else None
        )
    except Mismatch:  # the reference alone, from the start
        shards, inputs = _write_shards(plan, task, out, lambda n: None, how, None)
    done = {"plan": plan.digest, "task": task.index, "shards": shards, "inputs": inputs}
    write_json(receipt_path(out, task.index), done)
    return done


def _write_shards(plan: Plan, task: Task, out: Path, seen: Seen, how: How, fast: FastEncoder | None):
    folder = out / "shards"
    for stale in folder.glob(f"*-{task.index:06d}-*{TEMPORARY}"):
        stale.unlink(missing_ok=True)
    writers = {
        split: ShardWriter(folder, f"{split}-{task.index:06d}", plan.dtype, plan.request.shard_bytes)
        for split in SPLITS
    }
    sink = Sink(plan, writers, fast)
    try:
        inputs = [read_input(one, plan, sink, seen, how.strict) for one in task.inputs]
        return {split: writer.close() for split, writer in writers.items()}, inputs
    finally:
        for writer in writers.values():
            writer.abort()


# ----------------------------------------------------------------------------- in a worker process

_plan: Plan
_out: Path
_how: How
_counter: Any


def one_core() -> None:
    """Tokenizer libraries keep to one core: the processes are the parallelism."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("RAYON_NUM_THREADS", "1")


def start_worker(plan: Plan, out: Path, how: How, counter: Any) -> None:
    """Initialiser of a worker process: it keeps the plan, and leaves when its parent is gone."""
    global _plan, _out, _how, _counter
    _plan, _out, _how, _counter = plan, out, how, counter
    one_core()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def work(index: int) -> int:
    """Do task `index` in this process."""

    def seen(n: int) -> None:
        with _counter.get_lock():
            _counter.value += n

    run_task(_plan, _plan.tasks[index], _out, seen, _how)
    return index
