"""Evaluate a run: `python train/evaluate.py RUN [--data DIR] [--tasks mqar copy passkey mmlu lm-eval:NAME]`.

Held-out bits per byte, loss and first-choice accuracy of every head, the loss by place in the document, also
past the length that the model was trained on, and the tasks asked for (`train.taskeval`). Prints tables and
writes RUN/evaluation.json.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    # Run as a script: `train/` is first on the path. Packages are found from the repository's root.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import dataset
import model
from dataset.files import DatasetError
from dataset.tasks import parse
from dataset.views import View
from model.heads import shift_weights
from model.lm import LanguageModel
from model.schema import Config, ConfigError
from model.text import Text, tokenizer_of
from train import checkpoint, ema, rundir
from train.errors import EXIT_USER, UserError
from train.feed import Micro, cut
from train.harness import RunScorer
from train.heldout import GROUP_TOKENS, target_bytes
from train.metrics import plain
from train.taskeval import run_tasks
from train.world import autocast

STRETCH = 4  # the loss by position is measured up to this multiple of the training context


def score(lm: LanguageModel, view: View, config: Config, tokens: int) -> dict[str, Any]:
    """{head: {"nats", "bits_per_byte", "top1", "targets"}} over the first `tokens` held-out tokens, in
    whole groups of rows.

    Where a dataset asks for loss on a part of its tokens, losses are of that part; there is no top1 then.
    """
    masked = False
    rows = max(1, min(view.rows, tokens // view.context))
    size = max(1, min(rows, GROUP_TOKENS // view.context))
    sums = {head: [0.0, 0, 0, 0, 0] for head in lm.readouts}  # nats, targets, hits, tries, bytes
    for g in range(rows // size):
        micro = cut(view.batch(g, size), size)[0]
        masked = masked or micro.weights is not None
        with torch.no_grad(), autocast(torch.device("cpu"), config.run.precision):
            nats, hits = lm.nll(micro.tokens, micro.docs), lm.top1(micro.tokens, micro.docs)
        for head, readout in lm.readouts.items():
            found = counted(nats[head], micro, readout.shift)
            found = found[~found.isnan()]
            new = (found.sum().item(), len(found), *hits[head], target_bytes(micro, readout.shift, view))
            sums[head] = [a + b for a, b in zip(sums[head], new)]
    return {
        head: {
            "nats": nats / targets if targets else math.nan,
            "bits_per_byte": nats / math.log(2) / size_ if size_ else math.nan,
            "top1": found / tries if tries and not masked else math.nan,
            "targets": int(targets),
        }
        for head, (nats, targets, found, tries, size_) in sums.items()
    }


def by_position(lm: LanguageModel, view: View, config: Config, tokens: int) -> list[dict[str, Any]]:
    """Mean nats of every head in doubling ranges of the place in the document, first and last included.

    [{"first", "last", "beyond": past the training context, "targets", "nats": {head}}]
    """
    edges = ranges(view.context)
    sums = {head: torch.zeros(len(edges), 2, dtype=torch.float64) for head in lm.readouts}
    bounds = torch.tensor([first for first, _ in edges])
    for row in range(max(1, min(view.rows, tokens // view.context))):
        micro = cut(view.batch(row, 1), 1)[0]
        with torch.no_grad(), autocast(torch.device("cpu"), config.run.precision):
            nats = lm.nll(micro.tokens, micro.docs)
        place = torch.bucketize(micro.docs.positions, bounds, right=True) - 1
        for head in sums:
            _add(sums[head], counted(nats[head], micro, lm.readouts[head].shift), place)
    out = []
    for i, (first, last) in enumerate(edges):
        counts = {head: int(s[i, 1]) for head, s in sums.items()}
        if not any(counts.values()):
            continue
        nats_of = {head: float(s[i, 0] / s[i, 1]) if s[i, 1] else math.nan for head, s in sums.items()}
        beyond = first >= config.run.context
        out.append(
            {"first": first, "last": last, "beyond": beyond, "targets": max(counts.values()), "nats": nats_of}
        )
    return out


def counted(nats: Tensor, micro: Micro, shift: int) -> Tensor:
    """nats [B, T] with nan where the target has no weight in the loss (padding, what is only read)."""
    if micro.weights is None:
        return nats
    return nats.masked_fill(shift_weights(micro.weights, shift) == 0, math.nan)


def ranges(context: int) -> list[tuple[int, int]]:
    """0-7, 8-15, 16-31, 32-63 ... up to context - 1."""
    out, first, length = [], 0, 8
    while first < context:
        out.append((first, min(first + length, context) - 1))
        first += length
        length = first
    return out


def _add(sums: Tensor, nats: Tensor, place: Tensor) -> None:
    known = ~nats.isnan()
    where = place[known].flatten()
    sums[:, 0] += torch.zeros(len(sums), dtype=torch.float64).index_add_(0, where, nats[known].double())
    sums[:, 1] += torch.bincount(where, minlength=len(sums))


def evaluate(
    run: Path,
    data_path: Path | None,
    tokens: int,
    tasks: Sequence[str] = (),
    samples: int = 50,
    averaged: bool = False,
) -> dict[str, Any]:
    """All figures of a run as plain data; samples: per task and difficulty. averaged: of `run.ema`.

    Raises ConfigError, DatasetError or UserError.
    """
    if min(tokens, samples) < 1:
        raise UserError(f"--tokens {tokens}, --samples {samples}: want at least 1 of each")
    for spec in tasks:
        if spec != "mmlu" and not spec.startswith("lm-eval:"):
            parse(spec)  # a misspelt task shows before minutes of scoring
    source = rundir.source_of(run)
    if data_path is None:
        if "data" not in source.about:
            raise UserError(f"{run}: does not say which dataset it was trained on; give one with --data")
        data_path = Path(source.about["data"]["path"])
    data = dataset.open(data_path)
    data.require(vocab=source.config.vocab, identity=source.tokenizer)
    config, lm = source.config, model.load(source.path)
    if averaged:
        ema.load_into(lm, source.path)
    step = 0 if checkpoint.is_weights_alone(source.path) else checkpoint.verify(source.path)
    context = config.run.context
    packing = config.run.packing
    rows, long = (
        data.view(length, seed=0, split="heldout", packing=packing) for length in (context, context * STRETCH)
    )
    scored = {}
    if tasks:
        text = Text(tokenizer_of(run))
        scorer = RunScorer(lm, text, config.run.precision, end=data.eos_id)
        scored = run_tasks(lm, text, scorer, list(tasks), samples, precision=config.run.precision)
    return {
        "run": str(run),
        "checkpoint": source.path.name,
        "step": step,
        "data": {"path": str(data.path), "id": data.id},
        "context": context,
        "heads": score(lm, rows, config, tokens),
        "positions": by_position(lm, long, config, tokens),
        "tasks": scored,
    }


def show(result: dict[str, Any], console: Console) -> None:
    heads = Table(title=f"{result['run']}, {result['checkpoint']}, held-out rows of {result['data']['path']}")
    for title in ("head", "nats/token", "bits/byte", "first choice", "targets"):
        heads.add_column(title, justify="left" if title == "head" else "right")
    for head, r in result["heads"].items():
        top1 = "" if math.isnan(r["top1"]) else f"{r['top1']:.1%}"
        values = (f"{r['nats']:.4f}", f"{r['bits_per_byte']:.4f}", top1, f"{r['targets']:,}")
        heads.add_row(head, *values)
    console.print(heads)
    places = Table(title=f"nats by place in the document (trained on rows of {result['context']})")
    names = list(result["heads"])
    for title in ("tokens", *names, "targets", ""):
        places.add_column(title, justify="right")
    for r in result["positions"]:
        note = "past the training length" if r["beyond"] else ""
        nats = (f"{r['nats'][head]:.4f}" for head in names)
        places.add_row(f"{r['first']}-{r['last']}", *nats, f"{r['targets']:,}", note)
    console.print(places)
    for spec, cells in result["tasks"].items():
        console.print(task_table(spec, cells))


def task_table(spec: str, scores: dict[str, Any]) -> Table:
    """A row a difficulty; the harness's scores have metrics alone."""
    table = Table(title=spec)
    rows = scores if all(isinstance(v, dict) for v in scores.values()) else {"": scores}
    columns = list(dict.fromkeys(k for row in rows.values() for k in row))
    for title in ("", *columns):
        table.add_column(title, justify="right")
    for name, row in rows.items():
        cells = (row.get(c, "") for c in columns)
        table.add_row(name, *(_cell(c) for c in cells))
    return table


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="evaluate.py", description=__doc__.split("\n")[0])
    p.add_argument("run", type=Path, help="run folder, or one of its checkpoints")
    p.add_argument("--data", type=Path, default=None, help="dataset (default: the one it was trained on)")
    p.add_argument("--tokens", type=int, default=131072, help="held-out tokens to score (default 131072)")
    p.add_argument(
        "--tasks",
        nargs="+",
        default=[],
        metavar="TASK",
        help="mqar, copy, passkey (with options: mqar:pairs=4/8), mmlu, lm-eval:NAME or lm-eval:FILE.yaml",
    )
    p.add_argument("--samples", type=int, default=50, help="per task and difficulty (default 50)")
    p.add_argument("--ema", action="store_true", help="the averaged weights (run.ema) in place of the last")
    p.add_argument("--json", action="store_true", help="print JSON instead of tables")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        result = evaluate(args.run, args.data, args.tokens, args.tasks, args.samples, args.ema)
        if (args.run / rundir.ABOUT).is_file():
            name = "evaluation_ema.json" if args.ema else "evaluation.json"
            checkpoint.record(args.run, name, plain(result))
    except (UserError, ConfigError, DatasetError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER
    if args.json:
        print(json.dumps(plain(result), indent=1))
    else:
        show(result, Console())
    return 0


if __name__ == "__main__":
    sys.exit(main())
