"""Pretrain a model: `torchrun train/pretrain.py --arch onion_stage2.yaml`, or with plain `python`.

Exit codes: 0 done; 2 something to put right, told in one message; 3 training diverged; 130 and 143 after
SIGINT and SIGTERM, when the step in hand was finished and saved.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):
    # Run as a script: `train/` is first on the path. Packages are found from the repository's root.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from train.session import run_all
from train.stage import Request


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="pretrain.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--arch",
        action="append",
        required=True,
        metavar="YAML",
        help="architecture: a file, or a name in model/archs/; several grow one after another",
    )
    p.add_argument("--data", type=Path, default=None, help="prepared dataset (default data/pystdlib)")
    p.add_argument(
        "--run",
        "--run-dir",
        type=Path,
        default=None,
        help="run folder (default runs/<arch>); several archs: its parent. Under torchrun write --run-dir: "
        "torchrun takes --run for one of its own options",
    )
    p.add_argument("--resume", action="store_true", help="go on with the run in the folder, if there is one")
    p.add_argument("--init-from", type=Path, default=None, metavar="RUN", help="start from these weights")
    p.add_argument("--dry-run", action="store_true", help="measure memory and speed, write nothing")
    p.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="sets", help="override any key"
    )
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    request = Request(args.arch, args.sets, args.data, args.run, args.resume, args.init_from, args.dry_run)
    return run_all(request)


if __name__ == "__main__":
    sys.exit(main())
