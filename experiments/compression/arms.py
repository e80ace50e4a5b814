"""What the study compares, and how one arm is trained and scored.

Shape legend: C context tokens.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.compress import ContextCompressor, wrap
from model.compress import evaluate as ev
from train.compress_data import Example, collate, passkey, recall
from train.compress_loop import Fit, Settings
from train.hooks import Signals
from train.metrics import Log
from train.world import World

SEGMENT = 64
VARIABLE, MATCHED = "variable_autocompressor", "autocompressor-matched"


@dataclass(frozen=True)
class Arm:
    """One row of the scoreboard.

    rate:   learning rate; None where nothing is trained.
    ratio:  asked of every context; None: the method's own settings say what is kept.
    random: whether another seed is another result.
    """

    name: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    rate: float | None = None
    ratio: float | None = None
    random: bool = True


@dataclass(frozen=True)
class Effort:
    """How much is spent on every arm. examples: held-out windows scored.  oracle_steps: per example."""

    steps: int
    batch: int
    micro: int
    rate: float
    examples: int
    oracle_steps: int


def arms(effort: Effort, ratio: float, ratios: tuple[float, ...], context: int) -> list[Arm]:
    """All arms at `ratio` source tokens per slot, and three that need no training at `ratios` as well.

    Pairs halve a memory at most, so the baselines at ratio 2 are the ones to hold them against. The matched
    AutoCompressor gets its number of slots when the variable one of the same seed has been scored.
    """
    slots, lora = round(context / ratio), {"lora_rank": 16, "lora_alpha": 16}
    each = max(1, round(SEGMENT / ratio))
    auto = {"segment_length": SEGMENT, "lora_rank": 16}
    variable = {"compression_max_len": each, "recompress_memory": False, "compression_lambda": 0.05,
                "compress_stop_threshold": 0.5}  # fmt: skip
    rate = effort.rate
    trained = [
        Arm("condense", "condense", {"num_condense_tokens": slots, **lora}, rate),
        Arm("condense-mean", "condense", {"num_condense_tokens": slots, "slots": "mean", **lora}, rate),
        Arm("autocompressor", "autocompressor", {"summary_length": each, **auto}, rate),
        Arm(VARIABLE, VARIABLE, {**variable, **auto}, rate),
        Arm(MATCHED, "autocompressor", auto, rate),
        Arm("pairs", "pairs", {"T_w": 8, "r": 0.0}, 1e-3),
        Arm("pairs-sink", "pairs", {"T_w": 8, "r": 0.0, "sinks": 1}, rate / 5),
        Arm(
            "clusters",
            "clusters",
            {"layer_idx": (0,), "use_residuals": True, "importance": False},
            1e-3,
            ratio,
        ),
    ]
    always, curves = ("last", "snapkv", "mean_pool"), sorted({*ratios} - {ratio})
    free = [Arm(f"{m}@{ratio:g}", m, {}, None, ratio, False) for m in (*always, "sink_window")]
    free.append(Arm(f"random_eviction@{ratio:g}", "random_eviction", {}, None, ratio))
    free += [Arm(f"{m}@{r:g}", m, {}, None, r, False) for r in curves for m in always]
    oracle = Arm(
        f"oracle@{ratio:g}", "oracle", {"steps": effort.oracle_steps, "lr": 0.05}, None, ratio, False
    )
    return [*trained, *free, oracle]


def fitted(arm: Arm, variable: Mapping[str, Any] | None, context: int) -> Arm:
    """The arm with what an earlier result settles: as many slots as the variable memory had on average."""
    if arm.name != MATCHED or variable is None:
        return arm
    each = max(1, round(float(variable["slots"]) / math.ceil(context / SEGMENT)))
    return Arm(arm.name, arm.method, {**arm.options, "summary_length": each}, arm.rate)


def batches_of(held: list[Example]) -> list[Any]:
    """At most 16 windows each, near-equal, so that none is left alone: it could not be shuffled."""
    n = -(-len(held) // 16)
    return [collate(held[len(held) * i // n : len(held) * (i + 1) // n]) for i in range(n)]


def bounds(model: Any, held: list[Example]) -> dict[str, Tensor]:
    """Nats [N] without and with the whole context: the same for every arm, so they are measured once."""
    return ev.score(wrap(model, "none"), batches_of(held), ("none", "full")).nll


def run_arm(
    arm: Arm, seed: int, model: Any, rows: list[Example], held: list[Example], effort: Effort, runs: Path,
    ends: dict[str, Tensor], tokenizer: Any = None,
) -> dict[str, Any]:  # fmt: skip
    """Train (where there is something to train) and score; a training that was begun goes on.

    ends: of `bounds`.  Raises KeyboardInterrupt when a signal ends the training; what was done is saved.
    """
    began = time.process_time()
    torch.manual_seed(seed)
    c = wrap(model, {"method": arm.method, "seed": seed, **arm.options})
    if arm.rate is not None:
        train(c, arm, seed, rows, held, effort, runs / f"{arm.name}_{seed}")
    trained = time.process_time()
    asked = {} if arm.ratio is None else {"ratio": arm.ratio}
    batches = batches_of(held)
    adapted = "autocompressor" in arm.method  # the decoder reads with an adapter of the method's own
    variants = ("compressed", "shuffled", "random", *(("adapted_none",) if adapted else ()))
    made = ev.score(c, batches, variants, **asked)
    made.nll |= ends
    if not adapted:
        made.nll["adapted_none"] = ends["none"]
    return {
        "name": arm.name, "method": arm.method, "seed": seed, "ratio": arm.ratio,
        "options": {k: v for k, v in arm.options.items()}, "tokens": int(made.tokens.sum()),
        "losses": {v: made.loss(v) for v in made.nll}, "R": made.recovered(seed=seed),
        "beats": {v: made.beats(v, seed=seed) for v in ("none", "adapted_none", "shuffled", "random")},
        "kv_bytes": made.kv_bytes, "full_kv_bytes": made.full_kv_bytes, "slots": made.slots,
        "restore": ev.restore_accuracy(c, batches[0], **asked),
        "cost": ev.cost(c, batches[0], new_tokens=4, rounds=1, **asked).as_dict(),
        "answers": None if tokenizer is None else answers(c, tokenizer, asked),
        "train_cpu_s": trained - began, "score_cpu_s": time.process_time() - trained,
    }  # fmt: skip


def train(
    c: ContextCompressor, arm: Arm, seed: int, rows: list[Example], held: list[Example], effort: Effort,
    run: Path,
) -> None:  # fmt: skip
    settings = Settings(
        steps=effort.steps, batch=effort.batch, micro=effort.micro, learning_rate=arm.rate, seed=seed,
        eval_steps=effort.steps, eval_examples=16, save_steps=max(1, effort.steps // 4), precision="bf16",
    )  # fmt: skip
    run.mkdir(parents=True, exist_ok=True)
    log = Log(run, True, settings.steps, quiet=True)
    described = {"arm": arm.name, "options": repr(arm.options), "seed": seed, "effort": repr(effort)}
    fit = Fit(c, rows, held, settings, run, log, World(), described)
    fit.resume()
    try:
        with Signals(alone=True) as signals:
            if not fit.fit(signals):
                raise KeyboardInterrupt
    finally:
        log.close()
    c.eval()


def answers(c: ContextCompressor, tokenizer: Any, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Exact match and F1 over four questions to each of three compressed lists, and passkeys by length and
    depth. A ratio that a short list cannot meet counts as it is asked."""
    rng = random.Random(0)
    exact, f1 = [], []
    for _ in range(3):
        record = recall(rng, pairs=8)
        facts = [line.split(" = ") for line in record["context"].splitlines()]
        chosen = rng.sample(facts, 4)
        said = ev.answer(c, tokenizer, record["context"], [f"{k} =" for k, _ in chosen], 4, **asked)
        words = [(s.split() or [""])[0] for s in said]
        exact += [ev.exact_match(w, v) for w, (_, v) in zip(words, chosen)]
        f1 += [ev.f1(w, v) for w, (_, v) in zip(words, chosen)]
    keys = ev.passkey_table(
        c, tokenizer, partial(passkey, rng), lengths=(2, 6), depths=(0.0, 0.5, 1.0), trials=1, **asked
    )
    return {
        "exact": statistics.mean(exact), "f1": statistics.mean(f1), "passkey": statistics.mean(keys.values()),
        "by_length_and_depth": [[n, d, share] for (n, d), share in keys.items()],
    }  # fmt: skip
