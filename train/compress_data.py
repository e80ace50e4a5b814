"""Contexts, prompts and answers for training and scoring context compressors.

Sources, all local:
    a prepared dataset folder                          rows of context + target tokens, cut from running text
    *.txt, *.md                                        the same, tokenized here
    *.jsonl                                            {"context", "prompt", "answer"} (or activation_prompt,
                                                       expected_completion), or {"text"}
    a Super-NaturalInstructions task (*.json)          definition and examples as context, input and output
    a LongBench v2 file (*.json)                       context, question with four choices, the letter
    passkey | recall | arithmetic | wordnet:DIR        generated, seeded

Shape legend: B batch  C context  T text.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import dataset
from model.compress.tokens import token_ids, translated
from train.errors import UserError

LONG = "records longer than max_tokens or max_characters"
EMPTY = "records without a context, a prompt or an answer"
TAIL = "tokens behind the last whole window of a text"
GENERATED = ("passkey", "recall", "arithmetic", "wordnet")


@dataclass(frozen=True)
class Example:
    """Token ids of a context and of the text after it; the first `prompt` ids of the text are not scored.

    encoded: the context in the tokens of an encoder with a tokenizer of its own, where there is one.
    """

    context: tuple[int, ...]
    text: tuple[int, ...]
    prompt: int = 0
    encoded: tuple[int, ...] | None = None

    @property
    def read(self) -> tuple[int, ...]:
        """What is compressed."""
        return self.context if self.encoded is None else self.encoded


class ExampleBatch(NamedTuple):
    """context, context_mask [B, C] as they are compressed, source, source_mask [B, C'] as the decoder reads
    them, and text, text_mask, labels [B, T]; padded on the right with id 0."""

    context: Tensor
    context_mask: Tensor
    source: Tensor
    source_mask: Tensor
    text: Tensor
    text_mask: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> ExampleBatch:
        return ExampleBatch(*(t.to(device) for t in self))


def padded(rows: Sequence[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
    """ids [B, T], padded on the right with id 0, and their mask."""
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(r, dtype=torch.int64) for r in rows], True)
    lengths = torch.tensor([len(r) for r in rows])
    return ids, torch.arange(ids.shape[1]) < lengths[:, None]


def collate(examples: Sequence[Example]) -> ExampleBatch:
    context, context_mask = padded([e.read for e in examples])
    source, source_mask = padded([e.context for e in examples])
    text, text_mask = padded([e.text for e in examples])
    prompts = torch.tensor([e.prompt for e in examples])
    labels = text.masked_fill(~text_mask | (torch.arange(text.shape[1]) < prompts[:, None]), -100)
    return ExampleBatch(context, context_mask, source, source_mask, text, text_mask, labels)


@dataclass(frozen=True)
class Reading:
    """How sources become examples: lengths in tokens for running text, limits for the rest."""

    context: int = 256
    target: int = 64
    max_tokens: int = 4096
    max_characters: int = 10_000
    samples: int = 2000
    heldout: float = 0.05
    seed: int = 0


Rows = list[Example]


def read(source: str, tokenizer: Any, how: Reading, encoder: Any = None) -> tuple[Rows, Rows, Counter[str]]:
    """Training and held-out examples, which share no row, and what was left out, counted by its reason.

    encoder: tokenizer of an encoder that has its own; contexts then come in its tokens too.
    Raises UserError for a source that is not there or holds nothing usable.
    """
    train, held, dropped = _split(source, tokenizer, how)
    if encoder is not None and encoder is not tokenizer:
        train, held = (_encoded(rows, tokenizer, encoder, how, dropped) for rows in (train, held))
    if not train or not held:
        raise UserError(
            f"{source}: {len(train) + len(held)} usable examples{left_out(dropped)}; at least 2 are needed. "
            f"Give more text, or shorter --context ({how.context}) and --target ({how.target})"
        )
    return train, held, dropped


def left_out(dropped: Counter[str]) -> str:
    """(left out: 3 records that ..., 120 tokens ...), or nothing."""
    said = ", ".join(f"{n:,} {what}" for what, n in sorted(dropped.items()))
    return f" (left out: {said})" if said else ""


def _encoded(rows: Rows, tokenizer: Any, encoder: Any, how: Reading, dropped: Counter[str]) -> Rows:
    """The rows with their contexts in the encoder's tokens too, where they fit."""
    made = [replace(e, encoded=tuple(translated(e.context, tokenizer, encoder))) for e in rows]
    fit = [e for e in made if 0 < len(e.read) <= how.max_tokens]
    if len(fit) < len(made):
        dropped[LONG] += len(made) - len(fit)
    return fit


def _split(source: str, tokenizer: Any, how: Reading) -> tuple[Rows, Rows, Counter[str]]:
    path, dropped = Path(source), Counter[str]()
    name = source.split(":")[0]
    if name in GENERATED:
        rows = _encode(generate(source, how.samples, how.seed), tokenizer, how, dropped)
    elif (path / "manifest.json").is_file():
        return *_prepared(path, how), dropped
    elif path.suffix in (".txt", ".md"):
        rows = running(token_ids(tokenizer, path.read_text(), start=True), how, dropped)
    elif path.suffix in (".jsonl", ".json"):
        rows = _encode(_records(path), tokenizer, how, dropped)
    else:
        raise UserError(
            f"{source}: not a dataset folder, .txt, .md, .jsonl or .json file, nor {', '.join(GENERATED)}"
        )
    random.Random(how.seed).shuffle(rows)
    cut = max(1, round(len(rows) * how.heldout))
    return rows[cut:], rows[:cut], dropped


def _prepared(path: Path, how: Reading) -> tuple[list[Example], list[Example]]:
    data, out = dataset.open(path), []
    for split in ("train", "heldout"):
        view = data.view(how.context + how.target, seed=how.seed, split=split)
        n = min(how.samples if split == "train" else max(8, how.samples // 10), view.rows)
        rows = view.tokens(np.arange(n)).tolist()
        out.append([Example(tuple(r[: how.context]), tuple(r[how.context :])) for r in rows])
    return out[0], out[1]


def running(ids: Sequence[int], how: Reading, dropped: Counter[str]) -> Rows:
    """Consecutive windows of context + target tokens; what is left after the last whole one is counted."""
    step = how.context + how.target
    if tail := len(ids) % step:
        dropped[TAIL] += tail
    return [
        Example(tuple(ids[at : at + how.context]), tuple(ids[at + how.context : at + step]))
        for at in range(0, len(ids) - step + 1, step)
    ]


def _encode(records: Iterator[dict[str, str]], tokenizer: Any, how: Reading, dropped: Counter[str]) -> Rows:
    """Examples that fit: no context, prompt or answer is cut short. What does not is counted."""
    out: Rows = []
    for r in records:
        if "text" in r:
            out += running(token_ids(tokenizer, r["text"], start=True), how, dropped)
            continue
        context = token_ids(tokenizer, r["context"], start=True)
        prompt, answer = (token_ids(tokenizer, r[part]) for part in ("prompt", "answer"))
        if len(r["context"]) > how.max_characters or len(context) > how.max_tokens:
            dropped[LONG] += 1
        elif not (context and prompt and answer):
            dropped[EMPTY] += 1
        else:
            out.append(Example(tuple(context), (*prompt, *answer), len(prompt)))
    return out


# ----------------------------------------------------------------------------- files


def _records(path: Path) -> Iterator[dict[str, str]]:
    """Records of any supported JSON file, as text or as context, prompt and answer."""
    try:
        if path.suffix == ".jsonl":
            for number, line in enumerate(path.read_text().splitlines(), 1):
                if line.strip():
                    yield _record(json.loads(line), f"{path}:{number}")
            return
        data = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    try:
        if isinstance(data, dict) and "Instances" in data:
            yield from _instructions(data)
            return
        if isinstance(data, list) and data and "choice_A" in data[0]:
            yield from (_choices(r) for r in data)
            return
    except (KeyError, IndexError, TypeError) as error:
        raise UserError(
            f"{path}: a field is missing or of another kind ({type(error).__name__}: {error}); compare it "
            "with a task of Super-NaturalInstructions or with LongBench v2's data.json"
        ) from None
    if not isinstance(data, list):
        raise UserError(
            f"{path}: a list of records, a Super-NaturalInstructions task or a LongBench v2 file is needed"
        )
    yield from (_record(r, f"{path}[{i}]") for i, r in enumerate(data))


def _record(r: Any, where: str) -> dict[str, str]:
    if not isinstance(r, dict):
        raise UserError(
            f"{where}: {str(r)[:40]!r} is no record; write an object with context, prompt and answer"
        )
    if "text" in r:
        return {"text": str(r["text"])}
    prompt, answer = (
        r.get("prompt", r.get("activation_prompt")),
        r.get("answer", r.get("expected_completion")),
    )
    if "context" not in r or prompt is None or answer is None:
        raise UserError(
            f"{where}: has {', '.join(sorted(r))}; needs context, prompt and answer (or activation_prompt "
            "and expected_completion), or text"
        )
    return {"context": str(r["context"]), "prompt": str(prompt), "answer": str(answer)}


def _instructions(task: dict[str, Any]) -> Iterator[dict[str, str]]:
    definition = " ".join(task["Definition"]) if isinstance(task["Definition"], list) else task["Definition"]
    shown = "".join(
        f"\nInput: {e['input']}\nOutput: {e['output']}\n" for e in task.get("Positive Examples", [])
    )
    for r in task["Instances"]:
        answer = r["output"][0] if isinstance(r["output"], list) else r["output"]
        yield {
            "context": definition + shown,
            "prompt": f"\nInput: {r['input']}\nOutput:",
            "answer": f" {answer}",
        }


def _choices(r: dict[str, Any]) -> dict[str, str]:
    choices = "".join(f"\n{letter}. {r[f'choice_{letter}']}" for letter in "ABCD")
    return {
        "context": r["context"],
        "prompt": f"\n\nQuestion: {r['question']}{choices}\nAnswer:",
        "answer": f" {r['answer']}",
    }


# ----------------------------------------------------------------------------- generated


def generate(source: str, samples: int, seed: int) -> Iterator[dict[str, str]]:
    """Records of a generated task; the same for the same seed."""
    kind, _, where = source.partition(":")
    rng = random.Random(seed)
    if kind == "wordnet":
        yield from wordnet(Path(where), samples, rng)
        return
    makers: dict[str, Any] = {"passkey": passkey, "recall": recall, "arithmetic": arithmetic}
    for _ in range(samples):
        yield makers[kind](rng)


def passkey(rng: random.Random, lines: int = 12, depth: float | None = None) -> dict[str, str]:
    """A five-digit key in `lines` lines of filler, at `depth` of them (0 first, 1 last; None: anywhere)."""
    filler = "The grass is green. The sky is blue. The sun is yellow. Here we go.\n"
    key = f"{rng.randrange(10_000, 100_000)}"
    at = rng.randint(0, lines) if depth is None else round(depth * lines)
    text = [filler] * lines
    text.insert(at, f"The pass key is {key}. Remember it.\n")
    return {"context": "".join(text), "prompt": "What is the pass key? The pass key is", "answer": f" {key}"}


def recall(rng: random.Random, pairs: int = 12) -> dict[str, str]:
    """Key-value pairs; the value of one key is asked for."""
    letters = "bcdfghjklmnpqrstvwz"
    keys = rng.sample([a + e + b for a in letters for e in "aeiou" for b in letters], pairs)
    values = [str(rng.randrange(10, 100)) for _ in keys]
    asked = rng.randrange(pairs)
    context = "".join(f"{k} = {v}\n" for k, v in zip(keys, values))
    return {"context": context, "prompt": f"{keys[asked]} =", "answer": f" {values[asked]}"}


def arithmetic(rng: random.Random, facts: int = 3) -> dict[str, str]:
    """A short sum in words."""
    names = rng.sample(["Ann", "Ben", "Cleo", "Dan", "Eva", "Finn"], facts)
    counts = [rng.randrange(2, 30) for _ in names]
    context = " ".join(f"{n} has {c} apples." for n, c in zip(names, counts))
    return {
        "context": context,
        "prompt": " How many apples are there in all? Answer:",
        "answer": f" {sum(counts)}",
    }


def wordnet(folder: Path, samples: int, rng: random.Random) -> Iterator[dict[str, str]]:
    """Glosses of a few words as context; one is asked for its word. folder: holds WordNet's data.* files."""
    files = sorted(folder.glob("data.*"))
    if not files:
        raise UserError(f"{folder}: no WordNet data files (data.noun, ...) there")
    entries = []
    for file in files:
        for line in file.read_text(errors="replace").splitlines():
            if line[:1] != " " and "|" in line:
                word = line.split()[4].replace("_", " ")
                gloss = line.split("|", 1)[1].split(";")[0].strip()
                entries.append((word, gloss))
    for _ in range(samples):
        chosen = rng.sample(entries, 8)
        word, gloss = rng.choice(chosen)
        context = "".join(f"{w}: {g}\n" for w, g in chosen)
        yield {"context": context, "prompt": f'The word that means "{gloss}" is', "answer": f" {word}"}
