"""`make study-onion`: does growing an onion pay? The mission's recipe beside the controls it needs.

Every arm spends the same training FLOPs (frozen forward passes counted) on the same data:

    grown      stage 1, then stage 2 around the frozen first shell: the mission to the letter
    open       the same growth with nothing frozen, untied, unquantized, residual (onion_open)
    continued  stage 1, simply trained on
    plain      a plain stack with as many visits as stage 2, from scratch
    deepened   a plain stack with as many visits as stage 1, grown to that depth

Runs are folders under runs/study-onion; a second call goes on where the first stopped. The summary is
written to experiments/onion/results.json, results.md and results.png.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import dataset
import model
import model.config
import model.hub
from experiments.commands import ROOT, ensure_data, pretrain
from train.metrics import read

HERE = Path(__file__).resolve().parent
RUNS = Path("runs/study-onion")
SETS = ("run.batch=8", "run.eval_every=30", "run.eval_tokens=32768")
PLAIN_SMALL, PLAIN = HERE / "plain_small.yaml", HERE / "plain.yaml"


@dataclass(frozen=True)
class Phase:
    """One run of an arm: architecture, steps, and the phase whose weights it starts from."""

    name: str
    arch: str | Path
    steps: int
    start: str | None = None


@dataclass(frozen=True)
class Budget:
    """Steps of the two stages of the grown arm; everything else follows from their FLOPs."""

    first: int
    second: int


def flops(arch: str | Path, data: Any) -> float:
    """Training FLOPs per token of an architecture at its own context."""
    config = model.config.load(arch)
    table = None
    if config.embed.from_ is not None:
        shape = model.hub.table_shape(config.embed.from_)
        if shape is None:
            raise SystemExit(f"{arch}: embed.from: {config.embed.from_!r} is not on this machine")
        table = torch.ones(data.vocab, shape[1])  # only its shape counts here
    return model.build(config, vocab=data.vocab, table=table).flops_per_token(config.run.context)


def arms(budget: Budget, data: Any) -> dict[str, list[Phase]]:
    """Every arm's phases, their steps chosen so that all arms spend the FLOPs of `grown`."""
    f = {a: flops(a, data) for a in ("onion_stage1", "onion_stage2", "onion_open1", "onion_open")}
    small, deep = flops(PLAIN_SMALL, data), flops(PLAIN, data)
    one, two = f["onion_stage1"] * budget.first, f["onion_stage2"] * budget.second

    def steps(work: float, per_token: float) -> int:
        return max(1, round(work / per_token))

    return {
        "grown": [
            Phase("stage1", "onion_stage1", budget.first),
            Phase("grown", "onion_stage2", budget.second, "stage1"),
        ],
        "open": [
            Phase("open1", "onion_open1", steps(one, f["onion_open1"])),
            Phase("open", "onion_open", steps(two, f["onion_open"]), "open1"),
        ],
        "continued": [
            Phase("stage1", "onion_stage1", budget.first),
            Phase("continued", "onion_stage1", steps(two, f["onion_stage1"]), "stage1"),
        ],
        "plain": [Phase("plain", PLAIN, steps(one + two, deep))],
        "deepened": [
            Phase("plain_small", PLAIN_SMALL, steps(one, small)),
            Phase("deepened", PLAIN, steps(two, deep), "plain_small"),
        ],
    }


def train(phases: list[Phase], seed: int) -> Path:
    """Run what is not complete; returns the last phase's folder."""
    folder = RUNS / f"seed{seed}"
    for phase in phases:
        sets = [f"run.steps={phase.steps}", f"run.seed={seed}", "grow.when=step", "grow.from=null", *SETS]
        rest: list[str | Path] = ["--run", folder / phase.name]
        if phase.start:
            rest += ["--init-from", folder / phase.start]
        pretrain([phase.arch], *rest, sets=sets)
    return ROOT / folder / phases[-1].name


def final(run: Path) -> dict[str, Any]:
    """The last evaluation of a run."""
    last = [r for r in read(run) if r["kind"] == "eval"][-1]
    return {"bpb": last["bpb"]["next"], "tokens": last["tokens"] + last.get("origin", 0)}


def verdict(scores: dict[str, list[float]], base: str = "grown") -> list[dict[str, Any]]:
    """Each arm's mean and its paired difference to `base`; below the spread over seeds it is a tie."""
    rows = []
    for name, values in scores.items():
        gaps = [v - b for v, b in zip(values, scores[base])]
        mean = statistics.fmean(gaps)
        spread = statistics.stdev(gaps) if len(gaps) > 1 else math.nan
        word = "" if name == base else "tie" if not abs(mean) > spread else "worse" if mean > 0 else "better"
        rows.append(
            {"arm": name, "bpb": statistics.fmean(values), "gap": mean, "spread": spread, "verdict": word}
        )
    return rows


def table(rows: list[dict[str, Any]], results: dict[str, list[dict[str, Any]]], seeds: int) -> str:
    lines = [
        f"| arm | held-out bits per byte ({seeds} seeds) | minus `grown` | spread | reads | M tokens |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        runs = results[row["arm"]]
        tokens = statistics.fmean(r["tokens"] for r in runs) / 1e6
        lines.append(
            f"| {row['arm']} | {row['bpb']:.3f} | {row['gap']:+.3f} | {row['spread']:.3f} | {row['verdict']}"
            f" | {tokens:.2f} |"
        )
    return "\n".join(lines) + "\n"


def plot(plan: dict[str, list[Phase]], seed: int, path: Path) -> None:
    """Held-out bits per byte over training FLOPs, one line an arm."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    data = dataset.open(ensure_data())
    figure, axes = plt.subplots(figsize=(7, 4.2))
    for name, phases in plan.items():
        xs, ys, spent = [], [], 0.0
        for phase in phases:
            per_token = flops(phase.arch, data)
            evals = [r for r in read(ROOT / RUNS / f"seed{seed}" / phase.name) if r["kind"] == "eval"]
            xs += [(spent + r["tokens"] * per_token) / 1e12 for r in evals]
            ys += [r["bpb"]["next"] for r in evals]
            spent += evals[-1]["tokens"] * per_token
        axes.plot(xs, ys, label=name, linewidth=1.4)
    axes.set(
        xlabel="training TFLOP (frozen forwards counted)", ylabel="held-out bits per byte", ylim=(1.9, 3.2)
    )
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.onion.study", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--first", type=int, default=120, help="steps of stage 1 (default %(default)s)")
    parser.add_argument("--second", type=int, default=120, help="steps of stage 2 (default %(default)s)")
    parser.add_argument("--seeds", type=int, default=2, help="seeds per arm (default %(default)s)")
    args = parser.parse_args()
    plan = arms(Budget(args.first, args.second), dataset.open(ensure_data()))
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in plan}
    for seed in range(args.seeds):
        for name, phases in plan.items():
            results[name].append(final(train(phases, seed)))
    rows = verdict({name: [r["bpb"] for r in runs] for name, runs in results.items()})
    text = table(rows, results, args.seeds)
    (HERE / "results.md").write_text(text)
    summary = {"budget": vars(args), "arms": results, "verdict": rows}
    (HERE / "results.json").write_text(json.dumps(summary, indent=1) + "\n")
    plot(plan, 0, HERE / "results.png")
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
