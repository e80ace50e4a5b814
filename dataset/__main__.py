"""python -m dataset: prepare a corpus; the other commands are in `dataset.commands`."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from dataset import commands as others
from dataset.console import HELP, bar, console, positive, print_table, task_number
from dataset.files import DatasetError

GO_ON = ("prepare", "score", "continue")  # commands that take up what an earlier run has finished


def size(text: str) -> int:
    """Bytes: 512M, 1G, 1048576."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    try:
        return int(float(text[:-1]) * units[text[-1].upper()]) if text[-1].upper() in units else int(text)
    except (ValueError, IndexError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 512M or 1G") from None


def add_prepare(commands) -> None:
    p = commands.add_parser(
        "prepare",
        help="tokenize a corpus into a dataset folder",
        formatter_class=HELP,
        description="Tokenize text, code and jsonl into a folder. Safe to kill: run it again to go on.",
        epilog="examples:\n"
        "  python -m dataset prepare --source pystdlib --tokenizer smollm2-135m-instruct --merges 2048 "
        "--out data/pystdlib\n"
        "  python -m dataset prepare --source books/ notes.jsonl.zst --tokenizer bytes --out data/books\n"
        "  python -m dataset prepare --source dclm/ --tokenizer tokenizer.json --out data/dclm --dry-run\n"
        "  python -m dataset prepare --source dclm/ --tokenizer tokenizer.json --out data/dclm --task 3/64",
    )
    p.add_argument(
        "--source", nargs="+", required=True, metavar="S", help="pystdlib, files, folders, URLs, hf:ORG/NAME"
    )
    p.add_argument(
        "--tokenizer", default="bytes", help="bytes, smollm2-135m-instruct, a tokenizer.json or folder"
    )
    p.add_argument("--merges", type=int, metavar="N", help="cut a BPE to its first N merges")
    p.add_argument("--eos", metavar="TOKEN", help="text of the end-of-document token, when it is not obvious")
    p.add_argument("--out", required=True, type=Path, metavar="DIR")
    p.add_argument("--field", default="text", help="text column of jsonl and tables (default: text)")
    p.add_argument("--kind", choices=("text", "jsonl", "parquet", "arrow"), help="read every file as this")
    p.add_argument("--include", nargs="+", default=(), metavar="GLOB", help="only these, such as '*.py'")
    p.add_argument("--heldout", type=float, metavar="F", help="fraction of documents (0.05, at most 64M)")
    p.add_argument("--dtype", choices=("u16", "u32"), help="default: u16 when the vocabulary fits")
    p.add_argument("--shard-bytes", type=size, default=2**30, metavar="SIZE", help="largest shard (1G)")
    p.add_argument("--min-tokens", type=int, default=0, metavar="N", help="drop shorter documents (counted)")
    p.add_argument("--max-tokens", type=int, default=0, metavar="N", help="drop longer documents (counted)")
    p.add_argument(
        "--workers", type=positive, default=os.cpu_count() or 1, metavar="N", help="processes (all cores)"
    )
    p.add_argument("--task", type=task_number, metavar="I/N", help="only tasks I, I+N, ...: for a scheduler")
    p.add_argument("--strict", action="store_true", help="stop at the first input error")
    p.add_argument(
        "--fast",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="fastokens, if it is installed and agrees with `tokenizers` (same ids either way)",
    )
    p.add_argument("--dry-run", action="store_true", help="sample, extrapolate, write nothing")
    p.set_defaults(run=run_prepare)


def request_of(args: argparse.Namespace):
    from dataset.plan import Request

    names = ("tokenizer", "merges", "eos", "heldout", "dtype", "field", "kind", "shard_bytes")
    chosen = {name: getattr(args, name) for name in (*names, "min_tokens", "max_tokens")}
    return Request(sources=tuple(args.source), include=tuple(args.include), **chosen)


def run_prepare(args: argparse.Namespace) -> int:
    from dataset.estimate import estimate
    from dataset.prepare import prepare
    from dataset.work import How

    request = request_of(args)
    if args.dry_run:
        print_table(
            "what the whole corpus would take", estimate_rows(estimate(request, args.fast), args.workers)
        )
        return 0
    start = time.perf_counter()
    with bar("tokenizing") as progress:
        job = progress.add_task("", total=None)
        report = prepare(
            request,
            args.out,
            workers=args.workers,
            task=args.task,
            how=How(args.strict, args.fast),
            progress=lambda done, total: progress.update(job, completed=done, total=total),
        )
    for message in report.messages[:20]:
        console.print(f"input error: {message}", style="yellow", markup=False)
    counts = report.counts
    if counts["errors"]:
        console.print(f"{counts['errors']:,} input errors; all are counted in {args.out / 'sources.jsonl'}")
    if report.dataset is None:
        console.print(f"{report.done} of {report.tasks} tasks are done. When all are, run it without --task.")
        return 0
    if report.reused:
        console.print(f"{args.out} already holds exactly this dataset.")
    splits = report.dataset.splits.values()
    text = ", ".join(f"{s.name} {s.documents:,} documents, {s.tokens:,} tokens" for s in splits)
    print(f"{args.out}: {text} ({time.perf_counter() - start:.1f} s)")
    return 0


def estimate_rows(found: dict, workers: int) -> list[tuple[str, str]]:
    hours = found["core_hours"]
    return [
        ("input", f"{found['input_bytes'] / 1e9:,.3f} GB ({found['sampled_bytes'] / 1e6:,.1f} MB sampled)"),
        ("documents", f"{found['documents']:,}"),
        ("text", f"{found['text_bytes'] / 1e9:,.3f} GB"),
        ("tokens", f"{found['tokens']:,}"),
        ("disk", f"{found['disk_bytes'] / 1e9:,.3f} GB"),
        ("speed", f"{found['text_mb_per_core_second']:,.1f} MB of text per core and second"),
        ("time", f"{hours:,.3f} core-hours; {hours / workers:,.3f} hours with {workers} workers"),
        ("input errors in the sample", f"{found['errors']:,}"),
    ]


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m dataset", description="The dataset side of the lab.")
    commands = p.add_subparsers(dest="command", required=True)
    add_prepare(commands)
    others.add(commands)
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        return args.run(args)
    except DatasetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        on = "; what was finished is kept, run the same command to go on"
        print(f"stopped{on if args.command in GO_ON else ''}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
