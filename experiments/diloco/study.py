"""`make study-diloco`: the DiLoCo family in miniature, on real text and a virtual clock.

Four unequal workers (0.58, 0.75, 1.51 and 3.33 s a step, the speeds of the Async DiLoCo notebook) train a
samba of 0.4M parameters, about 0.5M tokens an arm, H = 20:

    single       one worker, batch b, four times the steps          same data, one after another
    batch        one worker, batch 4b                               data parallel
    sync         DiLoCo: the four meet every H steps
    naive        async, Nesterov on every push, the outer rate of sync
    naive_tuned  the same, with the best outer rate of a grid
    dn           delayed Nesterov, N = 4
    dn_dylu      and dynamic local updates, with a grace period

`--every H --workers k` ask the same of other rounds and other numbers of workers (the four speeds, repeated).
Every arm tries the same inner learning rates on seed 0 and runs its best one on all seeds. Every run is one
JSON file under runs/study-diloco; a second call goes on where the first stopped. Predictions stand in
README.md; the measured answer is written to results.json, results.md and results.png.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import dataset
import model
from dataset.files import write_json
from experiments.commands import ROOT, run
from experiments.intervals import Mean
from model.config import load
from model.schema import Config
from train import optim
from train.feed import cut
from train.heldout import evaluate
from train.outer import layout
from train.outer.asynchronous import terms_of
from train.outer.coordinator import Coordinator, Lease
from train.outer.simulate import simulate
from train.schedule import Schedule
from train.world import World, seed_step

SUMMARY = "DiLoCo, naive and delayed-Nesterov async, dynamic local updates: in miniature; resumable."
HERE = Path(__file__).resolve().parent
RUNS = ROOT / "runs" / "study-diloco"
DATA = ROOT / "data" / "pystdlib-bytes"
HOPELESS = 100  # refused pushes after which a run counts as diverged
SPEEDS = (0.58, 0.75, 1.51, 3.33)  # seconds a step
LRS = (1.5e-3, 3e-3)
OUTER_LRS = (0.35, 0.175, 0.0875)  # of naive_tuned; naive itself has 0.7


@dataclass(frozen=True)
class Arm:
    """outer: keys of OuterConfig, None for a single worker. batch and steps: multiples of b and of S."""

    outer: dict[str, Any] | None = None
    batch: int = 1
    steps: int = 1
    rates: tuple[float, ...] = (0.7,)


@dataclass(frozen=True)
class Scale:
    """workers: k, whose shards are k.  every: H, inner steps of a round."""

    workers: int = 4
    every: int = 20

    def paces(self) -> dict[str, float]:
        """{worker: seconds a step}."""
        return {f"w{i}": SPEEDS[i % len(SPEEDS)] for i in range(self.workers)}

    def arms(self) -> dict[str, Arm]:
        k = self.workers
        return {
            "single": Arm(steps=k),
            "batch": Arm(batch=k),
            "sync": Arm({"delay": k, "dynamic": False, "grace": 1e9}),
            "naive": Arm({"delay": 1, "dynamic": False}),
            "naive_tuned": Arm({"delay": 1, "dynamic": False}, rates=OUTER_LRS),
            "dn": Arm({"delay": k, "dynamic": False}),
            "dn_dylu": Arm({"delay": k, "dynamic": True, "grace": 3.0}),
        }


ARMS = tuple(Scale().arms())
ALONE = ("single", "batch")  # no outer loop


@dataclass(frozen=True)
class Case:
    """One run: an arm at a scale with its inner and outer learning rate, and a seed."""

    arm: str
    lr: float
    outer_lr: float
    seed: int
    scale: Scale = Scale()

    @property
    def file(self) -> Path:
        at = "" if self.scale == Scale() else f"_k{self.scale.workers}_h{self.scale.every}"
        return RUNS / f"{self.arm}_lr{self.lr:g}_outer{self.outer_lr:g}_seed{self.seed}{at}.json"


class Trainer:
    """Inner training of one worker: its model, its AdamW, the parts of the data."""

    def __init__(self, config: Config, data: Any, parts: int, total: int, lr: float) -> None:
        torch.manual_seed(config.run.seed)
        self.config, self.parts, self.total = config, parts, total
        self.lm = model.build(config, vocab=data.vocab, rows=data.tokenizer.rows)
        self.view = data.view(config.run.context, seed=config.run.seed)
        self.optimizer = optim.build(self.lm, replace(config.optim, lr=lr), self.lm.no_decay(), {})
        self.schedule, self.lr = Schedule(config.schedule, total), lr
        self.fragments = layout.fragments(self.lm)

    def step(self, part: int, at: int, batch: int) -> None:
        """Inner step `at` of a part: the learning rate, too, follows the part's own count."""
        rows = cut(self.view.batch(at, batch * self.parts, part, self.parts), batch)[0]
        seed_step(self.config.run.seed, at, part)
        self.lm.advance(at, at / self.total)
        out = self.lm(rows.tokens, labels=rows.labels, docs=rows.docs)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(self.lm.parameters(), self.config.optim.clip)
        optim.set_lr(self.optimizer, self.lr * self.schedule.factor(at))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def get(self) -> np.ndarray:
        return np.concatenate([f.get() for f in self.fragments])

    def put(self, theta: np.ndarray) -> None:
        at = 0
        for f in self.fragments:
            f.put(theta[at : at + f.size])
            at += f.size


def train(case: Case, config: Config, data: Any, steps: int) -> dict[str, Any]:
    """One run; held-out bits per byte of the outer parameters at its end and along the way."""
    scale, curve = case.scale, []
    arm, k = scale.arms()[case.arm], scale.workers
    config = replace(config, run=replace(config.run, seed=case.seed))
    heldout = data.view(config.run.context, seed=0, split="heldout")
    total, batch = steps * arm.steps, config.run.batch * arm.batch

    def score(lm: Any, tokens: int, seconds: float, last: bool) -> None:
        """The last point of a curve is the result; those along the way are for the picture."""
        settings = config.run if last else replace(config.run, eval_tokens=8192)
        scores = evaluate(lm, heldout, settings, World())
        curve.append({"tokens": tokens, "seconds": seconds, "bpb": scores.bpb["next"]})

    per_step = batch * config.run.context
    if arm.outer is None:
        alone = Trainer(config, data, 1, total, case.lr)
        for at in range(total):
            alone.step(0, at, batch)
            if (at + 1) % max(1, total // 8) == 0 or at + 1 == total:
                score(alone.lm, (at + 1) * per_step, (at + 1) * SPEEDS[0], at + 1 == total)
        return {"bpb": curve[-1]["bpb"], "curve": curve, "sent": 0}
    outer = replace(config.outer, every=scale.every, shards=k, lr=case.outer_lr, stale=10**6, **arm.outer)
    workers = {name: Trainer(config, data, k, total, case.lr) for name in scale.paces()}
    judge = next(iter(workers.values()))
    core = Coordinator(terms_of(outer, judge.fragments, total), judge.get())

    def work(name: str, theta: np.ndarray, lease: Lease) -> np.ndarray:
        if core.rejected > HOPELESS:
            raise FloatingPointError
        workers[name].put(theta)
        for i in range(lease.steps):
            workers[name].step(lease.shard, lease.first + i, batch)
        return workers[name].get()

    marks: Iterator[int] = iter(range(0, k * total + 1, max(1, k * total // 8)))
    mark = next(marks)

    def watch(now: float, core: Coordinator) -> None:
        nonlocal mark
        if sum(core.visited) >= mark or core.done:
            mark = next(marks, 10**12)
            mine = judge.get()
            judge.put(core.theta)
            score(judge.lm, sum(core.visited) * per_step, now, core.done)
            judge.put(mine)

    try:
        result = simulate(core, scale.paces(), work, watch=watch)
    except FloatingPointError:
        return {"bpb": None, "curve": curve, "rejected": core.rejected}
    return {"bpb": curve[-1]["bpb"], "curve": curve, **vars(result), "rejected": core.rejected}


def result(case: Case, config: Config, data: Any, steps: int) -> dict[str, Any]:
    """The run's file, made if it is not there. A diverged run counts as infinitely bad."""
    if case.file.is_file():
        found = json.loads(case.file.read_text())
        if found["steps"] == steps:
            return found
    print(f"{case.file.stem} ...", flush=True)
    found = {"steps": steps, **vars(case), "scale": vars(case.scale), **train(case, config, data, steps)}
    write_json(case.file, found)
    print(f"  {found['bpb']:.4f} bits per byte", flush=True)
    return found


def bpb(found: dict[str, Any]) -> float:
    return found["bpb"] if found["bpb"] is not None and math.isfinite(found["bpb"]) else math.inf


def closed(scores: dict[str, float]) -> float | None:
    """Share of the gap from sync to naive that delayed Nesterov with dynamic updates closes."""
    if not {"naive", "sync", "dn_dylu"} <= scores.keys():
        return None
    gap = scores["naive"] - scores["sync"]
    return (scores["naive"] - scores["dn_dylu"]) / gap if gap > 0 else None


def summary(arms: dict[str, list[dict[str, Any]]]) -> str:
    lines = [
        "| arm | held-out bits per byte | 95 % | inner lr | outer lr | virtual hours |",
        "|---|---|---|---|---|---|",
    ]
    for name, runs in arms.items():
        mean = Mean.of([bpb(r) for r in runs])
        hours = statistics.fmean([r["curve"][-1]["seconds"] for r in runs if r["curve"]] or [math.nan]) / 3600
        lines.append(
            f"| {name} | {mean.value:.3f} | ±{mean.half:.3f} | {runs[0]['lr']:g} "
            f"| {runs[0]['outer_lr'] if name not in ALONE else '-'} | {hours:.2f} |"
        )
    share = closed({n: statistics.fmean(map(bpb, runs)) for n, runs in arms.items()})
    if share is not None:
        lines += [
            "",
            f"Delayed Nesterov with dynamic local updates closes {share:.0%} of the gap naive - sync.",
        ]
    return "\n".join(lines) + "\n"


def plot(arms: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Held-out bits per byte over tokens, seed 0."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2))
    for name, runs in arms.items():
        curve = runs[0]["curve"]
        axes.plot([c["tokens"] / 1e6 for c in curve], [c["bpb"] for c in curve], label=name, marker=".")
    axes.set(xlabel="million tokens, all workers", ylabel="held-out bits per byte")
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.diloco.study", description=SUMMARY)
    parser.add_argument("--steps", type=int, default=250, help="steps of a worker (default %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds per arm (default %(default)s)")
    parser.add_argument("--only", choices=ARMS, nargs="*", default=ARMS, help="arms (default: all)")
    parser.add_argument("--workers", type=int, default=4, metavar="k", help="(default %(default)s)")
    parser.add_argument("--every", type=int, default=20, metavar="H", help="of a round (default %(default)s)")
    parser.add_argument("--lr", type=float, nargs="*", default=list(LRS), help="inner learning rates")
    args = parser.parse_args()
    if not (DATA / "manifest.json").is_file():
        run("-m", "dataset", "prepare", "--source", "pystdlib", "--tokenizer", "bytes", "--out", str(DATA))
    data, config = dataset.open(DATA), load(HERE / "samba_tiny.yaml")
    arms: dict[str, list[dict[str, Any]]] = {}
    scale = Scale(args.workers, args.every)
    for name in args.only:
        grid = [Case(name, lr, rate, 0, scale) for lr in args.lr for rate in scale.arms()[name].rates]
        best = min(grid, key=lambda c: bpb(result(c, config, data, args.steps)))
        arms[name] = [result(replace(best, seed=s), config, data, args.steps) for s in range(args.seeds)]
    print(summary(arms))
    if set(args.only) == set(ARMS) and scale == Scale():
        (HERE / "results.md").write_text(summary(arms))
        write_json(HERE / "results.json", {"settings": vars(args), "arms": arms})
        plot(arms, HERE / "results.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
