"""The scoreboard as a table and a plot, from the results of every arm and seed."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dataset.files import write_bytes, write_json

Result = dict[str, Any]
AGAINST = ("none", "adapted_none", "shuffled", "random")
COLUMNS = (
    "arm", "seeds", "R", "95%", "nats", "over none", "over adapted none", "over shuffled", "over random",
    "clear", "slots", "KV bytes", "ratio", "restored", "compress s", "first token s", "tokens/s",
    "pays after",
)  # fmt: skip


def load(folder: Path) -> dict[str, list[Result]]:
    """Results by arm, seeds in order, best mean R first."""
    found: dict[str, list[Result]] = {}
    for file in sorted(folder.glob("*.json")):
        r = json.loads(file.read_text())
        found.setdefault(r["name"], []).append(r)
    return dict(sorted(found.items(), key=lambda item: -mean_r(item[1])))


def mean_r(rs: Sequence[Result]) -> float:
    """Mean recovered fraction, minus infinity where the full context is worth too little to say."""
    known = [r["R"][0] for r in rs if r["R"]]
    return statistics.mean(known) if known else float("-inf")


def mean(rs: Sequence[Result], *keys: str) -> float:
    def at(r: Any) -> float:
        for key in keys:
            r = r[key]
        return float(r)

    return statistics.mean(at(r) for r in rs)


def row(name: str, rs: Sequence[Result]) -> list[str]:
    """One line: means over seeds; intervals from the lowest to the highest end of any seed."""
    intervals = [r["R"] for r in rs if r["R"]]
    cells = [name, str(len(rs))]
    cells += [f"{mean_r(rs):.3f}"] if intervals else ["–"]
    cells += (
        [f"{min(i[1] for i in intervals):.2f} to {max(i[2] for i in intervals):.2f}"]
        if intervals
        else ["gap too small"]
    )
    cells.append(f"{mean(rs, 'losses', 'compressed'):.4f}")
    lows = {v: min(r["beats"][v][1] for r in rs) for v in AGAINST}
    cells += [f"{statistics.mean(r['beats'][v][0] for r in rs):+.3f} ({lows[v]:+.3f})" for v in AGAINST]
    cells.append("yes" if all(x > 0 for x in lows.values()) else "no")
    kv, full = mean(rs, "kv_bytes"), mean(rs, "full_kv_bytes")
    cells += [f"{mean(rs, 'slots'):.1f}", f"{kv:,.0f}", f"{full / kv:.2f}" if kv else "–"]
    cells.append(f"{mean(rs, 'restore'):.3f}")
    decimals = {"compress_s": 3, "first_token_s": 3, "decode_tokens_s": 0, "break_even": 1}
    return cells + [figure([r["cost"][k] for r in rs], n) for k, n in decimals.items()]


def figure(values: Sequence[float | None], decimals: int) -> str:
    """The median over seeds, where None, a difference that did not show, is beyond every number."""
    middle = sorted(values, key=lambda v: float("inf") if v is None else v)[len(values) // 2]
    return "n/a" if middle is None else f"{middle:.{decimals}f}"


def table(found: dict[str, list[Result]]) -> str:
    """Markdown: the decoder's two ends, the scoreboard, and the answers where questions were asked."""
    if not found:
        return "no results yet"
    first = next(iter(found.values()))[0]
    none, full = first["losses"]["none"], first["losses"]["full"]
    lines = [
        f"No context {none:.4f}, full context {full:.4f} nats per token: a gap of {none - full:.4f}, over "
        f"{first['tokens']:,} tokens.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + " --- |" * len(COLUMNS),
        *("| " + " | ".join(row(name, rs)) + " |" for name, rs in found.items()),
    ]
    asked = {n: [r for r in rs if r["answers"]] for n, rs in found.items()}
    if any(asked.values()):
        lines += [
            "",
            "| arm | exact match | F1 | passkeys | by (lines, depth) |",
            "| --- | --- | --- | --- | --- |",
        ]
        for name, rs in asked.items():
            for r in rs[:1]:
                a = r["answers"]
                keys = ", ".join(f"({n}, {d:g}) {share:.2f}" for n, d, share in a["by_length_and_depth"])
                lines.append(f"| {name} | {a['exact']:.2f} | {a['f1']:.2f} | {a['passkey']:.2f} | {keys} |")
    cpu = sum(r["train_cpu_s"] + r["score_cpu_s"] for rs in found.values() for r in rs)
    return "\n".join([*lines, "", f"{cpu / 60:.0f} CPU minutes for these arms."])


def plot(found: dict[str, list[Result]], path: Path, ratio: float) -> None:
    """R against measured bytes: baselines as curves over their ratios, trained arms as points per seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 4.8))
    curves: dict[str, list[Result]] = {}
    for name, rs in found.items():
        if "@" in name:
            curves.setdefault(name.split("@")[0], []).extend(r for r in rs[:1] if r["R"])
    for i, (name, rs) in enumerate(sorted(curves.items())):
        rs.sort(key=lambda r: r["kv_bytes"])
        xs, ys = [r["kv_bytes"] / 1024 for r in rs], [r["R"][0] for r in rs]
        axes.plot(xs, ys, "--o", color=f"C{i}", ms=3, lw=1, label=name)
    for i, (name, rs) in enumerate((n, rs) for n, rs in sorted(found.items()) if "@" not in n):
        for j, r in enumerate(r for r in rs if r["R"]):
            R, low, high = r["R"]
            axes.errorbar(
                r["kv_bytes"] / 1024, R, [[max(R - low, 0)], [max(high - R, 0)]], fmt="sD^vPX*"[i % 7],
                color=f"C{(i + 6) % 10}", label=name if j == 0 else None, capsize=2,
            )  # fmt: skip
    full = max(r["full_kv_bytes"] for rs in found.values() for r in rs) / 1024
    axes.axvline(full / ratio, color="grey", lw=0.6)
    axes.axhline(1.0, color="grey", lw=0.6)
    axes.set_ylim(-0.6, 1.25)  # an oracle has been seen at 7: it fits what it is scored on
    axes.set_xlabel(f"KiB of keys and values per context (all of it: {full:.0f})")
    axes.set_ylabel("recovered fraction R of the full context's gain")
    axes.legend(fontsize=7, ncol=2)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def write(found: dict[str, list[Result]], stem: Path, ratio: float) -> str:
    """STEM.md, STEM.json and STEM.png; returns the table."""
    text = table(found)
    if found:
        write_bytes(beside(stem, "md"), (text + "\n").encode())
        write_json(beside(stem, "json"), found)
        plot(found, beside(stem, "png"), ratio)
    return text


def beside(stem: Path, suffix: str) -> Path:
    """STEM.suffix; a decoder's name may hold dots of its own."""
    return stem.parent / f"{stem.name}.{suffix}"
