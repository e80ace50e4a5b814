"""python -m dataset: prepare, verify, info, decode."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from dataset.files import DatasetError

console = Console(stderr=True, highlight=False)
HELP = argparse.RawDescriptionHelpFormatter


def bar(label: str) -> Progress:
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    return Progress(TextColumn(label), *columns, console=console)


def task_number(text: str) -> tuple[int, int]:
    """I/N with 0 <= I < N."""
    try:
        i, n = (int(part) for part in text.split("/"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form I/N, such as 0/8") from None
    if not 0 <= i < n:
        raise argparse.ArgumentTypeError(f"{text!r}: the first number must lie in 0..{n - 1}")
    return i, n


def size(text: str) -> int:
    """Bytes: 512M, 1G, 1048576."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    try:
        return int(float(text[:-1]) * units[text[-1].upper()]) if text[-1].upper() in units else int(text)
    except (ValueError, IndexError):
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
        "--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (all cores)"
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


def print_table(title: str, rows: list[tuple[str, str]]) -> None:
    table = Table(title=title, show_header=False, title_justify="left")
    for row in rows:
        table.add_row(*row)
    Console(highlight=False).print(table)


def add_looking(commands) -> None:
    p = commands.add_parser("verify", help="hash every block; name the damaged ones")
    p.add_argument("path", type=Path)
    p.set_defaults(run=run_verify)
    p = commands.add_parser("info", help="counts, lengths, bytes per token, sample text")
    p.add_argument("path", type=Path)
    p.add_argument("--json", action="store_true")
    p.set_defaults(run=run_info)
    p = commands.add_parser(
        "decode",
        help="print the text behind the ids",
        formatter_class=HELP,
        epilog="example:\n  python -m dataset decode data/pystdlib --split heldout --document 3 --tokens 0:9",
    )
    p.add_argument("path", type=Path)
    p.add_argument("--split", default="train")
    p.add_argument("--document", type=int, default=0, metavar="N")
    p.add_argument("--tokens", type=token_range, metavar="A:B", help="only these ids of the document")
    p.set_defaults(run=run_decode)


def token_range(text: str) -> tuple[int, int]:
    try:
        a, b = (int(part) for part in text.split(":"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form A:B, such as 0:200") from None
    return a, b


def run_verify(args: argparse.Namespace) -> int:
    from dataset.verify import verify

    start = time.perf_counter()
    total = 0
    with bar("hashing") as progress:
        job = progress.add_task("", total=None)

        def show(done: int, all_bytes: int) -> None:
            nonlocal total
            total = all_bytes
            progress.update(job, completed=done, total=all_bytes)

        faults = verify(args.path, show)
    for fault in faults:
        console.print(fault, style="red", markup=False)
    seconds = max(time.perf_counter() - start, 1e-9)
    print(f"{args.path}: {total:,} bytes, {len(faults)} faults ({total / 1e9 / seconds:.2f} GB/s)")
    return 2 if faults else 0


def run_info(args: argparse.Namespace) -> int:
    from dataset.verify import info

    found = info(args.path)
    if args.json:
        print(json.dumps(found, indent=1, ensure_ascii=False))
        return 0
    splits = found.pop("splits")
    print_table(found.pop("path"), [(k, str(v)) for k, v in found.items()])
    for name, split in splits.items():
        samples, lengths = split.pop("samples"), split.pop("lengths")
        rows = [(k, f"{v:,.3f}" if isinstance(v, float) else f"{v:,}") for k, v in split.items()]
        print_table(name, rows + [(f"documents of {k} tokens", f"{v:,}") for k, v in lengths.items()])
        for text in samples:
            print(f"  {text!r}")
    return 0


def run_decode(args: argparse.Namespace) -> int:
    from dataset.verify import decode

    sys.stdout.write(decode(args.path, args.split, args.document, args.tokens))
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dataset", description="The dataset side of the lab.")
    commands = parser.add_subparsers(dest="command", required=True)
    add_prepare(commands)
    add_looking(commands)
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except DatasetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; what was finished is kept, run the same command to go on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
