"""What a preparation will do, before it does anything: inputs cut into tasks, and the recipe's digest.

A task is one large input file or a run of small ones; it depends on the inputs alone, never on the number
of workers, so that any machine does any task with the same bytes as result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dataset.files import DatasetError, canonical, digest
from dataset.format import dtype_for
from dataset.sources import Input, ReadOptions, find_all
from dataset.tokenizers import Tokenizer, make
from dataset.writer import SHARD_BYTES

MIN_TASK, MAX_TASK = 4 * 2**20, 512 * 2**20
HELDOUT, HELDOUT_BYTES = 0.05, 64 * 2**20  # the default: this fraction, at most about so much


@dataclass(frozen=True)
class Request:
    """Everything that `prepare` was asked for. The fields up to `strict` decide the bytes written.

    heldout: fraction of documents, chosen by the hash of their text, so that copies stay together;
    None: 5 %, or less so that about 64 MiB of a large corpus are held out.
    dtype: None picks u16 when the vocabulary fits. min_tokens, max_tokens: documents outside are dropped.
    """

    sources: tuple[str, ...]
    tokenizer: str = "bytes"
    merges: int | None = None
    eos: str | None = None
    heldout: float | None = None
    dtype: str | None = None
    field: str = "text"
    kind: str | None = None
    include: tuple[str, ...] = ()
    shard_bytes: int = SHARD_BYTES
    min_tokens: int = 0
    max_tokens: int = 0

    @property
    def reading(self) -> ReadOptions:
        return ReadOptions(self.field, self.include, self.kind)

    def check(self) -> None:
        """Raises DatasetError for values outside their range."""
        if not self.sources:
            raise DatasetError("no source given. Use --source pystdlib or --source PATH")
        if self.heldout is not None and not 0 <= self.heldout < 1:
            raise DatasetError(f"--heldout {self.heldout}: a fraction in [0, 1) is needed")
        if self.dtype not in (None, "u16", "u32"):
            raise DatasetError(f"--dtype {self.dtype!r}: allowed are u16, u32")
        if not 2**10 <= self.shard_bytes <= 8 * 2**30:
            raise DatasetError(f"--shard-bytes {self.shard_bytes}: allowed are 1 KiB to 8 GiB")
        if self.min_tokens < 0 or self.max_tokens < 0:
            raise DatasetError("--min-tokens and --max-tokens must not be negative")


@dataclass(frozen=True)
class Task:
    """Consecutive inputs that one worker turns into shards."""

    index: int
    inputs: tuple[Input, ...]

    @property
    def size(self) -> int:
        return sum(i.size for i in self.inputs)


@dataclass(frozen=True)
class Plan:
    """A checked request with its inputs. digest: names the result; equal digests give equal bytes."""

    request: Request
    tokenizer: Tokenizer
    dtype: str
    heldout: float
    tasks: tuple[Task, ...]
    sources: tuple[dict[str, Any], ...]
    digest: str

    @property
    def size(self) -> int:
        return sum(t.size for t in self.tasks)


def plan(request: Request) -> Plan:
    """Raises DatasetError for bad requests, missing sources, a vocabulary that u16 cannot hold."""
    request.check()
    inputs, sources = find_all(request.sources, request.reading)
    tokenizer = make(request.tokenizer, request.merges, request.eos)
    dtype = request.dtype or dtype_for(tokenizer.vocab)
    if dtype == "u16" and tokenizer.vocab > 2**16:
        raise DatasetError(
            f"--dtype u16 holds 65,536 ids, {tokenizer.name} has {tokenizer.vocab:,}. Use --dtype u32"
        )
    heldout = request.heldout
    if heldout is None:
        heldout = min(HELDOUT, HELDOUT_BYTES / max(sum(i.size for i in inputs), 1))
    recipe = {
        "tokenizer": tokenizer.identity,
        "inputs": [i.record() for i in inputs],
        "dtype": dtype,
        "heldout": heldout,
        "field": request.field,
        "shard_bytes": request.shard_bytes,
        "tokens": [request.min_tokens, request.max_tokens],
    }
    tasks = tuple(cut_tasks(inputs))
    return Plan(request, tokenizer, dtype, heldout, tasks, tuple(sources), digest(canonical(recipe)))


def cut_tasks(inputs: list[Input]) -> list[Task]:
    """Runs of inputs of about 1/64 of the whole, at least 4 MiB and at most 512 MiB."""
    goal = min(max(sum(i.size for i in inputs) // 64, MIN_TASK), MAX_TASK)
    tasks: list[Task] = []
    run: list[Input] = []
    size = 0
    for one in inputs:
        if run and size + one.size > goal:
            tasks.append(Task(len(tasks), tuple(run)))
            run, size = [], 0
        run.append(one)
        size += one.size
    return [*tasks, Task(len(tasks), tuple(run))]
