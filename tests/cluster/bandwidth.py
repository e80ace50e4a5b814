"""What a slow line costs each outer loop: tokens/s at 100 Mbit and 5 ms against the same on loopback.

    python -m tests.cluster.bandwidth [--dim 512] [--mbit 100] [--every 0] [--rounds 2] [--out FILE]

Two ranks. every 0: H such that the compute of a round takes about as long as its fp32 transfer. Needs root;
takes some minutes, and two idle cores if the numbers are to mean anything.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.cluster.lan import Lan, missing
from tests.cluster.rank import OUTER, B, T

ROOT = Path(__file__).resolve().parents[2]
MODES = ("ddp", *OUTER)


def once(mode: str, every: int, rounds: int, dim: int, lan: Lan | None, port: int) -> dict[str, Any]:
    """Rank 0's facts of one run of two ranks, on the LAN or on loopback."""
    master, name = (lan.address(0), "eth0") if lan else ("127.0.0.1", "lo")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": name}
    ranks = []
    for rank in (0, 1):
        words = [sys.executable, "-m", "tests.cluster.rank", mode, str(rank), "2", master]
        words += [str(n) for n in (port, every, rounds, dim)]
        options = {"cwd": ROOT, "env": env, "stdout": subprocess.PIPE, "text": True}
        ranks.append(lan.popen(f"n{rank}", words, **options) if lan else subprocess.Popen(words, **options))
    try:
        out = [r.communicate(timeout=1800)[0] for r in ranks]
    finally:
        for r in ranks:
            r.kill()
    if any(r.returncode for r in ranks):
        raise SystemExit(f"{mode}: exit codes {[r.returncode for r in ranks]}")
    return json.loads(out[0].splitlines()[-1])


def main() -> int:
    p = argparse.ArgumentParser(prog="python -m tests.cluster.bandwidth", description=__doc__.split("\n")[0])
    p.add_argument("--dim", type=int, default=384, help="width of the samba (default %(default)s: 25M)")
    p.add_argument("--mbit", type=float, default=100, help="rate of every cable (default %(default)s)")
    p.add_argument("--every", type=int, default=0, help="H; 0: compute = transfer")
    p.add_argument("--rounds", type=int, default=2, help="rounds measured (default %(default)s)")
    p.add_argument("--out", type=Path, default=None, help="JSON file for the facts")
    args = p.parse_args()
    if why := missing():
        raise SystemExit(f"error: {why}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the LAN is taken down
    port, facts, every = 29600, [], args.every
    if not every:
        probe = once("diloco", 4, 1, args.dim, None, port)
        transfer = 8 * 4 * probe["parameters"] / (args.mbit * 1e6)
        every = max(4, round(transfer / (probe["seconds"] / probe["steps"])))
        print(f"{probe['parameters']:,} parameters, transfer {transfer:.1f} s: H = {every}", flush=True)
    with tempfile.TemporaryDirectory() as folder, Lan(2, Path(folder), mbit=args.mbit, delay=5) as lan:
        for mode in MODES:
            port += 2
            free = once(mode, every, args.rounds, args.dim, None, port)
            slow = once(mode, every, args.rounds, args.dim, lan, port + 1)
            share = slow["tokens_per_s"] / free["tokens_per_s"]
            per_token = slow["sent"] / (slow["steps"] * B * T)
            facts.append({**slow, "free": free["tokens_per_s"], "share": share, "bytes_per_token": per_token})
            print(
                f"{mode:15} {free['tokens_per_s']:8.1f} tokens/s free {slow['tokens_per_s']:8.1f} at "
                f"{args.mbit:g} Mbit ({share:.0%}), {per_token:,.0f} bytes a token",
                flush=True,
            )
    ddp = next(f for f in facts if f["mode"] == "ddp")
    e3m0 = next(f for f in facts if f["mode"] == "streaming_e3m0")
    at_100 = ddp["bytes_per_token"] / e3m0["bytes_per_token"] * 100 / every
    print(f"bytes a token at H = 100, streaming E3M0: {at_100:.0f} times below DDP")
    if args.out:
        settings = {"dim": args.dim, "mbit": args.mbit, "every": every, "rounds": args.rounds}
        args.out.write_text(json.dumps({"settings": settings, "facts": facts}, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
