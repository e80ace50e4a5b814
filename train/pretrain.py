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

from train.replay import command as replay_command
from train.session import run_all
from train.stage import Request


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="pretrain.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--arch",
        action="append",
        default=[],
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
    p.add_argument(
        "--decay-now",
        action="store_true",
        help="begin the decay at once: with --resume in the run itself, with --init-from RUN in a new run "
        "that takes over everything (weights, moments, place in the data)",
    )
    p.add_argument(
        "--profile",
        type=int,
        nargs="?",
        const=3,
        default=0,
        metavar="STEPS",
        help="trace so many steps (3) with torch.profiler into RUN/profile",
    )
    p.add_argument(
        "--replay",
        type=Path,
        default=None,
        metavar="FOLDER",
        help="run a step that was not finite again (RUN/replay/step_N) and say where it broke",
    )
    p.add_argument("--dry-run", action="store_true", help="measure memory and speed, write nothing")
    p.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="sets", help="override any key"
    )
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.replay is not None:
        return replay_command(args.replay, args.sets)
    if not args.arch:
        parser().error("the following arguments are required: --arch")
    flags = (args.resume, args.init_from, args.dry_run, args.decay_now, args.profile)
    return run_all(Request(args.arch, args.sets, args.data, args.run, *flags))


if __name__ == "__main__":
    sys.exit(main())
