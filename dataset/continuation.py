"""Teacher continuations: prefix of a training document, generated answer, loss on the answer alone.

`dataset continue` writes an ordinary dataset whose `.msk` is 0 on the prefix and 1 on the answer and its EOS.
Prefixes come from the training split only, so nothing held out enters. Answers are tokenized anew, so the
teacher may have another vocabulary. Prior work: sequence-level distillation (Kim and Rush, 2016).
"""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dataset.chat import INSTRUCTION, Frame, frame
from dataset.files import TEMPORARY, DatasetError, canonical, digest, read_json, write_bytes, write_json
from dataset.format import Dataset, open_dataset, write_manifest
from dataset.order import Permutation, derive
from dataset.prepare import COUNTED, split_record, tokenizer_record
from dataset.score import Reference
from dataset.writer import ShardWriter

TASK_DOCUMENTS = 64  # written together: what a kill can cost
REFUSAL = re.compile(
    r"^\W*(i['’]?m sorry|i am sorry|i apologi[sz]e|sorry,|as an ai\b|i can(no|['’])t (help|assist))", re.I
)


@dataclass(frozen=True)
class Recipe:
    """prefix: ids of a document's start. new: the teacher's ids at most. documents: prefixes taken.

    temperature: 0 is greedy. seed: of the choice of documents and the sampling.
    chat: ask in the teacher's chat template, with `instruction` before the text.
    """

    prefix: int = 256
    new: int = 128
    documents: int = 1000
    temperature: float = 0.0
    seed: int = 0
    chat: bool = False
    instruction: str = INSTRUCTION

    def check(self) -> None:
        """Raises DatasetError for values out of range."""
        if min(self.prefix, self.new, self.documents) < 1 or self.temperature < 0:
            raise DatasetError("--prefix, --new and --documents must be at least 1, --temperature at least 0")


def unwanted(answer: str) -> str | None:
    """Why an answer is left out, or None: empty, a refusal, or one line repeated."""
    text = answer.strip()
    if len(text) < 2:
        return "empty"
    if REFUSAL.search(text):
        return "refusals"
    lines = [line for line in text.splitlines() if line.strip()]
    if len(lines) > 3 and len(set(lines)) <= len(lines) // 3:
        return "repetitions"
    return None


def continue_documents(
    data: Dataset,
    teacher: Reference,
    out: Path,
    recipe: Recipe,
    device: str = "cpu",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Dataset:
    """Write the dataset `out` of teacher continuations of `data`'s training documents.

    Killed, it goes on after the last finished run of 64 documents. Raises DatasetError.
    """
    recipe.check()
    if not data.tokenizer.exact:
        raise DatasetError(
            f"{data.path}: its tokenizer changes the text, so prefixes cannot be given back whole. Prepare "
            "it with a byte-level tokenizer"
        )
    asked = chat_frame(teacher, recipe)
    identity = {"data": data.id, "teacher": teacher.identity, **asdict(recipe)}
    _claim(out, digest(canonical(identity)))
    split = data.splits["train"]
    chosen = _choose(data, recipe)
    receipts = []
    for number, start in enumerate(range(0, len(chosen), TASK_DOCUMENTS)):
        path = out / ".prepare" / "receipts" / f"{number:06d}.json"
        if not path.exists():
            documents = [split.document(i)[: recipe.prefix] for i in chosen[start : start + TASK_DOCUMENTS]]
            write_json(path, _task(documents, data, teacher, out, number, recipe, device, asked))
        receipts.append(read_json(path))
        progress(min(start + TASK_DOCUMENTS, len(chosen)), len(chosen))
    return _finish(data, out, receipts, identity)


def _claim(out: Path, plan: str) -> None:
    mark = out / ".prepare" / "plan.json"
    if (out / "manifest.json").exists():
        raise DatasetError(f"{out}: holds a dataset already. Choose another --out")
    if mark.exists():
        if read_json(mark)["plan"] != plan:
            raise DatasetError(f"{out}: unfinished work with other settings is there. Choose another --out")
    elif out.exists() and (not out.is_dir() or any(p.name != ".prepare" for p in out.iterdir())):
        raise DatasetError(f"{out}: the folder is not empty. Choose another --out")
    write_json(mark, {"plan": plan})
    (out / "shards").mkdir(exist_ok=True)


def _choose(data: Dataset, recipe: Recipe) -> list[int]:
    """Numbers of training documents that are longer than the prefix, in a seeded order."""
    split = data.splits["train"]
    order = Permutation(max(split.documents, 1), derive("continue", recipe.seed, data.id))
    lengths = np.concatenate([s.len for s in split.shards]) if split.shards else np.zeros(0, np.uint32)
    numbers = order(np.arange(len(lengths)))
    chosen = numbers[lengths[numbers] > recipe.prefix][: recipe.documents].tolist()
    if not chosen:
        raise DatasetError(f"{data.path}: no training document is longer than --prefix {recipe.prefix} ids")
    return chosen


def _task(
    prefixes: list[np.ndarray],
    data: Dataset,
    teacher: Reference,
    out: Path,
    number: int,
    recipe: Recipe,
    device: str,
    asked: Frame,
) -> dict[str, Any]:
    """Shards and counts of one run of documents; the same at every try."""
    table = data.tokenizer.bytes_per_token
    counts: Counter[str] = Counter()
    writer = ShardWriter(out / "shards", f"train-{number:06d}", data.manifest["dtype"], masks=True)
    torch.manual_seed(derive(recipe.seed, number) % 2**63)
    try:
        for prefix in prefixes:
            # a cut may fall inside a character: the teacher and the row get whole ones
            text = data.tokenizer.decode_bytes(prefix).decode(errors="ignore")
            head = data.tokenizer.encode(text)
            answer = _answer(teacher, text, recipe, device, asked)
            if reason := unwanted(answer):
                counts[reason] += 1
                continue
            if data.tokenizer.unspellable(answer) is not None:
                counts["errors"] += 1
                continue
            tail = np.append(data.tokenizer.encode(answer), data.eos_id)
            ids = np.concatenate([head, tail])
            mask = np.concatenate([np.zeros(len(head), np.uint8), np.ones(len(tail), np.uint8)])
            writer.add(ids, int(table[ids].sum()), mask)
            counts.update(documents=1, tokens=len(ids), text_bytes=int(table[ids].sum()), answer=len(tail))
        return {"shards": writer.close(), "counts": dict(counts)}
    finally:
        writer.abort()


def chat_frame(teacher: Reference, recipe: Recipe) -> Frame:
    """What stands around a prefix; nothing without `chat`. Raises DatasetError, also without room for one."""
    if not recipe.chat:
        empty = np.zeros(0, np.int64)
        asked = Frame(empty, empty, frozenset({teacher.tokenizer.eos_id}))
    elif teacher.chat is None:
        raise DatasetError("--chat: only a transformers teacher has a chat template. Leave --chat out")
    else:
        asked = frame(teacher.chat(), recipe.instruction)
    if len(asked) + recipe.new >= teacher.context:
        template = f"the template takes {len(asked)} ids and " if recipe.chat else ""
        raise DatasetError(
            f"--new {recipe.new}: {template}the teacher reads {teacher.context} in all, which leaves none "
            "for the text. Lower --new"
        )
    return asked


def _answer(teacher: Reference, text: str, recipe: Recipe, device: str, asked: Frame) -> str:
    room = teacher.context - recipe.new - len(asked)
    ids = asked.around(teacher.tokenizer.encode(text)[-room:].astype(np.int64))
    tokens = torch.from_numpy(ids)[None].to(device)
    made = teacher.generate(tokens, max_new_tokens=recipe.new, temperature=recipe.temperature)
    new = made[0, tokens.shape[1] :].cpu().numpy()
    ends = np.flatnonzero(np.isin(new, sorted(asked.stop)))
    return teacher.tokenizer.decode_bytes(new[: ends[0]] if len(ends) else new).decode(errors="ignore")


def _finish(data: Dataset, out: Path, receipts: list[dict[str, Any]], identity: dict[str, Any]) -> Dataset:
    counts: Counter[str] = Counter()
    for receipt in receipts:
        counts.update(receipt["counts"])
    if not counts["documents"]:
        raise DatasetError(f"{out}: every continuation was left out: {dict(counts)}")
    for stale in (out / "shards").glob(f"*{TEMPORARY}"):  # of killed tries
        stale.unlink(missing_ok=True)
    entries = [e for receipt in receipts for e in receipt["shards"]]
    lines = b"".join(canonical(r["counts"]) + b"\n" for r in receipts)
    write_bytes(out / "sources.jsonl", lines)
    write_manifest(
        out,
        {
            "plan": digest(canonical(identity)),
            "dtype": data.manifest["dtype"],
            "vocab": data.vocab,
            "eos_id": data.eos_id,
            "tokenizer": tokenizer_record(data.tokenizer, out),
            "splits": {"train": split_record(entries), "heldout": split_record([])},
            "sources": [{"source": "continuations", "files": len(receipts), **identity}],
            "inputs": {"files": len(receipts), "blake3": digest(lines)},
            "counts": {**{key: counts[key] for key in COUNTED}, **dict(counts)},
            "heldout": 0.0,
        },
    )
    shutil.rmtree(out / ".prepare", ignore_errors=True)
    return open_dataset(out)
