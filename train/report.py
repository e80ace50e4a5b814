"""A page about one or several runs, made from their records (`metrics.jsonl`) alone.

Runs are drawn on one axis of tokens: a run that grew from another, or took its weights, starts where that
one ended. Runs that form no such chain are laid over each other, a colour a run. The page is Markdown with
PNG plots beside it, and once more as one HTML file that holds everything.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dataset.files import write_bytes
from train.errors import UserError
from train.guard import NOT_FINITE
from train.metrics import FILE, read
from train.page import page

Record = dict[str, Any]
COLOURS = tuple(f"C{i}" for i in range(10))
LINES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class History:
    """The records of one run, by kind."""

    name: str
    start: Record
    train: list[Record]
    evals: list[Record]
    events: list[Record]
    samples: list[Record]

    @staticmethod
    def of(run: Path) -> History:
        """Raises UserError when the folder has no records."""
        records = list(read(run))
        if not records:
            raise UserError(f"{run}: no {FILE} with records; want a run folder")
        kinds = {k: [r for r in records if r["kind"] == k] for k in ("train", "eval", "event", "sample")}
        start = next((e for e in kinds["event"] if e["event"] == "start"), {})
        name = start.get("name", run.name)
        return History(name, start, kinds["train"], kinds["eval"], kinds["event"], kinds["sample"])

    @property
    def grown(self) -> bool:
        return self.start.get("source") is not None


def seen(record: Record) -> float:
    """Millions of tokens behind the weights, those of earlier runs included."""
    return (record["tokens"] + record.get("origin", 0)) / 1e6


def write(runs: Sequence[Path], out: Path) -> Path:
    """Make the page and its plots in `out`; returns the HTML page. Raises UserError."""
    histories = named([History.of(run) for run in runs], runs)
    out.mkdir(parents=True, exist_ok=True)
    losses, speed = draw_losses(histories), draw_speed(histories)
    usage, bits = draw_stats(histories, "usage"), draw_stats(histories, "entropy_bits")
    pictures = [
        ("losses.png", "Losses", "Every head: training (thin line) and held-out (dots)", losses),
        ("codes.png", "Code usage", "Share of each quantizer's codes that occur in 4,096 tokens", usage),
        ("bits.png", "Bits per token", "Entropy of each quantizer's codes, channel by channel", bits),
        ("speed.png", "Speed", "Training tokens per second", speed),
    ]
    lines = [f"# {' -> '.join(h.name for h in histories)}", "", *table(histories), ""]
    for file, title, caption, figure in pictures:
        if figure is not None:
            figure.savefig(out / file, dpi=110, metadata={"Software": None})
            lines += [f"## {title}", "", f"![{caption}]({file})", "", f"{caption}.", ""]
    lines += [*happenings(histories), *sample_text(histories)]
    text = "\n".join(lines)
    write_bytes(out / "README.md", text.encode())
    write_bytes(out / "index.html", page(text, out).encode())
    return out / "index.html"


def named(histories: Sequence[History], runs: Sequence[Path]) -> list[History]:
    """With the folder for a name where several runs of one architecture would have the same."""
    names = [h.name for h in histories]
    return [replace(h, name=str(r)) if names.count(h.name) > 1 else h for h, r in zip(histories, runs)]


def chained(histories: Sequence[History]) -> bool:
    """Whether every run but the first goes on from an earlier one: then a colour stands for a head."""
    return all(h.grown for h in histories[1:])


# ----------------------------------------------------------------------------- tables and text


def table(histories: Sequence[History]) -> list[str]:
    """One row a run: what it ended with."""
    heads = list(dict.fromkeys(head for h in histories for e in h.evals for head in e["losses"]))
    titles = ["run", "steps", "tokens (M)", *(f"{head}: nats, bits/byte" for head in heads), "tokens/s"]
    lines = [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
    for h in histories:
        last = h.evals[-1] if h.evals else {"losses": {}, "bpb": {}}
        cells = [h.name, str(max((r["step"] for r in h.train), default=0))]
        cells.append(f"{max((r['tokens'] for r in h.train), default=0) / 1e6:.2f}")
        for head in heads:
            nats, bits = last["losses"].get(head), last["bpb"].get(head)
            cells.append("" if nats is None else f"{nats:.4f}, {bits:.3f}" if bits else f"{nats:.4f}")
        speeds = sorted(r["tokens_per_s"] for r in h.train if r["tokens_per_s"])
        cells.append(f"{speeds[len(speeds) // 2]:,.0f}" if speeds else "")
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", "Held-out losses at the end of each run; median speed."]


def happenings(histories: Sequence[History]) -> list[str]:
    """Growth, plateaus, skipped steps: what a curve does not explain by itself."""
    lines = []
    for h in histories:
        if h.grown:
            lines.append(f"- {h.name} starts from {h.start['source']}, after {h.start['origin']:,} tokens")
        for e in h.events:
            if e["event"] == "grown":
                counts = (f"{len(e[k])} {k}" for k in ("loaded", "fresh", "frozen"))
                lines.append(f"- {h.name}: tensors {', '.join(counts)}")
            elif e["event"] == "plateau":
                lines.append(
                    f"- {h.name}: plateau at step {e['step']}, held-out loss fell by {e['drop']:.5f} nats"
                )
            elif e["event"] == "skip":
                why = e.get("reason", NOT_FINITE)
                what = "not finite" if why == NOT_FINITE else f"{why} far above those before"
                lines.append(f"- {h.name}: step {e['step']} skipped, {what}")
    return ["## What happened", "", *lines, ""] if lines else []


def sample_text(histories: Sequence[History]) -> list[str]:
    lines = []
    for h in histories:
        for s in h.samples[-1:]:
            text = f"{s['prompt']}⟶{s['text']}"
            longest = max((len(m) for m in re.findall("`+", text)), default=0)
            fence = "`" * max(3, longest + 1)
            lines += [f"### {h.name}, step {s['step']}", "", f"{fence}text", text, fence, ""]
    intro = ["## Sample text", "", "A held-out beginning, then ⟶, then the model's own words.", ""]
    return [*intro, *lines] if lines else []


# ----------------------------------------------------------------------------- plots


def draw_losses(histories: Sequence[History]) -> Figure | None:
    if not any(h.train or h.evals for h in histories):
        return None
    figure, axes = canvas("nats per token", histories)
    heads = list(dict.fromkeys(k for h in histories for r in h.train + h.evals for k in r["losses"]))
    chain = chained(histories)
    for j, head in enumerate(heads):
        for i, h in enumerate(histories):
            colour, line = (COLOURS[j % 10], "-") if chain else (COLOURS[i % 10], LINES[j % len(LINES)])
            axes.plot(*series(h.train, "losses", head), line, color=colour, linewidth=0.8, alpha=0.6)
            label = f"{h.name}: {head}" if not chain else head if i == 0 else None
            axes.plot(*series(h.evals, "losses", head), f"o{line}", color=colour, markersize=3, label=label)
    if heads:
        axes.legend(fontsize=8)
    return figure


def draw_stats(histories: Sequence[History], what: str) -> Figure | None:
    """Statistics called `.../what`, one colour a quantizer."""
    names = {k for h in histories for r in h.evals for k in r.get("stats", {}) if k.endswith(f"/{what}")}
    if not names:
        return None
    figure, axes = canvas({"usage": "share of codes in use"}.get(what, "bits per token"), histories)
    for name, colour in zip(sorted(names), COLOURS * len(names)):
        labelled = False
        for h in histories:
            x, y = series(h.evals, "stats", name)
            if x:
                label = None if labelled else name.removesuffix(f"/{what}")
                axes.plot(x, y, "o-", color=colour, markersize=3, label=label)
                labelled = True
    axes.set_ylim(bottom=0)
    axes.legend()
    return figure


def draw_speed(histories: Sequence[History]) -> Figure | None:
    if not any(h.train for h in histories):
        return None
    figure, axes = canvas("tokens per second", histories)
    for h, colour in zip(histories, COLOURS * len(histories)):
        points = [(seen(r), r["tokens_per_s"]) for r in h.train if r["tokens_per_s"]]
        axes.plot([x for x, _ in points], [y for _, y in points], color=colour, label=h.name)
    axes.set_ylim(bottom=0)
    axes.legend()
    return figure


def canvas(ylabel: str, histories: Sequence[History]) -> tuple[Figure, Axes]:
    """An empty plot over tokens, with a dashed line where a run took over another's weights."""
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel("million tokens")
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.3)
    marks: dict[float, list[str]] = {}
    for h in histories:
        if h.grown:
            marks.setdefault(h.start.get("origin", 0) / 1e6, []).append(h.name)
    for x, names in marks.items():
        axes.axvline(x, color="black", linestyle="--", linewidth=0.8)
        place = axes.get_xaxis_transform()
        axes.text(x, 0.99, " " + ", ".join(names), transform=place, va="top", fontsize=8, rotation=90)
    return figure, axes


def series(records: Sequence[Record], field: str, name: str) -> tuple[list[float], list[float]]:
    points = [(seen(r), r[field][name]) for r in records if r.get(field, {}).get(name) is not None]
    return [x for x, _ in points], [y for _, y in points]
