"""Score a saved compressor: `python train/compress_eval.py --compressor RUN/best --decoder PATH --data FILE`.

Prints one JSON object: nats per token without, with the compressed and with the whole context, R, and bytes.
`--mode FA` scores full attention alone and needs no compressor.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from dataset.files import DatasetError
from model.compress import evaluate, load_compressor, load_tokenizer, wrap
from train.compress import needs_tokenizer
from train.compress_data import Reading, collate, read
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
    p.add_argument("--context", type=int, default=256, help="tokens that are compressed (256)")
    p.add_argument("--target", type=int, default=64, help="tokens that are scored (64)")
    p.add_argument("--examples", type=int, default=128, help="held-out windows that are scored (128)")
    p.add_argument("--batch", type=int, default=8, help="windows a forward pass (8)")
    p.add_argument(
        "--ratio", type=float, default=None, help="source tokens per slot, where a method takes it"
    )
    p.add_argument("--budget", type=int, default=None, help="slots, where a method takes it")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        if args.mode == "AC" and args.compressor is None:
            raise UserError("give --compressor RUN/best, or --mode FA for the full-attention baseline")
        model = load_quantized(args.decoder, None, "transformers", args.models)
        tokenizer = (
            load_tokenizer(args.decoder, args.models) if needs_tokenizer(args.data, args.decoder) else None
        )
        c = wrap(model, "full") if args.mode == "FA" else load_compressor(args.compressor, model)
        _, held, _ = read(args.data, tokenizer, Reading(context=args.context, target=args.target))
        held = held[: args.examples]
        batches = [collate(held[i : i + args.batch]) for i in range(0, len(held), args.batch)]
        asked = {k: v for k, v in (("ratio", args.ratio), ("budget", args.budget)) if v is not None}
        made = evaluate.score(c, batches, ("none", "full", "compressed"), **asked)
    except (UserError, DatasetError, ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER
    result = {v: made.loss(v) for v in made.nll} | {"R": made.recovered(), "tokens": int(made.tokens.sum())}
    print(
        json.dumps(
            result | {"kv_bytes": made.kv_bytes, "full_kv_bytes": made.full_kv_bytes, "slots": made.slots}
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
