"""`python -m experiments.bench [NAME...]`: ratios against named peers.

A bench is a module of this package with `cases() -> list[Case]`, built lazily, or with
`run(rounds) -> list[Result]` where it needs its own processes. Adding a file adds a bench.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
from pathlib import Path
from types import ModuleType

from experiments.bench import __path__ as package_path
from experiments.bench.harness import Result, machine, markdown, measure, save
from model.ops.allocator import keep_freed_memory
from model.registry import did_you_mean

NOT_BENCHES = ("harness", "__main__")


def names() -> list[str]:
    return sorted(m.name for m in pkgutil.iter_modules(package_path) if m.name not in NOT_BENCHES)


def run_module(module: ModuleType, rounds: int) -> list[Result]:
    if hasattr(module, "run"):
        return module.run(rounds)
    return [measure(case, rounds) for case in module.cases()]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.bench", description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"which: {', '.join(names())} (default: all)"
    )
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds, at least 2 (default 9)")
    parser.add_argument("--threads", type=int, help="intra-op threads (default: torch's own)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/bench"), help="folder for NAME.md and NAME.json"
    )
    args = parser.parse_args(argv)
    for name in args.names:
        if name not in names():
            print(f"no bench called {name!r}{did_you_mean(name, names())}", file=sys.stderr)
            return 2
    if args.rounds < 2:
        print(f"--rounds {args.rounds}: a spread needs at least 2", file=sys.stderr)
        return 2
    keep_freed_memory()
    if args.threads:
        import torch

        torch.set_num_threads(args.threads)
    print(f"machine: {machine()}\n")
    for name in args.names or names():
        results = run_module(importlib.import_module(f"experiments.bench.{name}"), args.rounds)
        text = markdown(results)
        print(text, flush=True)
        save(results, args.out / f"{name}.json")
        (args.out / f"{name}.md").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
