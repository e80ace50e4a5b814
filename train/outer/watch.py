"""Command lines of the asynchronous loop: `python -m train serve`, `python -m train status HOST:PORT`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from train.errors import EXIT_USER, UserError
from train.outer.client import Link
from train.outer.frames import VARIABLE, address_of, secret_of
from train.outer.server import Server

WIDE = 160  # columns of a table that goes into a file or a pipe


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m train serve",
        description="The server of outer.kind: async. It takes its settings from the first worker that "
        "joins, keeps everything in DIR, and goes on from there when it is started again.",
    )
    p.add_argument("--dir", type=Path, required=True, help="folder of snapshots, journal and metrics.jsonl")
    p.add_argument("--listen", default="127.0.0.1:29500", metavar="HOST:PORT", help="default 127.0.0.1:29500")
    p.add_argument("--secret-file", default=None, help=f"file with the shared secret (default: ${VARIABLE})")
    p.add_argument("--snapshot-every", type=int, default=200, metavar="N", help="events between snapshots")
    p.add_argument("--until-done", action="store_true", help="end when every shard has had its steps")
    return p


def serve(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGINT or SIGTERM, which write a snapshot first. Exit code 2: something to put right."""
    args = parser().parse_args(argv)
    try:
        if args.snapshot_every < 1:
            raise UserError(f"--snapshot-every {args.snapshot_every}: want at least 1")
        secret, listen = secret_of(args.secret_file), address_of(args.listen)
        server = Server(args.dir, secret, listen, _say, args.snapshot_every, args.until_done)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: server.stop())
    _say(f"serving on {server.address[0]}:{server.address[1]}, everything in {args.dir}")
    server.run()
    return 0


def _say(text: str) -> None:
    with suppress(OSError):  # a full disk, or nobody who reads: no reason to end
        print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def is_address(text: str) -> bool:
    """Whether an argument of `status` means a server rather than a folder."""
    return text.rpartition(":")[2].isdigit() and ":" in text and not Path(text).exists()


def line(address: str, secret_file: str | None = None) -> closing[Link]:
    """To ask a server for its status. Raises UserError."""
    return closing(Link(address, secret_of(secret_file), "", patience=5.0))


def console() -> Console:
    """Standard output; wide enough for every column where it is no terminal (and $COLUMNS does not say)."""
    return Console() if sys.stdout.isatty() or "COLUMNS" in os.environ else Console(width=WIDE)


def table(address: str, found: dict[str, Any]) -> Table:
    """One row a worker; the title says where the run stands."""
    total, shards = found["total"], found["shards"]
    title = f"{address}  no worker yet"
    if shards:
        done = f"{sum(shards):,}/{total * len(shards):,} steps in {len(shards)} shards"
        title = f"{address}  version {found['version']}  {done}  {found['rejected']} pushes rejected"
    out = Table(title=title)
    out.add_column("worker", overflow="fold")
    for title in (
        "state",
        "shard",
        "base",
        "stale",
        "steps",
        "pushes",
        "sent",
        "received",
        "tokens/s",
        "loss",
    ):
        out.add_column(title, justify="right", no_wrap=True)
    for w in found["workers"]:
        pushes = " ".join(f"{n} {k}" if k != "applied" else str(n) for k, n in w["verdicts"].items())
        cells = [w["state"], w["shard"], w["base"], w["stale"], f"{w['steps']:,}", pushes]
        cells += [megabytes(w["bytes_up"]), megabytes(w["bytes_down"])]
        speed, loss = w["tokens_per_s"], w["loss"]
        cells += [f"{speed:,.0f}" if speed else "", f"{loss:.4f}" if loss is not None else ""]
        out.add_row(w["worker"], *("" if c is None else str(c) for c in cells))
    return out


def megabytes(n: int) -> str:
    return f"{n / 1e6:,.1f} MB"


if __name__ == "__main__":
    sys.exit(serve())
