"""Plots of a sweep: loss over tokens, FLOPs and wall clock, and what is best for its cost."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from experiments.report import Found

TOKENS, SECONDS, NATS, BITS = range(4)  # of a point of a curve


def colour(index: int) -> str:
    return f"C{index % 10}"


def marker(index: int) -> str:
    return "os^DvP*Xhd"[(index // 10) % 10]


def curves(g: Found) -> Figure:
    """Held-out bits per byte (nats where bytes are not known), three times: over tokens, FLOPs, seconds."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    points = [p for runs in g.runs.values() for r in runs.values() for p in r["curve"]]
    value = BITS if any(p[BITS] is not None for p in points) else NATS
    for i, (case, runs) in enumerate(g.runs.items()):
        work = g.cases[case]["flops_per_token"]
        kept = [[p for p in r["curve"] if p[value] is not None] for r in runs.values()]
        steps = min((len(c) for c in kept), default=0)
        if steps < 2:
            continue
        at = range(1, steps)  # the first is before any training and would flatten the rest
        mean = [statistics.fmean(c[j][value] for c in kept) for j in at]
        low, high = ([f(c[j][value] for c in kept) for j in at] for f in (min, max))
        tokens = [kept[0][j][TOKENS] for j in at]
        tokens_0, work_0, seconds_0 = g.before(case)
        seconds = [statistics.fmean(c[j][SECONDS] for c in kept) + seconds_0 for j in at]
        xs = ([(t + tokens_0) / 1e6 for t in tokens], [(t * work + work_0) / 1e12 for t in tokens], seconds)
        for a, x in zip(axes, xs):
            a.plot(x, mean, color=colour(i), linewidth=1.3, marker=marker(i), markersize=3, label=case)
            a.fill_between(x, low, high, color=colour(i), alpha=0.15, linewidth=0)
    for a, name in zip(axes, ("million tokens", "training TFLOP", "seconds of training")):
        a.set_xlabel(name)
        a.grid(alpha=0.3)
    axes[0].set_ylabel("held-out bits per byte" if value == BITS else "held-out nats per token")
    handles, labels = axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=8, frameon=False)
    return figure


def pareto(g: Found, metric: str, lower_is_better: bool) -> Figure:
    """The measure over parameters, training FLOPs and state bytes; a line through what nothing beats."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    tokens = {c: next(iter(runs.values()))["tokens"] for c, runs in g.runs.items()}
    costs = (
        ("thousand parameters", lambda c: g.cases[c]["parameters"] / 1e3),
        ("training TFLOP", lambda c: (g.cases[c]["flops_per_token"] * tokens[c] + g.before(c)[1]) / 1e12),
        ("state at the context, KiB", lambda c: g.cases[c]["state_bytes"] / 1024),
    )
    for a, (name, cost) in zip(axes, costs):
        found = []
        spread = [cost(case) for case in g.runs]
        middle = (min(spread) + max(spread)) / 2
        for i, case in enumerate(g.runs):
            mean = g.mean(case, metric)
            if not mean.count:
                continue
            x, error = float(cost(case)), None if mean.half != mean.half else mean.half
            a.errorbar(x, mean.value, error, fmt=marker(i), color=colour(i), markersize=5)
            side, shift = ("left", 4) if x <= middle else ("right", -4)  # names stay inside the axes
            a.annotate(case, (x, mean.value), (shift, 3), textcoords="offset points", fontsize=7, ha=side)
            found.append((x, mean.value))
        _front(a, front(found, lower_is_better))
        a.set_xlabel(name)
        a.margins(x=0.2)  # room for the names
        a.grid(alpha=0.3)
    axes[0].set_ylabel(metric.replace("_", " "))
    return figure


def front(points: Sequence[tuple[float, float]], lower_is_better: bool) -> list[tuple[float, float]]:
    """The points (cost, value) that no other one beats in both, cheapest first."""
    best: list[tuple[float, float]] = []
    sign = 1 if lower_is_better else -1
    for cost, value in sorted(points, key=lambda p: (p[0], sign * p[1])):
        if not best or sign * value < sign * best[-1][1]:
            best.append((cost, value))
    return best


def _front(axes: Axes, points: Sequence[tuple[float, float]]) -> None:
    if len(points) > 1:
        axes.plot(*zip(*points), color="black", linewidth=0.7, alpha=0.5, zorder=0)
