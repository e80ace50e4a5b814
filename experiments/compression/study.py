"""What survives compression, at equal bytes: `python -m experiments.compression.study [--decoder smollm2]`.

A small Llama decoder is pretrained on a prepared dataset; every method is trained around it for the same
number of
steps with every seed; all are scored on the same held-out windows. Each (method, seed) is one JSON file under
the output folder, so that an interrupted study goes on where it stopped.

Shape legend: B batch  C context  T target.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch

import dataset
from dataset.files import write_json
from model.compress import evaluate as ev
from model.compress import load_decoder, load_tokenizer, wrap
from model.compress.decoder import new_llama
from train.compress_data import Example, Reading, collate, read
from train.compress_loop import Fit, Settings
from train.hooks import Signals
from train.metrics import Log
from train.world import World

TRAINED: dict[str, dict[str, Any]] = {
    "condense": {"num_condense_tokens": 32, "lora_rank": 16, "lora_alpha": 16},
    "condense-mean": {"method": "condense", "num_condense_tokens": 32, "slots": "mean", "lora_rank": 16},
    "autocompressor": {"summary_length": 16, "segment_length": 64, "lora_rank": 16},
    "variable_autocompressor": {
        "compression_max_len": 16, "segment_length": 64, "recompress_memory": False,
        "compression_lambda": 0.05, "compress_stop_threshold": 0.5, "lora_rank": 16,
    },
    "pairs": {"T_w": 8, "r": 0.0},
    "clusters": {"layer_idx": (0,), "use_residuals": True, "importance": False},
}  # fmt: skip
BASELINES = ("last", "random_eviction", "sink_window", "snapkv", "mean_pool", "oracle")
RATES = {"pairs": 1e-3, "clusters": 1e-3}


def pretrain(
    out: Path, data: dataset.Dataset, context: int, steps: int, batch: int = 16, lr: float = 2e-3
) -> Any:
    """The study's decoder, about 3M parameters: trained once, then read back."""
    folder = out / "decoder"
    if (folder / "config.json").exists():
        return load_decoder(folder)
    torch.manual_seed(0)
    model = new_llama(data.vocab, width=192, layers=6, heads=6, kv_heads=2, positions=2 * context)
    view = data.view(context, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.1, betas=(0.9, 0.95))
    model.train()
    for step in range(steps):
        ids = torch.as_tensor(view.batch(step, batch).tokens).long()
        factor = min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = lr * factor
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            print(f"decoder: step {step}/{steps}, loss {float(loss.detach()):.3f}", flush=True)
    model.eval().save_pretrained(folder)
    return model


def one(
    name: str, seed: int, model: Any, rows: list[Example], held: list[Example], args: argparse.Namespace
) -> dict[str, Any]:
    """Train (where there is something to train) and score one method with one seed."""
    options = dict(TRAINED.get(name, {}))
    method = options.pop("method", name)
    torch.manual_seed(seed)
    c = wrap(model, {"method": method, "seed": seed, **options})
    if name in TRAINED:
        lr = RATES.get(name, args.learning_rate)
        settings = Settings(
            steps=args.steps, batch=args.batch, micro=args.batch, learning_rate=lr, seed=seed,
            eval_steps=args.steps, eval_examples=16, save_steps=max(1, args.steps // 2),
        )  # fmt: skip
        run = args.out / "runs" / f"{name}_{seed}"
        run.mkdir(parents=True, exist_ok=True)
        log = Log(run, True, settings.steps, quiet=True)
        fit = Fit(
            c, rows, held, settings, run, log, World(), {"name": name, "seed": seed, "steps": args.steps}
        )
        fit.resume()
        with Signals(alone=True) as signals:
            if not fit.fit(signals):
                raise KeyboardInterrupt
        log.close()
        c.eval()
    # Equal bytes: every method is asked for the same ratio where it takes one; its measured bytes are in the
    # table.
    asked: dict[str, Any] = (
        {}
        if method in ("autocompressor", "variable_autocompressor", "pairs", "full", "none")
        else {"ratio": args.ratio}
    )
    batches = [collate(held[i : i + 16]) for i in range(0, len(held), 16)]
    made = ev.score(c, batches, **asked)
    r = made.recovered(seed=seed)
    return {
        "method": name, "seed": seed, "tokens": int(made.tokens.sum()),
        "losses": {v: made.loss(v) for v in made.nll}, "R": r,
        "beats": {v: made.beats(v, seed=seed) for v in ("none", "adapted_none", "shuffled", "random")},
        "kv_bytes": made.kv_bytes, "full_kv_bytes": made.full_kv_bytes, "slots": made.slots,
        "restore": ev.restore_accuracy(c, batches[0], **asked),
        "cost": ev.cost(c, batches[0], new_tokens=4, rounds=2, **asked).as_dict(),
    }  # fmt: skip


def table(out: Path) -> str:
    """The results so far as a Markdown table, best R first.

    R and nats are means over seeds; gains are nats per token of the first seed, with the lower end of their
    interval; `over none` leaves the method's adapter of the decoder on.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for file in sorted((out / "results").glob("*.json")):
        r = json.loads(file.read_text())
        found.setdefault(r["method"], []).append(r)
    lines = [
        "| method | seeds | R | 95% (first seed) | nats | none | full | over none | over shuffled "
        + "| over random | KV bytes | ratio | restored |",
        "|" + " --- |" * 13,
    ]

    def mean(rs: list[dict[str, Any]]) -> float:
        known = [r["R"][0] for r in rs if r["R"]]
        return sum(known) / len(known) if known else float("nan")

    for name, rs in sorted(found.items(), key=lambda x: -mean(x[1])):
        f = rs[0]
        interval = f"{f['R'][1]:.2f} to {f['R'][2]:.2f}" if f["R"] else "gap too small"
        over = [
            f"{f['beats'][v][0]:+.3f} ({f['beats'][v][1]:+.3f})"
            for v in ("adapted_none", "shuffled", "random")
        ]
        loss = sum(r["losses"]["compressed"] for r in rs) / len(rs)
        lines.append(
            f"| {name} | {len(rs)} | {mean(rs):.3f} | {interval} | {loss:.4f} | {f['losses']['none']:.4f} | "
            f"{f['losses']['full']:.4f} | {over[0]} | {over[1]} | {over[2]} | {f['kv_bytes']:.0f} | "
            f"{f['full_kv_bytes'] / max(f['kv_bytes'], 1):.2f} | {f['restore']:.3f} |"
        )
    return "\n".join(lines)


def plot(out: Path) -> None:
    """R against measured bytes, one point per method and seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    names = []
    for file in sorted((out / "results").glob("*.json")):
        r = json.loads(file.read_text())
        if not r["R"]:
            continue
        if r["method"] not in names:
            names.append(r["method"])
        color = f"C{names.index(r['method']) % 10}"
        label = r["method"] if r["seed"] == 0 else None
        axes.errorbar(
            r["kv_bytes"] / 1024,
            r["R"][0],
            [[r["R"][0] - r["R"][1]], [r["R"][2] - r["R"][0]]],
            fmt="o",
            color=color,
            label=label,
        )
    axes.set_xlabel("KV bytes per context, KiB")
    axes.set_ylabel("recovered fraction R")
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(out / "recovered.png", dpi=150)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--decoder", default="small", help="small (pretrained here), or a folder or name of a decoder"
    )
    p.add_argument("--data", type=Path, default=Path("data/pystdlib"))
    p.add_argument("--out", type=Path, default=Path("runs/study_compression"))
    p.add_argument("--methods", nargs="*", default=[*TRAINED, *BASELINES])
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--context", type=int, default=128)
    p.add_argument("--target", type=int, default=64)
    p.add_argument("--steps", type=int, default=400, help="of every trained method")
    p.add_argument("--pretrain-steps", type=int, default=2500)
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--learning-rate", type=float, default=5e-4)
    p.add_argument("--ratio", type=float, default=4.0)
    p.add_argument("--examples", type=int, default=128, help="held-out windows that are scored")
    args = p.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    how = Reading(context=args.context, target=args.target, samples=4000)
    prepared = (args.data / "manifest.json").is_file()
    if args.decoder == "small":
        if not prepared:
            p.error(f"{args.data}: the small decoder needs a prepared dataset (python -m dataset)")
        model = pretrain(args.out, dataset.open(args.data), 256, args.pretrain_steps)
    else:
        model = load_decoder(args.decoder)
        if prepared and dataset.open(args.data).vocab != model.config.vocab_size:
            p.error(f"{args.data}: prepared with another vocabulary than {args.decoder}'s; give a text file")
    tokenizer = None if prepared else load_tokenizer(args.decoder)
    rows, held, _ = read(str(args.data), tokenizer, how)
    held = held[: args.examples]
    (args.out / "results").mkdir(exist_ok=True)
    for seed in range(args.seeds):
        for name in args.methods:
            file = args.out / "results" / f"{name}_{seed}.json"
            if file.exists() or (seed > 0 and name in BASELINES and name != "random_eviction"):
                continue  # what draws nothing at random is the same with every seed
            print(f"{name}, seed {seed}", flush=True)
            write_json(file, one(name, seed, model, rows, held, args))
    text = table(args.out)
    (args.out / "table.md").write_text(text + "\n")
    plot(args.out)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
