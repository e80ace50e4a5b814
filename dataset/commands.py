"""python -m dataset verify, info, decode, task, train-tokenizer, import, export, score, continue."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from dataset.console import HELP, bar, console, print_table, task_number
from dataset.files import DatasetError


def add(commands) -> None:
    """Add these commands to the parser of `python -m dataset`."""
    add_looking(commands)
    add_tasks(commands)
    add_tokenizer(commands)
    add_exchange(commands)
    add_models(commands)


def add_looking(commands) -> None:
    p = commands.add_parser("verify", help="hash every block, of sidecars too; name the damaged ones")
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


def add_tasks(commands) -> None:
    p = commands.add_parser(
        "task",
        help="a synthetic task as a dataset: mqar, copy, passkey",
        formatter_class=HELP,
        epilog="examples:\n  python -m dataset task mqar:pairs=4/8/16 --out data/mqar\n"
        "  python -m dataset task passkey:lengths=256/512,depths=0/0.5/1 --samples 5000 --out data/passkey",
    )
    p.add_argument("specs", nargs="+", metavar="TASK", help="NAME or NAME:OPTION=VALUE[/VALUE...],...")
    p.add_argument("--tokenizer", default="bytes", help="as for prepare (bytes)")
    p.add_argument("--samples", type=int, default=20000, metavar="N", help="to train on (20000)")
    p.add_argument("--heldout-samples", type=int, default=500, metavar="N", help="others to test on (500)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, required=True, metavar="DIR")
    p.set_defaults(run=run_task)


def run_task(args: argparse.Namespace) -> int:
    from dataset.tasks import write
    from dataset.tokenizers import make

    data = write(
        args.specs, make(args.tokenizer), args.out, args.samples, args.heldout_samples, seed=args.seed
    )
    text = ", ".join(f"{s.name} {s.documents:,} documents, {s.tokens:,} tokens" for s in data.splits.values())
    print(f"{args.out}: {text}")
    return 0


def add_tokenizer(commands) -> None:
    p = commands.add_parser(
        "train-tokenizer",
        help="train a byte-level BPE",
        formatter_class=HELP,
        epilog="example:\n  python -m dataset train-tokenizer --source pystdlib --vocab 8192 --out data/bpe",
    )
    p.add_argument("--source", nargs="+", required=True, metavar="S", help="as for prepare")
    p.add_argument("--vocab", type=int, required=True, metavar="N", help="ids, bytes and specials included")
    p.add_argument("--out", type=Path, required=True, metavar="DIR")
    p.add_argument("--field", default="text", help="text column of jsonl and tables (default: text)")
    p.add_argument("--include", nargs="+", default=(), metavar="GLOB")
    p.add_argument("--sample-mb", type=float, default=200, metavar="MB", help="text read at most (200)")
    p.set_defaults(run=run_train_tokenizer)


def run_train_tokenizer(args: argparse.Namespace) -> int:
    from dataset.sources import ReadOptions
    from dataset.train_tokenizer import train

    if not 0 < args.sample_mb < 1e9:
        raise DatasetError(f"--sample-mb {args.sample_mb}: a number of megabytes above 0 is needed")
    options = ReadOptions(args.field, tuple(args.include))
    with bar("reading") as progress:
        job = progress.add_task("", total=None)
        tokenizer = train(
            tuple(args.source),
            args.vocab,
            args.out,
            options,
            int(args.sample_mb * 1e6),
            lambda done, total: progress.update(job, completed=done, total=total),
        )
    print(f"{args.out}: {tokenizer.vocab:,} ids, {tokenizer.identity}")
    return 0


def add_exchange(commands) -> None:
    p = commands.add_parser(
        "import",
        help="a dataset from Megatron or datatrove files",
        formatter_class=HELP,
        epilog="examples:\n"
        "  python -m dataset import megatron my_text_document --tokenizer tokenizer.json --out data/corpus\n"
        "  python -m dataset import datatrove 000_00000.ds --tokenizer tokenizer.json --out data/corpus",
    )
    p.add_argument("format", choices=("megatron", "datatrove"))
    p.add_argument("paths", nargs="+", type=Path, help="prefixes of .bin/.idx, or .ds files")
    p.add_argument("--tokenizer", required=True, help="the one the files were made with")
    p.add_argument("--eos", metavar="TOKEN", help="text of the end-of-document token")
    p.add_argument("--heldout", type=float, default=0.0, metavar="F", help="fraction of documents (0)")
    p.add_argument("--out", type=Path, required=True, metavar="DIR")
    p.set_defaults(run=run_import)
    p = commands.add_parser("export", help="a split as Megatron or datatrove files")
    p.add_argument("format", choices=("megatron", "datatrove"))
    p.add_argument("path", type=Path, help="the dataset")
    p.add_argument("--split", default="train")
    p.add_argument("--out", type=Path, required=True, metavar="PREFIX")
    p.set_defaults(run=run_export)


def run_import(args: argparse.Namespace) -> int:
    from dataset.exchange import import_corpus
    from dataset.tokenizers import make

    data = import_corpus(
        args.format, args.paths, make(args.tokenizer, None, args.eos), args.out, args.heldout
    )
    text = ", ".join(f"{s.name} {s.documents:,} documents, {s.tokens:,} tokens" for s in data.splits.values())
    print(f"{args.out}: {text}")
    return 0


def run_export(args: argparse.Namespace) -> int:
    from dataset.exchange import export_corpus
    from dataset.format import open_dataset

    export_corpus(args.format, open_dataset(args.path), args.split, args.out)
    print(f"{args.out}: {args.split} of {args.path} as {args.format}")
    return 0


def add_models(commands) -> None:
    p = commands.add_parser(
        "score",
        help="reference losses of a model for every token",
        formatter_class=HELP,
        epilog="examples:\n"
        "  python -m dataset score data/pystdlib --model runs/onion_stage1\n"
        "  python -m dataset score data/pystdlib --model smollm2-135m-instruct --split heldout",
    )
    add_model_options(p)
    p.add_argument("--split", default="train")
    p.add_argument("--context", type=int, default=1024, metavar="N", help="window of the model (1024)")
    p.add_argument("--batch-tokens", type=int, default=8192, metavar="N", help="ids a forward pass (8192)")
    p.add_argument("--task", type=task_number, default=(0, 1), metavar="I/N", help="only shards I, I+N, ...")
    p.add_argument("--as", dest="alias", metavar="NAME", help="a name for the sidecar, besides its hash")
    p.set_defaults(run=run_score)
    p = commands.add_parser(
        "continue",
        help="a dataset of teacher continuations, loss on the answers",
        formatter_class=HELP,
        epilog="example:\n  python -m dataset continue data/books --model smollm2-135m-instruct "
        "--documents 500 --out data/answers",
    )
    add_model_options(p)
    p.add_argument("--out", type=Path, required=True, metavar="DIR")
    p.add_argument("--prefix", type=int, default=256, metavar="N", help="ids of a document's start (256)")
    p.add_argument("--new", type=int, default=128, metavar="N", help="ids the teacher writes at most (128)")
    p.add_argument("--documents", type=int, default=1000, metavar="N", help="prefixes taken (1000)")
    p.add_argument("--temperature", type=float, default=0.0, help="0: greedy (default)")
    p.add_argument("--chat", action="store_true", help="ask in the teacher's chat template")
    p.add_argument("--seed", type=int, default=0)
    p.set_defaults(run=run_continue)


def add_model_options(p) -> None:
    p.add_argument("path", type=Path, help="the dataset")
    p.add_argument("--model", required=True, help="a run, a transformers folder, smollm2-135m-instruct")
    p.add_argument("--device", default="cpu")


def run_score(args: argparse.Namespace) -> int:
    from dataset.format import open_dataset
    from dataset.score import describe, load_reference, score
    from dataset.sidecar import give_alias

    data = open_dataset(args.path)
    if args.context < 2 or args.batch_tokens < 1:
        raise DatasetError("--context must be at least 2, --batch-tokens at least 1")
    reference = load_reference(args.model, args.context, args.device)
    with bar("scoring") as progress:
        job = progress.add_task("", total=None)
        name, left = score(
            data,
            reference,
            args.split,
            args.batch_tokens,
            args.device,
            args.task,
            lambda done, total: progress.update(job, completed=done, total=total),
        )
    if left:
        print(f"sidecar {name}: {left} shards are left to other tasks")
        return 0
    if args.alias:
        name = give_alias(data, name, args.alias)
    print_table(f"sidecar {name}", list(describe(data, name).items()))
    print(f"use it with: sidecar: {name}")
    return 0


def run_continue(args: argparse.Namespace) -> int:
    from dataset.continuation import Recipe, continue_documents
    from dataset.format import open_dataset
    from dataset.score import load_reference

    recipe = Recipe(args.prefix, args.new, args.documents, args.temperature, args.seed, args.chat)
    recipe.check()
    data = open_dataset(args.path)
    teacher = load_reference(args.model, args.prefix * 8 + args.new, args.device)
    with bar("documents") as progress:
        job = progress.add_task("", total=None)
        made = continue_documents(
            data,
            teacher,
            args.out,
            recipe,
            args.device,
            lambda done, total: progress.update(job, completed=done, total=total),
        )
    counts = {k: v for k, v in made.manifest["counts"].items() if v}
    print(f"{args.out}: {', '.join(f'{v:,} {k}' for k, v in counts.items())}")
    return 0
