"""`python -m experiments prepare | run | report | merge | forget SWEEP.yaml`: ablations in one file."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from dataset.files import DatasetError, write_bytes
from experiments import summary
from experiments.sweep import Sweep, read
from model.schema import ConfigError
from train.errors import EXIT_USER, UserError


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m experiments", description=__doc__)
    commands = p.add_subparsers(dest="command", required=True)
    prepare = commands.add_parser(
        "prepare", help="make the sweep's datasets where they are missing; their ids"
    )
    run = commands.add_parser("run", help="train and measure what is left to do; safe to kill and repeat")
    run.add_argument("--only", action="append", default=[], metavar="CASE", help="this case (repeatable)")
    run.add_argument("--part", type=part, default=(0, 1), metavar="I/N", help="every N-th run from the I-th")
    run.add_argument("--out", type=Path, default=None, metavar="DIR", help="runs go to runs/sweeps/NAME")
    run.add_argument("--dry-run", action="store_true", help="resolve every case and show the table of runs")
    report = commands.add_parser("report", help="tables and plots from summaries.jsonl alone")
    report.add_argument("--out", type=Path, default=None, metavar="DIR", help="default: beside the sweep")
    forget = commands.add_parser("forget", help="drop the summaries of runs whose base has changed")
    forget.add_argument(
        "--only", action="append", default=[], metavar="CASE", help="this case, changed or not"
    )
    merge = commands.add_parser("merge", help="take in the summaries that parts of the sweep left elsewhere")
    for command in (run, merge):
        command.add_argument(
            "--summaries",
            type=Path,
            default=None,
            metavar="FILE",
            help="what was measured, instead of the file beside the sweep, of which it begins as a copy",
        )
    for command in (prepare, run, report, forget, merge):
        command.add_argument("sweep", type=Path, metavar="SWEEP.yaml", help="or the folder that it is in")
    merge.add_argument("files", type=Path, nargs="+", metavar="summaries.jsonl", help="of other machines")
    return p


def part(text: str) -> tuple[int, int]:
    """0/4 ... 3/4."""
    try:
        index, parts = (int(x) for x in text.split("/"))
    except ValueError:
        index, parts = 0, 0
    if not 0 <= index < parts:
        raise argparse.ArgumentTypeError(f"{text!r}: want I/N with 0 <= I < N, like 0/4")
    return index, parts


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    path = args.sweep / "sweep.yaml" if args.sweep.is_dir() else args.sweep
    try:
        return act(args, elsewhere(read(path), args))
    except (UserError, ConfigError, DatasetError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130


def elsewhere(sweep: Sweep, args: argparse.Namespace) -> Sweep:
    """With --summaries, measured in another file. One that is not there yet begins with what is committed."""
    wanted = vars(args).get("summaries")
    if wanted is None:
        return sweep
    committed = summary.file_of(sweep)
    if not wanted.exists() and committed.exists():
        if vars(args).get("dry_run"):
            return sweep
        write_bytes(wanted, committed.read_bytes())
    return replace(sweep, measured_in=wanted)


def act(args: argparse.Namespace, sweep: Sweep) -> int:
    if args.command == "report":
        from experiments.report import write  # plotting takes a while to import

        print(write(sweep, args.out or sweep.path.parent))
        return 0
    if args.command == "forget":
        stale = summary.changed(sweep, summary.read(summary.file_of(sweep)))
        gone = summary.forget(sweep, lambda x: x["case"] in args.only or (x["case"], x["data"]) in stale)
        print(f"{summary.file_of(sweep)}: {gone} lines dropped")
        return 0
    if args.command == "merge":
        count = summary.merge(sweep, args.files)
        print(f"{summary.file_of(sweep)}: {count} runs taken in")
        return 0
    from experiments.run import Options, plan_table, prepare, run_sweep

    if args.command == "prepare":
        for name, data in prepare(sweep, sweep.spec.data).items():
            print(f"{name}: {data.path}: {data.manifest['id']}")
        return 0
    options = Options(args.only, args.part, args.out)
    if args.dry_run:
        Console().print(plan_table(sweep, options))
        summary.refuse_changed(sweep)
        return 0
    run_sweep(sweep, options, Console())
    return 0


if __name__ == "__main__":
    sys.exit(main())
