"""`python -m model show ARCH` and `python -m model backends`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence

from model import config
from model.describe import describe, mermaid
from model.schema import ConfigError
from model.show import backends, show

EXAMPLES = """\
examples:
  python -m model show samba
  python -m model show onion_stage2.yaml --set dim=256 --set embed.project=256
  python -m model show onion_stage2 --mermaid > onion.mmd
  python -m model show samba --json --context 4096
  python -m model backends

An ARCH is a YAML file, or the name of one in the working folder or in model/archs/.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 for a configuration or command line that is wrong."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        args.run(args)
        sys.stdout.flush()
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m model",
        description="Look at architectures.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_show(commands)
    command = commands.add_parser(
        "backends", help="which implementations of each operator run here, or why not"
    )
    command.set_defaults(run=lambda args: backends())
    return parser


def _add_show(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "show",
        help="sites, parameters, FLOPs, state and bits of an architecture",
        description=(
            "Every site with its parameters (counted once per set of weights), forward FLOPs per token, and"
            " the state it keeps: fixed, and per token. Nothing is downloaded, and no memory is taken."
        ),
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("arch", metavar="ARCH", help="a YAML file or the name of an arch")
    form = command.add_mutually_exclusive_group()
    form.add_argument(
        "--json", action="store_true", help="everything as JSON, the resolved configuration too"
    )
    form.add_argument("--mermaid", action="store_true", help="a flowchart for Markdown")
    form.add_argument("--expand", action="store_true", help="one row a site, repeated groups too")
    command.add_argument(
        "--set", dest="sets", action="append", default=[], metavar="KEY.PATH=VALUE", help="override a key"
    )
    command.add_argument(
        "--context", type=_positive, default=1024, metavar="T", help="tokens a row (default 1024)"
    )
    command.add_argument("--vocab", type=_positive, metavar="N", help="vocabulary of the dataset")
    command.set_defaults(run=_show)


def _positive(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"want a whole number of at least 1, got {text!r}")
    return value


def _show(args: argparse.Namespace) -> None:
    found = describe(config.load(args.arch, args.sets), vocab=args.vocab, context=args.context)
    if args.json:
        print(json.dumps(found.json(), indent=2))
    elif args.mermaid:
        print(mermaid(found), end="")
    else:
        show(found, expand=args.expand)


if __name__ == "__main__":
    sys.exit(main())
