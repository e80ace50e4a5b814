"""`python -m model show ARCH`, `generate RUN --prompt TEXT`, `import`, `export` and `backends`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from model import config
from model.build import load
from model.describe import describe, mermaid
from model.generate import stream
from model.schema import ConfigError
from model.show import backends, show
from model.speculate import Tally
from model.text import Printer, Text, tokenizer_of

EXAMPLES = """\
examples:
  python -m model show samba
  python -m model show onion_stage2.yaml --set dim=384 --set embed.project=384
  python -m model show onion_stage2 --mermaid > onion.mmd
  python -m model show samba --json --context 4096
  python -m model generate runs/samba --prompt "def main(" --temperature 0.8 --top-p 0.95
  python -m model import smollm2-135m-instruct --out runs/smollm2
  python -m model export runs/samba exported/samba
  python -m model generate runs/mtp --prompt "def main(" --speculate 2
  python -m model backends

An ARCH is a YAML file, or the name of one in the working folder or in model/archs/.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 for a configuration, a command line or a disk that is to be mended."""
    args = parser().parse_args(argv)
    try:
        args.run(args)
        sys.stdout.flush()
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:  # a folder that cannot be made, a full disk
        print(error, file=sys.stderr)
        return 2
    return 0


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m model",
        description="Look at architectures, and talk to what was trained.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = p.add_subparsers(required=True, metavar="COMMAND")
    _add_show(commands)
    _add_generate(commands)
    _add_exchange(commands)
    command = commands.add_parser(
        "backends", help="which implementations of each operator run here, or why not"
    )
    command.set_defaults(run=lambda args: backends())
    return p


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


def _add_generate(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "generate",
        help="continue a text with a run's model",
        description="Continue a prompt, streaming. Greedy unless a temperature is given.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("source", metavar="RUN", help="a run's folder, a checkpoint or an export")
    prompt = command.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="text to continue")
    prompt.add_argument("--ids", type=int, nargs="+", metavar="ID", help="token ids to continue; prints ids")
    command.add_argument("--max-new-tokens", type=_positive, default=100, metavar="N")
    command.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    command.add_argument("--top-k", type=_positive, metavar="K")
    command.add_argument("--top-p", type=float, metavar="P")
    command.add_argument("--seed", type=int, default=0, help="of sampling (default 0)")
    command.add_argument(
        "--speculate",
        type=_positive,
        metavar="N",
        help="draft N tokens a pass with a multi-token head; the same text, and what was accepted on stderr",
    )
    command.set_defaults(run=_generate)


def _add_exchange(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "import",
        help="a transformers folder (Llama, Mistral, Qwen3, Mamba2, or an export) as a run's folder",
        description=(
            "Rebuild a pretrained model as an arch of ours with the same logits. `generate` takes the folder,"
            " `show` its config.yaml, and `train/pretrain.py --arch RUN/config.yaml --init-from RUN` goes on"
            " from it."
        ),
    )
    command.add_argument("source", metavar="DIR", help="a transformers folder, a hub id or a packaged model")
    command.add_argument("--out", required=True, type=Path, metavar="RUN", help="the folder to make")
    command.set_defaults(run=_import)
    command = commands.add_parser(
        "export",
        help="a run as a transformers AutoModelForCausalLM folder",
        description=(
            "config.json, safetensors, tokenizer and a modeling file: where this package is installed,"
            " AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True) loads it."
        ),
    )
    command.add_argument("source", metavar="RUN", help="a run's folder, a checkpoint or an import")
    command.add_argument("out", type=Path, metavar="DIR", help="the folder to make")
    command.set_defaults(run=_export)


def _import(args: argparse.Namespace) -> None:
    from model.hub.importing import import_model

    made = import_model(args.source, args.out)
    print(f"{args.out}: dim {made.dim}, vocab {made.vocab}; train on with")
    print(f"  python train/pretrain.py --arch {args.out}/config.yaml --init-from {args.out} --data DIR")


def _export(args: argparse.Namespace) -> None:
    from model.hub.exporting import export_model

    export_model(args.source, args.out)
    print(f'AutoModelForCausalLM.from_pretrained("{args.out}", trust_remote_code=True)')


def _generate(args: argparse.Namespace) -> None:
    folder = Path(args.source)
    lm = load(folder)
    text = None if args.prompt is None else Text(tokenizer_of(folder))
    try:
        ids = args.ids if text is None else text.encode(args.prompt)
    except UnicodeEncodeError as error:
        raise ConfigError([f"--prompt: want UTF-8, got {args.prompt!r}"]) from error
    if not ids or not all(0 <= i < lm.vocab for i in ids):
        raise ConfigError([f"the prompt must be at least one id below {lm.vocab}, got {ids[:8]}"])
    if text is not None:
        print(args.prompt, end="", flush=True)
    printer = Printer(text, ids) if text is not None else None
    options = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p, "seed": args.seed}
    tally = Tally()
    options |= {"speculate": args.speculate or 0, "tally": tally}
    try:
        for new in stream(lm, torch.tensor([ids]), args.max_new_tokens, **options):
            token = int(new[0])
            print(printer.add(token) if printer is not None else f"{token} ", end="", flush=True)
    except ValueError as error:
        raise ConfigError([str(error)]) from error
    print("" if printer is None else printer.rest())
    if args.speculate:
        print(tally, file=sys.stderr)


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
