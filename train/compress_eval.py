"""Score a saved compressor: `python train/compress_eval.py --compressor RUN/best --decoder PATH --data FILE`.

Prints one JSON object: nats per token without, with the compressed and with the whole context, R, and bytes;
null for what needs a whole context where the decoder has no room for one. Without and whole are the decoder's
as it is loaded, before any training of its own weights. The compressor's run says how its data were cut and
split: only windows that it held out are scored. `--mode FA` scores full attention and needs no compressor.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from dataset.files import DatasetError
from model.compress import evaluate, load_compressor, load_tokenizer, wrap
from train.compress import needs_tokenizer
from train.compress_data import Reading, collate, read
from train.compress_loop import CONFIG
from train.compress_quant import load_quantized
from train.errors import EXIT_USER, UserError


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="compress_eval.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--compressor", type=Path, default=None, help="RUN/best, or any saved compressor")
    p.add_argument("--decoder", required=True, help="the one it was trained around")
    p.add_argument(
        "--models", type=Path, default=Path("models"), help="where packaged weights are converted to"
    )
    p.add_argument("--data", required=True, help="see train/compress_data.py")
    p.add_argument("--mode", choices=("AC", "FA"), default="AC", help="the compressor, or full attention")
    p.add_argument("--context", type=int, default=None, help="tokens that are compressed (the run's, or 256)")
    p.add_argument("--target", type=int, default=None, help="tokens that are scored (the run's, or 64)")
    p.add_argument("--examples", type=int, default=128, help="held-out windows that are scored (128)")
    p.add_argument("--batch", type=int, default=8, help="windows a forward pass (8)")
    p.add_argument(
        "--ratio", type=float, default=None, help="source tokens per slot, where a method takes it"
    )
    p.add_argument("--budget", type=int, default=None, help="slots, where a method takes it")
    return p


def reading_of(args: argparse.Namespace) -> Reading:
    """How the data are cut and split: as in the run that trained the compressor, if its folder says so.

    Raises UserError for other lengths on the run's own data: windows cut anew were trained on.
    """
    given = {k: v for k in ("context", "target") if (v := getattr(args, k)) is not None}
    config = None if args.compressor is None else args.compressor.resolve().parent / CONFIG
    if config is None:
        return Reading(**given)
    if not config.is_file():
        print(f"{config} is not there: what is scored here may have been trained on", file=sys.stderr)
        return Reading(**given)
    run = json.loads(config.read_text())
    how = Reading(**run["reading"])
    if Path(run["data"]).resolve() == Path(args.data).resolve() and replace(how, **given) != how:
        raise UserError(
            f"{args.data} was trained on in windows of {how.context} + {how.target} tokens ({config}); "
            "windows of another length would hold text it was trained on. Leave out --context and --target, "
            "or give other --data"
        )
    return replace(how, **given)


def scored(args: argparse.Namespace) -> evaluate.Score:
    """Both ends and the compressed context on the same held-out windows."""

    def decoder() -> Any:
        return load_quantized(args.decoder, None, "transformers", args.models)

    how = reading_of(args)
    c = wrap(decoder(), "full") if args.mode == "FA" else load_compressor(args.compressor, decoder())
    bare = wrap(decoder() if c.trains_base else c.decoder, "none")  # what was trained is no end
    own = c.reader is not c.decoder
    tokenizer = None
    if own or needs_tokenizer(args.data, args.decoder):
        tokenizer = load_tokenizer(args.decoder, args.models)
    _, held, _ = read(args.data, tokenizer, how, c.context_tokenizer(tokenizer) if own else None)
    held = held[: args.examples]
    batches = [collate(held[i : i + args.batch]) for i in range(0, len(held), args.batch)]
    asked = {k: v for k, v in (("ratio", args.ratio), ("budget", args.budget)) if v is not None}
    made = evaluate.score(c, batches, ("compressed",), **asked)
    why = evaluate.misfit(c, held)
    if why is not None:
        print(f"no loss after the full context is measured: {why}", file=sys.stderr)
    made.nll |= evaluate.score(bare, batches, ("none",) if why else ("none", "full")).nll
    return made


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        if args.mode == "AC" and args.compressor is None:
            raise UserError("give --compressor RUN/best, or --mode FA for the full-attention baseline")
        made = scored(args)
    except (UserError, DatasetError, ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER
    known, ends = made.nll, ("none", "full", "compressed")
    result: dict[str, Any] = {v: made.loss(v) if v in known else None for v in ends}
    result |= {"R": made.recovered() if "full" in known else None, "tokens": int(made.tokens.sum())}
    print(
        json.dumps(
            result | {"kv_bytes": made.kv_bytes, "full_kv_bytes": made.full_kv_bytes, "slots": made.slots}
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
