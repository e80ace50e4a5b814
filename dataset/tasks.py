"""Synthetic tasks, made from a seed: associative recall, copying, passkey retrieval.

A sample is text in pieces, some of which are answers. The same samples are a dataset to train on
(`write`; loss on the answers alone) and questions for any model (`train.taskeval`). A task is named by a
spec: its name, and options after a colon, a list by slashes:

    mqar    copy:lengths=8/32    passkey:lengths=256/1024,depths=0/0.5/1
"""

from __future__ import annotations

import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from dataset.files import DatasetError, canonical, digest, write_bytes
from dataset.format import Dataset, dtype_for, open_dataset, write_manifest
from dataset.prepare import COUNTED, split_record, tokenizer_record
from dataset.tokenizers import Tokenizer
from dataset.writer import ShardWriter

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
VALUES = "0123456789!#$%&()*+,-./:;<=>?@[]^_{|}~"
NOISE = " \n"
HAYSTACK = (
    "The grass is green. ",
    "The sky is blue. ",
    "The sun is yellow. ",
    "Here we go. ",
    "There and back again. ",
)
STREAMS = {"train": 0, "heldout": 1}


class Encoder(Protocol):
    """Any tokenizer: text to ids, no control ids added."""

    def encode(self, text: str) -> Any: ...


class Piece(NamedTuple):
    """Text, and whether it is an answer: something that the text before it decides."""

    text: str
    answer: bool = False


class Sample(NamedTuple):
    """cell: what sets this sample's difficulty, like "pairs=8"; scores are kept apart by it."""

    pieces: list[Piece]
    cell: str


class Task(ABC):
    """A task's options are its fields. Raises DatasetError for options out of range."""

    @abstractmethod
    def cells(self) -> list[dict[str, Any]]:
        """The difficulties, one after another over the samples."""

    @abstractmethod
    def pieces(self, rng: np.random.Generator, **cell: Any) -> list[Piece]:
        """One sample of one difficulty."""

    def sample(self, seed: int, split: str, number: int) -> Sample:
        """Sample `number` of a split; it depends on nothing else."""
        cells = self.cells()
        cell = cells[number % len(cells)]
        rng = np.random.default_rng([seed, STREAMS[split], number])
        varying = [k for k in cell if any(c[k] != cell[k] for c in cells)] or list(cell)[:1]
        return Sample(self.pieces(rng, **cell), " ".join(f"{k}={cell[k]}" for k in varying))


@dataclass(frozen=True)
class MQAR(Task):
    """Multi-query associative recall (Arora et al. 2023, arXiv 2312.04927).

    Key-value pairs, `noise` blanks, then every key once more in another order, each followed by its value.
    Keys are letters and values are digits and signs, one byte each: chance is 1 in `pairs`.

    pairs: how many.  noise: blanks between pairs and questions.
    """

    pairs: tuple[int, ...] = (4, 8, 16, 32)
    noise: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        _within("mqar: pairs", self.pairs, 1, min(len(LETTERS), len(VALUES)))
        _within("mqar: noise", self.noise, 0, 1 << 20)

    def cells(self) -> list[dict[str, Any]]:
        return [{"pairs": p, "noise": n} for p in self.pairs for n in self.noise]

    def pieces(self, rng: np.random.Generator, **cell: Any) -> list[Piece]:
        n = cell["pairs"]
        keys = rng.choice(list(LETTERS), n, replace=False).tolist()
        values = rng.choice(list(VALUES), n, replace=False).tolist()
        blanks = "".join(rng.choice(list(NOISE), cell["noise"]).tolist())
        out = [Piece("".join(k + v for k, v in zip(keys, values)) + blanks)]
        for i in rng.permutation(n).tolist():
            out += [Piece(keys[i]), Piece(values[i], True)]
        return out


@dataclass(frozen=True)
class Copy(Task):
    """A string of random letters, a bar, and the string again (Jelassi et al. 2024, arXiv 2402.01032).

    lengths: letters of the string.
    """

    lengths: tuple[int, ...] = (8, 16, 32, 64)

    def __post_init__(self) -> None:
        _within("copy: lengths", self.lengths, 1, 1 << 20)

    def cells(self) -> list[dict[str, Any]]:
        return [{"length": n} for n in self.lengths]

    def pieces(self, rng: np.random.Generator, **cell: Any) -> list[Piece]:
        text = "".join(rng.choice(list(LETTERS), cell["length"]).tolist())
        return [Piece(text + "|"), Piece(text, True)]


@dataclass(frozen=True)
class Passkey(Task):
    """A number hidden in a haystack of sentences, asked for at the end (arXiv 2305.16300).

    lengths: bytes of the whole sample, the answer included; it is as long as whole sentences allow.
    depths:  where the number is told, as a share of the haystack.  digits: of the number.
    """

    lengths: tuple[int, ...] = (256, 512, 1024)
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    digits: int = 5

    def __post_init__(self) -> None:
        _within("passkey: digits", (self.digits,), 1, 18)
        _within("passkey: lengths", self.lengths, self._frame(), 1 << 24)
        _within("passkey: depths", self.depths, 0, 1)

    def _frame(self) -> int:
        return len(self._told("0" * self.digits)) + len(self.question) + self.digits

    question = "What is the pass key? The pass key is "

    @staticmethod
    def _told(key: str) -> str:
        return f"The pass key is {key}. Remember it. {key} is the pass key. "

    def cells(self) -> list[dict[str, Any]]:
        return [{"length": n, "depth": d} for n in self.lengths for d in self.depths]

    def pieces(self, rng: np.random.Generator, **cell: Any) -> list[Piece]:
        key = "".join(rng.integers(0, 10, self.digits).astype(str).tolist())
        room, hay, at = cell["length"] - self._frame(), [], int(rng.integers(len(HAYSTACK)))
        while room >= len(HAYSTACK[at % len(HAYSTACK)]):
            hay.append(HAYSTACK[at % len(HAYSTACK)])
            room -= len(hay[-1])
            at += 1
        place = round(cell["depth"] * len(hay))
        text = "".join([*hay[:place], self._told(key), *hay[place:], self.question])
        return [Piece(text), Piece(key, True)]


TASKS: dict[str, type[Task]] = {"mqar": MQAR, "copy": Copy, "passkey": Passkey}


def parse(spec: str) -> Task:
    """The task of a spec. Raises DatasetError that names what is allowed."""
    name, _, rest = spec.partition(":")
    if name not in TASKS:
        raise DatasetError(f"task {name!r}: allowed are {', '.join(sorted(TASKS))}")
    known: dict[str, Any] = {f.name: f.default for f in fields(TASKS[name])}  # type: ignore[arg-type]
    options: dict[str, Any] = {}
    for item in filter(None, rest.split(",")):
        key, _, value = item.partition("=")
        if key not in known:
            raise DatasetError(f"task {name}: no option {key!r}; it has {', '.join(known)}")
        default = known[key]
        kind: Any = type(default[0] if isinstance(default, tuple) else default)
        try:
            values = tuple(kind(v) for v in value.split("/"))
        except ValueError:
            raise DatasetError(f"task {name}: {key}={value!r}: want {kind.__name__}s like 4/8") from None
        if not isinstance(default, tuple) and len(values) != 1:
            raise DatasetError(f"task {name}: {key}={value!r}: want one {kind.__name__}")
        options[key] = values if isinstance(default, tuple) else values[0]
    return TASKS[name](**options)


def _within(name: str, values: tuple[Any, ...], low: float, high: float) -> None:
    if not values or not all(low <= v <= high for v in values):
        raise DatasetError(f"task {name}={'/'.join(map(str, values))}: want numbers from {low} to {high}")


def encode(sample: Sample, tokenizer: Encoder) -> tuple[np.ndarray, np.ndarray]:
    """(ids, answers), both int64 [T]; answers: 0 outside of answers, n in the n-th. Pieces are encoded one
    by one, so that no token is half question and half answer."""
    parts = [np.asarray(tokenizer.encode(p.text), np.int64) for p in sample.pieces]
    numbers = np.cumsum([p.answer for p in sample.pieces]) * [p.answer for p in sample.pieces]
    return np.concatenate(parts), np.repeat(numbers, [len(part) for part in parts])


def write(
    specs: Sequence[str],
    tokenizer: Tokenizer,
    out: Path,
    samples: int = 20000,
    heldout: int = 500,
    seed: int = 0,
) -> Dataset:
    """A dataset of one or several tasks in turn: one sample a document, loss on answers and its end.

    Train on it with `run.packing: best_fit`: a question apart from its context has no answer.

    Raises DatasetError when `out` holds something else; made again with the same options, it is left alone.
    """
    tasks = [parse(spec) for spec in specs]
    if samples < 1 or heldout < 1 or seed < 0:
        raise DatasetError("--samples and --heldout-samples must be at least 1, --seed at least 0")
    options = [vars(task) for task in tasks]
    identity: dict[str, Any] = {"tasks": list(specs), "options": options, "seed": seed}
    identity |= {"samples": samples, "heldout": heldout}
    recipe = canonical({**identity, "tokenizer": tokenizer.identity})
    plan = digest(recipe)
    if (out / "manifest.json").is_file() and (found := open_dataset(out)).manifest.get("plan") == plan:
        return found
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DatasetError(f"{out}: is not empty and holds no such dataset. Choose another --out")
    tmp = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    try:
        (tmp / "shards").mkdir(parents=True)
        splits = {
            split: split_record(_shards(tasks, tokenizer, tmp, split, n, seed))
            for split, n in {"train": samples, "heldout": heldout}.items()
        }
        counts = {key: sum(s.get(key, 0) for s in splits.values()) for key in COUNTED}
        write_bytes(tmp / "sources.jsonl", recipe)  # without a line's end: its hash is the plan's digest
        write_manifest(
            tmp,
            {
                "plan": plan,
                "dtype": dtype_for(tokenizer.vocab),
                "vocab": tokenizer.vocab,
                "eos_id": tokenizer.eos_id,
                "tokenizer": tokenizer_record(tokenizer, tmp),
                "splits": splits,
                "sources": [{"source": "tasks", "files": 1, **identity}],
                "inputs": {"files": 1, "blake3": plan},
                "counts": counts,
                "heldout": heldout / (samples + heldout),
            },
        )
        if out.exists():
            out.rmdir()
        os.rename(tmp, out)
    except BaseException:
        shutil.rmtree(tmp, ignore_errors=True)
        raise
    return open_dataset(out)


def _shards(
    tasks: list[Task], tokenizer: Tokenizer, folder: Path, split: str, samples: int, seed: int
) -> list[dict[str, Any]]:
    writer = ShardWriter(folder / "shards", f"{split}-000000", dtype_for(tokenizer.vocab), masks=True)
    table = tokenizer.bytes_per_token
    for number in range(samples):
        which, n = number % len(tasks), number // len(tasks)
        ids, answers = encode(tasks[which].sample(seed, split, n), tokenizer)
        ids = np.append(ids, tokenizer.eos_id)
        writer.add(ids, int(table[ids].sum()), np.append(answers > 0, True))
    return writer.close()
