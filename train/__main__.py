"""`python -m train status RUN|HOST:PORT...`, `python -m train report RUN... [--out DIR]`, `... serve`."""

from __future__ import annotations

import argparse
import fcntl
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.table import Table

from dataset.files import DatasetError
from train import rundir
from train.errors import EXIT_USER, UserError
from train.hooks import duration
from train.metrics import read
from train.outer import watch as outer_watch


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m train", description="Look at training runs.")
    commands = p.add_subparsers(dest="command", required=True)
    commands.add_parser("serve", help="the server of outer.kind: async", add_help=False)
    status = commands.add_parser("status", help="where runs stand")
    status.add_argument("runs", type=Path, nargs="+", help="run folders, folders of runs, or HOST:PORT")
    status.add_argument("--secret-file", default=None, help="of a server (default: $LATENT_LAB_SECRET)")
    status.add_argument(
        "--watch",
        type=float,
        nargs="?",
        const=2.0,
        metavar="SECONDS",
        help="keep the tables up to date until no run or server is going on (every 2 s)",
    )
    report = commands.add_parser("report", help="a page with plots and sample text")
    report.add_argument("runs", type=Path, nargs="+", help="run folders, in the order they grew")
    report.add_argument("--out", type=Path, default=None, help="folder of the page (default: RUN/report)")
    return p


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["serve"]:
        return outer_watch.serve(words[1:])
    args = parser().parse_args(words)
    try:
        if args.command == "status" and args.watch:
            watch(args.runs, args.watch, args.secret_file)
        elif args.command == "status":
            with looking(args.runs, args.secret_file) as look:
                outer_watch.console().print(look()[1])
        else:
            from train.report import write  # plotting takes a while to import

            print(write(args.runs, args.out or args.runs[-1] / "report"))
    except (UserError, DatasetError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER
    return 0


def watch(paths: list[Path], every_s: float, secret_file: str | None = None) -> None:
    """The tables, drawn anew until every run has ended and every server is done, or Ctrl-C."""
    with suppress(KeyboardInterrupt), looking(paths, secret_file) as look:
        going, tables = look()
        with Live(tables, console=outer_watch.console(), auto_refresh=False) as live:
            while going:
                time.sleep(every_s)
                going, tables = look()
                live.update(tables, refresh=True)


@contextmanager
def looking(paths: list[Path], secret_file: str | None = None) -> Iterator[Callable[[], tuple[bool, Group]]]:
    """A look at servers (HOST:PORT) and folders of runs: whether any goes on, and a table of each server
    and one of all runs. Raises UserError."""
    addresses = [str(p) for p in paths if outer_watch.is_address(str(p))]
    folders = [p for p in paths if str(p) not in addresses]
    with ExitStack() as stack:
        links = {a: stack.enter_context(outer_watch.line(a, secret_file)) for a in addresses}

        def look() -> tuple[bool, Group]:
            found = {a: link.status() for a, link in links.items()}
            going = [not f["done"] for f in found.values()]
            going += [held(run) for path in folders for run in runs_in(path)]
            tables = [outer_watch.table(a, f) for a, f in found.items()]
            return any(going), Group(*tables, *([status_table(folders)] if folders else []))

        yield look


def runs_in(path: Path) -> list[Path]:
    """The run itself, or the runs in a folder, each with its workers. Raises UserError when there is none."""
    here = (path / rundir.ABOUT).is_file()
    found = [path] if here else sorted(p.parent for p in path.glob(f"*/{rundir.ABOUT}"))
    if not found:
        raise UserError(f"{path}: no run here, nor in a folder below")
    return [worker for run in found for worker in (run, *workers_of(run))]


def workers_of(run: Path) -> list[Path]:
    """Folders of the run's other workers (`outer.team`), in their order."""
    found = (p.parent for p in run.glob(f"workers/*/{rundir.ABOUT}"))
    return sorted(found, key=lambda p: (len(p.name), p.name))


def status_table(paths: list[Path]) -> Table:
    """One row a run. Raises UserError for a folder with none."""
    table = Table()
    table.add_column("run", overflow="fold")
    table.add_column("status", no_wrap=True)
    rows = [status_row(run) for path in paths for run in runs_in(path)]
    titles = ["step", "tokens", "loss", "bits/byte", "tokens/s", "MFU", "left", "outer loop"]
    last = len(titles) if any(row[-1] for row in rows) else -1
    for title in titles[:last]:
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row[: len(table.columns)])
    return table


def status_row(run: Path) -> list[str]:
    status, records = rundir.status_of(run), list(read(run))
    train = next((r for r in reversed(records) if r["kind"] == "train"), None)
    scores = next((r for r in reversed(records) if r["kind"] == "eval"), None)
    word = status["status"]
    if word == "running" and not held(run):
        word = "interrupted"
    step, total = (train or status).get("step", 0), status.get("total", 0)
    row = [str(run), word, f"{step}/{total}", f"{train['tokens']:,}" if train else ""]
    row.append(f"{train['loss']:.4f}" if train and train["loss"] is not None else "")
    bits = ((head, value) for head, value in (scores or {}).get("bpb", {}).items() if value is not None)
    row.append("\n".join(f"{head} {value:.3f}" for head, value in bits))
    traffic = outer_loop((train or {}).get("outer", {}))
    if not train or not train["tokens_per_s"]:
        return [*row, "", "", "", traffic]
    left = (total - step) * train["tokens"] / max(1, step) / train["tokens_per_s"]
    mfu = f"{train['mfu']:.1%}" if train.get("mfu") else ""
    return [*row, f"{train['tokens_per_s']:,.0f}", mfu, duration(left) if word == "running" else "", traffic]


def outer_loop(traffic: dict[str, Any]) -> str:
    """{"rounds": 3, "sent": 1200000, ...} -> "rounds 3", "1.2 MB sent", ...; "" without an outer loop."""
    counts = [f"{key} {value}" for key, value in traffic.items() if key not in ("sent", "received", "lease")]
    sizes = [f"{outer_watch.megabytes(traffic[k])} {k}" for k in ("sent", "received") if k in traffic]
    return "\n".join([", ".join(counts), *sizes] if traffic else [])


def held(run: Path) -> bool:
    """Whether a process is training in the folder."""
    try:
        with open(run / ".lock") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


if __name__ == "__main__":
    sys.exit(main())
