"""Train a context compressor around a pretrained decoder.

    python train/compress.py --method condense --decoder smollm2-135m-instruct --data text.jsonl --run runs/c
    torchrun --nproc-per-node 2 train/compress.py --method pairs --decoder PATH --data DIR --run-dir RUN

Every option of a method is a flag of its own (`--method M --help` lists them) and a key of --set.
Under torchrun write --set r=0.25 for --r, and --run-dir for --run: it takes both for options of its own.
RUN/best holds the compressor with the lowest held-out loss, RUN/last the final one.
Exit codes: 0 done; 2 something to put right; 3 diverged; 130 and 143 after a signal, when the step was saved.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import typing
from contextlib import ExitStack
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from dataset.files import DatasetError
from model.compress import load_tokenizer, method_names, wrap
from model.compress.base import METHODS, OBJECTIVES
from model.compress.decoder import PACKAGED, Decoder
from train.compress_data import Reading, left_out, read
from train.compress_loop import PRECISIONS, Fit, Settings, optimizer_for
from train.compress_quant import load_quantized
from train.errors import EXIT_DIVERGED, EXIT_USER, Diverged, UserError, is_disk_full
from train.hooks import Signals
from train.metrics import Log, rewind
from train.world import World, joined

PLACES = {  # flags by other names they are known under
    "decoder": ("--decoder", "--model_name", "--model_name_or_path", "--target_model_id"),
    "data": ("--data", "--data_path", "--dataset_id", "--train_file"),
    "run": ("--run", "--run-dir", "--output_dir"),
    "batch": ("--batch", "--batch_size", "--total_batch_size"),
    "micro": ("--micro", "--per_device_train_batch_size"),
    "steps": ("--steps", "--max_steps"),
    "learning_rate": ("--learning_rate", "--lr"),
    "encoder": ("--encoder", "--model_id"),
}
HELP = {  # what a default does not say
    "ratio": "source tokens per slot; a method that cannot meet it says so. Without it its own flags set the "
    "size: num_condense_tokens, summary_length, compression_max_len, r and M, similarity_threshold",
    "precision": " or ".join(PRECISIONS),
}
TEST = {"num_condense_tokens": 16, "max_tokens": 256, "lora_rank": 8}  # Condense's --test


def parser(method: str | None) -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="compress.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    p.add_argument("--method", required=True, choices=method_names())
    p.add_argument(
        *PLACES["decoder"], dest="decoder", default=None, help="folder, hub name, or smollm2-135m-instruct"
    )
    p.add_argument(
        "--models", type=Path, default=Path("models"), help="where packaged weights are converted to"
    )
    p.add_argument(*PLACES["data"], dest="data", default=None, help="see train/compress_data.py")
    p.add_argument(*PLACES["run"], dest="run", type=Path, default=None)
    p.add_argument("--resume", action="store_true")
    p.add_argument("--wandb", default="off", choices=("off", "offline", "online"))
    p.add_argument(
        "--load_in", default=None, choices=("8bit", "4bit"), help="quantize the frozen decoder (CUDA)"
    )
    p.add_argument("--loader", default="transformers", choices=("transformers", "unsloth"))
    p.add_argument("--epochs", type=float, default=None, help="instead of --steps")
    p.add_argument(
        "--max_length", type=int, default=None, help="context + target, where --context is not given"
    )
    p.add_argument(
        "--test",
        action="store_true",
        help="small settings; smollm2-135m-instruct and a generated task where nothing else is given",
    )
    p.add_argument("--do_train", action="store_true", help="accepted; training is what this command does")
    p.add_argument("--do_eval", action="store_true", help="accepted; held-out loss is always measured")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="sets")
    known = {"seed"}
    for owner in (Settings, Reading, *([METHODS.get(method).Config] if method in method_names() else [])):  # type: ignore[attr-defined]
        hints = typing.get_type_hints(owner)
        for f in dataclasses.fields(owner):
            if f.name in known and f.name != "seed":
                continue
            if f.name == "seed" and owner is not Settings:
                continue
            known.add(f.name)
            names = PLACES.get(f.name, (f"--{f.name}",))
            p.add_argument(
                *names, dest=f.name, default=None, **_kind(hints[f.name]),
                help="; ".join(filter(None, (HELP.get(f.name), f"default {f.default}"))),
            )  # fmt: skip
    return p


def _kind(hint: Any) -> dict[str, Any]:
    """How argparse reads a field of that type."""
    plain = (
        [h for h in typing.get_args(hint) if h is not type(None)]
        if type(None) in typing.get_args(hint)
        else [hint]
    )
    kind = plain[0]
    if kind is bool:
        return {"type": _truth, "nargs": "?", "const": True}
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)[0]
        return {"type": lambda s: tuple(inner(x) for x in s.replace(",", " ").strip("[] ").split())}
    return {"type": kind}


def _truth(word: str) -> bool:
    if word.lower() in ("1", "true", "yes", "on"):
        return True
    if word.lower() in ("0", "false", "no", "off"):
        return False
    raise argparse.ArgumentTypeError(f"{word!r} is neither true nor false")


def options_of(argv: list[str]) -> argparse.Namespace:
    """Parse, with --set KEY=VALUE turned into the flag KEY first. Raises SystemExit(2)."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--method", default=None)
    first.add_argument("--set", action="append", default=[], dest="sets")
    early, _ = first.parse_known_args(argv)
    extra = []
    for item in early.sets:
        key, equals, value = item.partition("=")
        if not equals:
            first.error(f"--set {item}: write KEY=VALUE")
        extra.append(f"--{key.split('.')[-1]}={value}")
    return parser(early.method).parse_args([*argv, *extra])


def pick(cls: type, args: argparse.Namespace) -> dict[str, Any]:
    """The options of a dataclass that were given."""
    names = [f.name for f in dataclasses.fields(cls)]
    return {n: getattr(args, n) for n in names if getattr(args, n, None) is not None}


@dataclasses.dataclass(frozen=True)
class Plan:
    """A command line, checked."""

    method: str
    decoder: str
    data: str
    run: Path
    options: dict[str, Any]
    settings: Settings
    reading: Reading


def plan(args: argparse.Namespace) -> Plan:
    """Check what can be checked before anything is loaded. Raises UserError."""
    cls: Any = METHODS.get(args.method)
    options = pick(cls.Config, args)
    if args.test:
        known = {f.name for f in dataclasses.fields(cls.Config)}
        options = {k: v for k, v in TEST.items() if k in known} | options
        args.steps = args.steps or 20
    decoder = args.decoder or (PACKAGED if args.test else None)
    data = args.data or ("recall" if args.test else None)
    if decoder is None or data is None:
        raise UserError(f"give --decoder (a folder, a hub name or {PACKAGED}) and --data")
    settings = Settings(**pick(Settings, args))
    if settings.objective not in (*OBJECTIVES, "document", "through"):
        raise UserError(
            f"--objective {settings.objective}: one of {', '.join(OBJECTIVES)}, document, through"
        )
    if settings.precision not in PRECISIONS:
        raise UserError(f"--precision {settings.precision}: one of {', '.join(PRECISIONS)}")
    if settings.objective == "document" and "autocompressor" not in args.method:
        raise UserError("--objective document trains AutoCompressors alone")
    if settings.objective == "through" and args.method != "clusters":
        raise UserError("--objective through trains clusters (mode quality) alone")
    lengths = pick(Reading, args)
    if args.max_length is not None and args.context is None:
        context = args.max_length * 3 // 4
        lengths |= {"context": context, "target": args.max_length - context}
    run = args.run or Path("runs") / f"compress_{args.method}"
    if (run / "metrics.jsonl").exists() and not args.resume:
        raise UserError(f"{run}: holds a run already; go on with --resume, or give another folder with --run")
    return Plan(args.method, decoder, data, run, options, settings, Reading(**lengths))


def train(args: argparse.Namespace) -> int:
    todo = plan(args)
    with ExitStack() as stack:
        world = stack.enter_context(joined())
        signals = stack.enter_context(Signals(alone=world.size == 1))
        if todo.settings.batch % world.size:
            raise UserError(f"--batch {todo.settings.batch} does not divide among {world.size} ranks")
        fit = build(todo, args, world, stack)
        if args.resume and fit.resume():
            world.on_main(lambda: rewind(todo.run, fit.step))
            fit.log.say(f"resumed at step {fit.step} of {fit.s.steps}")
        return 0 if fit.fit(signals) else 128 + (signals.caught or 2)


def build(todo: Plan, args: argparse.Namespace, world: World, stack: ExitStack) -> Fit:
    """Load the decoder and the data, make the folder, say what will be trained."""
    settings = todo.settings
    torch.manual_seed(settings.seed)
    model = load_quantized(todo.decoder, args.load_in, args.loader, args.models)
    tokenizer = (
        load_tokenizer(todo.decoder, args.models)
        if todo.options.get("encoder") or needs_tokenizer(todo.data, todo.decoder)
        else None
    )
    compressor = wrap(Decoder(model), {"method": todo.method, **todo.options}).to(world.device)
    encoder = None if tokenizer is None else compressor.context_tokenizer(tokenizer)
    rows, heldout, dropped = read(todo.data, tokenizer, todo.reading, encoder)
    if args.epochs is not None:
        steps = max(1, round(args.epochs * len(rows) / settings.batch))
        settings = dataclasses.replace(settings, steps=steps)
    described = {
        "data": todo.data,
        "reading": dataclasses.asdict(todo.reading),
        "settings": dataclasses.asdict(settings),
        "method": todo.method,
        "config": dataclasses.asdict(compressor.config),
        "fingerprint": compressor.decoder.fingerprint,
    }
    optimizer_for(compressor, settings)  # refuses a method with nothing to train before a folder is made
    if world.main:
        todo.run.mkdir(parents=True, exist_ok=True)
    log = Log(todo.run, world.main, settings.steps, args.wandb)
    stack.callback(log.close)
    own = sum(p.numel() for p in compressor.parameters() if p.requires_grad)
    whole = sum(p.numel() for p in model.parameters())
    share = own / (whole if compressor.trains_base else own + whole)
    log.say(
        f"{todo.method}: {own:,} parameters train, {share:.2%} of all; {len(rows)} examples, "
        f"{len(heldout)} held out{left_out(dropped)}"
    )
    decode = None if tokenizer is None else tokenizer.decode
    return Fit(compressor, rows, heldout, settings, todo.run, log, world, described, decode)


def needs_tokenizer(data: str, decoder: str) -> bool:
    """Prepared datasets hold ids; a decoder folder without a tokenizer can still train on them."""
    if (Path(data) / "manifest.json").is_file():
        folder = Path(decoder)
        return not folder.is_dir() or (folder / "tokenizer.json").exists()
    return True


def main(argv: list[str] | None = None) -> int:
    try:
        args = options_of(sys.argv[1:] if argv is None else argv)
        return train(args)
    except (UserError, DatasetError, ValueError, TypeError, FileNotFoundError) as error:
        if isinstance(error, TypeError) and "option" not in str(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER
    except Diverged as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_DIVERGED
    except OSError as error:
        if is_disk_full(error):
            print(f"error: {error}", file=sys.stderr)
            return EXIT_USER
        raise


if __name__ == "__main__":
    sys.exit(main())
