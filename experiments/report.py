"""`python -m experiments report SWEEP.yaml`: what a sweep found, from its committed summaries alone.

Writes results.md, its plots, and results.html, which holds everything. The same summaries give the same
files, byte for byte (with the same versions of the libraries that draw).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dataset.files import write_bytes
from experiments import plots
from experiments.commands import ROOT
from experiments.intervals import Mean, paired, verdict
from experiments.summary import Line, file_of, read, refuse_changed
from experiments.sweep import Sweep
from train.errors import UserError
from train.page import page

LOWER = (
    "bits_per_byte",
    "nats",
    "prefill_ms",
)  # metrics where less is better; tasks are shares of right answers
TITLES = {"bits_per_byte": "bits/byte", "prefill_ms": "prefill ms"}


@dataclass(frozen=True)
class Found:
    """The runs that are compared with each other.

    data:  what they were trained on.
    bases: {case: the one that it is compared with}.
    cases: {case: its line}, in the sweep's order.   runs: {case: {seed: line}}.
    diverged: {case: runs that did}.   after: {case: the one whose weights it starts from}.
    """

    data: list[str]
    bases: dict[str, str]
    cases: dict[str, Line]
    runs: dict[str, dict[int, Line]]
    diverged: dict[str, int]
    after: dict[str, str]

    @property
    def name(self) -> str:
        return "-".join(self.data)

    def values(self, case: str, metric: str) -> dict[int, float]:
        """{seed: value} of the runs that have it."""
        found = ((s, r["metrics"].get(metric)) for s, r in self.runs[case].items())
        return {s: v for s, v in found if v is not None}

    def mean(self, case: str, metric: str) -> Mean:
        return Mean.of(list(self.values(case, metric).values()))

    def before(self, case: str) -> tuple[int, float, float]:
        """Tokens, training FLOPs and mean seconds of the run whose weights a case starts from; 0 if none."""
        first = self.after.get(case)
        if first not in self.runs:
            return 0, 0.0, 0.0
        runs = list(self.runs[first].values())
        tokens = runs[0]["tokens"]
        return tokens, tokens * self.cases[first]["flops_per_token"], self.seconds(first)

    def seconds(self, case: str) -> float:
        """Mean over seeds, of this run alone."""
        return Mean.of([r["seconds"] for r in self.runs[case].values() if r["seconds"] is not None]).value

    def metrics(self) -> list[str]:
        """Every metric, in the order in which runs name them."""
        return list(
            dict.fromkeys(m for runs in self.runs.values() for r in runs.values() for m in r["metrics"])
        )


def write(sweep: Sweep, out: Path) -> Path:
    """Make the pages in `out`; returns the HTML page. Raises UserError when there is nothing to report,
    or when the sweep is no longer that of its runs."""
    refuse_changed(sweep)
    lines = read(file_of(sweep))
    names = [[data] for data in sweep.spec.data] if sweep.apart else [list(sweep.spec.data)]
    groups = [g for data in names if (g := group(sweep, lines, data)).runs]
    if not groups:
        raise UserError(f"{file_of(sweep)}: no runs yet; first  python -m experiments run {sweep.path}")
    out.mkdir(parents=True, exist_ok=True)
    stem = "results" if sweep.path.stem == "sweep" else f"{sweep.path.stem}.results"
    parts = [f"# {sweep.name}: {sweep.spec.question}", "", *preface(sweep, groups), ""]
    for g in groups:
        parts += section(sweep, g, out, stem)
    text = "\n".join(parts).rstrip() + "\n"
    write_bytes(out / f"{stem}.md", text.encode())
    write_bytes(out / f"{stem}.html", page(text, out).encode())
    return out / f"{stem}.html"


def group(sweep: Sweep, lines: Iterable[Line], data: Sequence[str]) -> Found:
    """What was found on some datasets; cases without runs are left out."""
    mine = [line for line in lines if line["data"] in data]
    known = {line["case"]: line for line in mine if line["kind"] == "case"}
    runs: dict[str, dict[int, Line]] = {}
    diverged: dict[str, int] = {}
    for line in mine:
        if line["kind"] == "run" and line["metrics"]:
            runs.setdefault(line["case"], {})[line["seed"]] = line
        elif line["kind"] == "run":
            diverged[line["case"]] = diverged.get(line["case"], 0) + 1
    order = [c for c in sweep.cases if c in runs and c in known]
    bases = {c: sweep.base_of(c) for c in order}
    by_seed = {c: dict(sorted(runs[c].items())) for c in order}
    after = {c: first for c in order if (first := sweep.cases[c].after) is not None}
    return Found(list(data), bases, {c: known[c] for c in order}, by_seed, diverged, after)


def preface(sweep: Sweep, groups: Sequence[Found]) -> list[str]:
    runs = [r for g in groups for by_seed in g.runs.values() for r in by_seed.values()]
    wanted, done = len(sweep.runs), len(runs) + sum(sum(g.diverged.values()) for g in groups)
    codes = sorted({r["code"][:12] + ("+changes" if r["code"].endswith("+changes") else "") for r in runs})
    budget = next(f"{v:,.0f} {k}" for k, v in vars(sweep.spec.budget).items() if v is not None)
    left = "" if done >= wanted else f" {wanted - done} of {wanted} runs are not done yet."
    whole = all(case.share == 1 for case in sweep.cases.values())
    each = "each" if whole else "for a run and the one that it starts from"
    return [
        f"{len(runs)} runs, {budget} {each}; code {', '.join(codes)}.{left} Means over seeds ± half the 95 % "
        "interval; differences are paired by seed, and a tie where their interval holds 0. Tasks are shares "
        "of right answers.",
        "",
        f"Rebuilt from `{file_of(sweep).name}` by `python -m experiments report {shown(sweep)}`.",
    ]


def shown(sweep: Sweep) -> str:
    """The sweep as one types it in the project's folder; a `sweep.yaml` by its folder."""
    path = sweep.path.resolve()
    path = path.parent if path.stem == "sweep" else path
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def section(sweep: Sweep, g: Found, out: Path, stem: str) -> list[str]:
    """Tables and plots of one dataset."""
    every = g.metrics()
    tasks = list(dict.fromkeys(t.partition(":")[0] for d in g.data for t in sweep.spec.data[d].tasks))
    main = [m for m in ["bits_per_byte", *tasks, "prefill_ms"] if m in every]
    lines = [f"## {g.name}", "", *score_table(sweep, g, main), "", *cost_table(g), ""]
    for task in tasks:
        lines += detail_table(g, [m for m in every if m.startswith(f"{task} ")], task)
    lines += detail_table(
        g, [m for m in every if m.startswith("nats ")], "nats per token, past the training length"
    )
    lines += detail_table(
        g, [m for m in every if m.startswith("bits_per_byte/")], "bits per byte of every head"
    )
    measure = sweep.spec.measure if sweep.spec.measure in every else main[0]
    for name, caption, figure in (
        (
            "curves",
            "Held-out loss over tokens, FLOPs and seconds of training; mean and range over seeds",
            plots.curves(g),
        ),
        (
            "pareto",
            f"{title(measure)} against what it costs; the line joins the best",
            plots.pareto(g, measure, lower(measure)),
        ),
    ):
        file = f"{stem}-{g.name}-{name}.png"
        figure.savefig(out / file, dpi=110, metadata={"Software": None})
        lines += [f"![{caption}]({file})", "", f"{caption}.", ""]
    return lines


# ----------------------------------------------------------------------------- tables


def score_table(sweep: Sweep, g: Found, metrics: Sequence[str]) -> list[str]:
    """Every case's scores, and how they differ from the base's."""
    names = set(g.bases.values())
    against = next(iter(names)) if len(names) == 1 else "base"
    head = ["case", "seeds"]
    for m in metrics:
        head += [title(m), f"minus {against}", ""]
    rows = []
    for case, runs in g.runs.items():
        cells = [case, str(len(runs))]
        for m in metrics:
            cells.append(number(g.mean(case, m)))
            base = g.bases[case]
            if case == base or base not in g.runs:
                cells += ["", "base" if case == base else ""]
                continue
            gap = paired(g.values(case, m), g.values(base, m))
            cells += [number(gap, signed=True), verdict(gap, lower(m))]
        rows.append(cells)
    lost = [f"{case} ({count} runs)" for case, count in g.diverged.items()]
    note = ["", f"Diverged: {', '.join(lost)}."] if lost else []
    about = [f"- {c}: {sweep.cases[c].about}" for c in g.cases if c in sweep.cases and sweep.cases[c].about]
    return [*markdown(head, rows), *note, *([""] if about else []), *about]


def cost_table(g: Found) -> list[str]:
    head = [
        "case",
        "parameters",
        "trained",
        "MFLOP/token",
        "TFLOP",
        "tokens (M)",
        "state KiB",
        "tokens/s",
        "seconds",
    ]
    timed = all("cpu_seconds" in r for runs in g.runs.values() for r in runs.values())
    head += ["CPU seconds"] if timed else []  # older summaries have none
    rows = []
    for case, line in g.cases.items():
        runs = list(g.runs[case].values())
        tokens = runs[0]["tokens"]
        tokens_before, work_before, seconds_before = g.before(case)
        work = line["flops_per_token"] * tokens + work_before
        speed = Mean.of([r["tokens_per_s"] for r in runs if r["tokens_per_s"] is not None])
        rows.append(
            [
                case,
                f"{line['parameters']:,}",
                f"{line['trained']:,}",
                f"{line['flops_per_token'] / 1e6:.2f}",
                f"{work / 1e12:.2f}",
                f"{(tokens + tokens_before) / 1e6:.2f}",
                f"{line['state_bytes'] / 1024:,.1f}",
                f"{speed.value:,.0f}",
                f"{g.seconds(case) + seconds_before:.0f}",
                *([f"{Mean.of([r['cpu_seconds'] for r in runs]).value:.0f}"] if timed else []),
            ]
        )
    return markdown(head, rows)


def detail_table(g: Found, metrics: Sequence[str], caption: str) -> list[str]:
    """Means alone, a column a difficulty."""
    if not metrics:
        return []
    head = ["case", *(m.partition(" ")[2] or m.partition("/")[2] for m in metrics)]
    rows = [[case, *(number(g.mean(case, m)) for m in metrics)] for case in g.runs]
    return [f"{caption}:", "", *markdown(head, rows), ""]


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |"

    return [line(head), "|" + "---|" * len(head), *(line(row) for row in rows)]


def number(mean: Mean, signed: bool = False) -> str:
    """1.234 ± 0.005; empty when there is nothing."""
    if not mean.count:
        return ""
    digits = 1 if abs(mean.value) >= 100 else 3
    text = f"{mean.value:+.{digits}f}" if signed else f"{mean.value:.{digits}f}"
    return text if math.isnan(mean.half) else f"{text} ± {mean.half:.{digits}f}"


def title(metric: str) -> str:
    return TITLES.get(metric, metric)


def lower(metric: str) -> bool:
    return metric.startswith(LOWER)
