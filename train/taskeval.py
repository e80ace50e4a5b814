"""Local tasks: what a model gets right, needing no network. Scores by difficulty, of any run.

    mqar, copy, passkey    made from a seed (`dataset.tasks`): share of answers whose every token is the
                           model's first choice, given the right tokens before it
    mmlu                   the worked questions of 57 subjects that the package lm-eval carries (281; not the
                           test set): four choices, so chance is 0.25

Shape legend: B samples  T tokens  V vocabulary.
"""

from __future__ import annotations

import importlib.util
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dataset.tasks import Encoder, encode, parse
from model.core import Docs
from model.lm import LanguageModel
from train.errors import UserError
from train.harness import CPU, Scorer
from train.world import autocast

LOGITS = 1 << 25  # logits held at once
MMLU = "tasks/mmlu/flan_cot_fewshot/_cot_prompts.json"


def answer(
    lm: LanguageModel, text: Encoder, spec: str, samples: int, seed: int = 0, precision: str = "fp32"
) -> dict[str, dict[str, float]]:
    """{difficulty: {"accuracy", "token_accuracy", "answers"}} over held-out samples, and their mean as "all".

    samples: per difficulty. Raises DatasetError for a task that does not exist.
    """
    task = parse(spec)
    cells: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for number in range(samples * len(task.cells())):
        sample = task.sample(seed, "heldout", number)
        cells.setdefault(sample.cell, []).append(encode(sample, text))
    out = {}
    for cell, encoded in cells.items():
        longest = max(len(ids) for ids, _ in encoded)
        rows = max(1, LOGITS // (longest * lm.vocab))
        parts = [
            _right(lm, encoded[i : i + rows], precision) for i in range(0, len(encoded), rows)
        ]  # [4]: answers, right ones, tokens, right ones
        answers, right, tokens, right_tokens = np.sum(parts, axis=0).tolist()
        out[cell] = {
            "accuracy": right / answers,
            "token_accuracy": right_tokens / tokens,
            "answers": int(answers),
        }
    mean = {k: float(np.mean([c[k] for c in out.values()])) for k in ("accuracy", "token_accuracy")}
    out["all"] = {**mean, "answers": sum(int(c["answers"]) for c in out.values())}
    return out


@torch.no_grad()
def _right(lm: LanguageModel, encoded: list[tuple[np.ndarray, np.ndarray]], precision: str) -> np.ndarray:
    T = max(len(ids) for ids, _ in encoded)
    tokens = torch.zeros(len(encoded), T, dtype=torch.int64)
    places = torch.zeros_like(tokens)
    for i, (ids, answers) in enumerate(encoded):
        tokens[i, : len(ids)], places[i, : len(ids)] = torch.from_numpy(ids), torch.from_numpy(answers)
    lengths = torch.tensor([len(ids) for ids, _ in encoded])
    docs = None
    if int(lengths.min()) < T:
        docs = Docs.from_mask(torch.arange(T) < lengths[:, None])
    with autocast(CPU, precision):
        chosen = lm(tokens, docs=docs).logits.argmax(-1)
    return tally(chosen[:, :-1] == tokens[:, 1:], places[:, 1:])


def tally(hits: Tensor, places: Tensor) -> np.ndarray:
    """[answers, those with no token wrong, their tokens, the right ones]; hits, places: [B, T]."""
    count = int(places.max()) + 1
    key = (torch.arange(len(places))[:, None] * count + places)[places > 0]
    wrong = torch.zeros(len(places) * count, dtype=torch.int64).index_add_(0, key, (~hits[places > 0]).long())
    keys = key.unique()
    return np.array([len(keys), int((wrong[keys] == 0).sum()), len(key), int(hits[places > 0].sum())])


# ----------------------------------------------------------------------------- multiple choice


@dataclass(frozen=True)
class Question:
    subject: str
    text: str
    choices: tuple[str, ...]
    right: int


def mmlu_questions(path: Path | None = None) -> list[Question]:
    """The worked questions in lm-eval's package folder (or a file of that form). Raises UserError."""
    if path is None:
        package = importlib.util.find_spec("lm_eval")
        if package is None or not package.submodule_search_locations:
            raise UserError("mmlu: its questions come with lm-eval: pip install 'latent-lab[eval]'")
        path = Path(package.submodule_search_locations[0]) / MMLU
    try:
        prompts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    out = []
    for subject, prompt in sorted(prompts.items()):
        for block in re.split(r"\n\s*Q: ", prompt)[1:]:
            if question := _question(subject, block):
                out.append(question)
    return out


def _question(subject: str, block: str) -> Question | None:
    """One block `question (A) .. (B) .. (C) .. (D) .. A: reasons. The answer is (C).`"""
    head, _, reasons = block.partition("\nA:")
    parts = re.split(r"\s*\(([A-D])\)\s*", head)
    said = re.findall(r"answer is \(?([A-D])\)?", reasons)
    if parts[1::2] != list("ABCD") or not said:
        return None
    return Question(subject, parts[0].strip(), tuple(c.strip() for c in parts[2::2]), "ABCD".index(said[-1]))


def mmlu(scorer: Scorer, questions: list[Question]) -> dict[str, dict[str, float]]:
    """Share answered right, in two ways: `letter`, the choices shown and A to D compared; `cloze`, the
    choices' own texts compared by log-likelihood per byte. Chance is 0.25 for both."""
    hits = {"letter": 0, "cloze": 0}
    for q in questions:
        listed = " ".join(f"({letter}) {choice}" for letter, choice in zip("ABCD", q.choices))
        shown = f"Q: {q.text}\n{listed}\nA: The answer is ("
        letters = [scorer.score(shown, letter)[0] for letter in "ABCD"]
        asked = f"Q: {q.text}\nA:"
        texts = [scorer.score(asked, f" {c}")[0] / (len(c.encode()) + 1) for c in q.choices]
        hits["letter"] += int(np.argmax(letters)) == q.right
        hits["cloze"] += int(np.argmax(texts)) == q.right
    n = max(1, len(questions))
    return {way: {"accuracy": count / n, "answers": len(questions)} for way, count in hits.items()}


def run_tasks(
    lm: LanguageModel,
    text: Encoder,
    scorer: Scorer,
    specs: list[str],
    samples: int = 50,
    seed: int = 0,
    precision: str = "fp32",
) -> dict[str, Any]:
    """{spec: scores} of tasks, `mmlu` and `lm-eval:NAME`. Raises UserError and DatasetError."""
    from train.harness import harness_scores

    out: dict[str, Any] = {}
    for spec in specs:
        if spec == "mmlu":
            out[spec] = mmlu(scorer, mmlu_questions())
        elif spec.startswith("lm-eval:"):
            out |= {f"lm-eval:{k}": v for k, v in harness_scores(scorer, [spec[8:]]).items()}
        else:
            out[spec] = answer(lm, text, spec, samples, seed, precision)
    return out
