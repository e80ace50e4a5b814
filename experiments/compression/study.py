"""`make study-compression`: what survives compression, at equal bytes? Every method and its baselines.

    python -m experiments.compression.study                                    the small decoder, 3 seeds
    python -m experiments.compression.study --decoder smollm2-135m-instruct    real weights, one seed

The small decoder is pretrained here, by train/pretrain.py; each method is trained around it for the same
number of steps, and all are scored on the same held-out windows. Each (arm, seed) is one JSON file under the
output folder, and a training in progress has checkpoints: a second call goes on where the first stopped.
The summary is written beside this file: NAME.md, NAME.json and NAME.png.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dataset
from dataset.files import write_json
from experiments.commands import ROOT, ensure_data, run
from experiments.compression import report
from experiments.compression.arms import MATCHED, VARIABLE, Arm, Effort, arms, bounds, fitted, run_arm
from experiments.compression.decoder import ARCH, pretrained
from model.compress import load_decoder, load_tokenizer
from model.compress.decoder import PACKAGED
from train.compress_data import Example, Reading, read

HERE = Path(__file__).resolve().parent
SMALL = Effort(steps=100, batch=8, micro=8, rate=2e-3, examples=128, oracle_steps=25)
REAL = Effort(steps=100, batch=2, micro=2, rate=5e-4, examples=32, oracle_steps=10)


@dataclass(frozen=True)
class Study:
    """A command line, settled."""

    name: str
    decoder: str
    data: Path
    out: Path
    effort: Effort
    seeds: int
    context: int
    target: int
    ratio: float
    ratios: tuple[float, ...]
    pretrain_steps: int
    only: tuple[str, ...]


def parse(argv: Sequence[str] | None = None) -> Study:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--decoder", default="small", help=f"small (pretrained here), {PACKAGED}, or a folder")
    p.add_argument("--data", type=Path, default=None, help="prepared with the decoder's tokenizer")
    p.add_argument("--out", type=Path, default=Path("runs/study-compression"))
    p.add_argument("--arms", nargs="*", default=(), help="names as in the table; all by default")
    p.add_argument("--seeds", type=int, default=None, help="3, or 1 for a decoder that is given")
    p.add_argument("--steps", type=int, default=None, help="of every trained arm (100)")
    p.add_argument("--batch", type=int, default=None, help="examples a step (8, or 2)")
    p.add_argument("--learning-rate", type=float, default=None, help="of slots and adapters (2e-3, or 5e-4)")
    p.add_argument("--examples", type=int, default=None, help="held-out windows that are scored (128, or 32)")
    p.add_argument("--context", type=int, default=128)
    p.add_argument("--target", type=int, default=64)
    p.add_argument("--ratio", type=float, default=4.0, help="source tokens per slot")
    p.add_argument("--ratios", type=float, nargs="*", default=(2.0, 8.0), help="also, where nothing trains")
    p.add_argument("--pretrain-steps", type=int, default=480, help="of the small decoder, 4,096 tokens each")
    args = p.parse_args(argv)
    small = args.decoder == "small"
    name = "small" if small else Path(args.decoder).name
    base = SMALL if small else REAL
    batch = args.batch or base.batch
    effort = Effort(
        args.steps or base.steps, batch, batch, args.learning_rate or base.rate,
        args.examples or base.examples, base.oracle_steps,
    )  # fmt: skip
    data = args.data or Path("data/pystdlib" if small else f"data/pystdlib-{name}")
    ratios = tuple(args.ratios) if small else ()
    return Study(
        name, args.decoder, data, args.out / name, effort, args.seeds or (3 if small else 1), args.context,
        args.target, args.ratio, ratios, args.pretrain_steps, tuple(args.arms),
    )  # fmt: skip


def prepare(study: Study) -> tuple[Any, Any, list[Example], list[Example]]:
    """The decoder, its tokenizer (None for the small one), training and held-out windows."""
    if not (ROOT / study.data / "manifest.json").is_file():
        if study.decoder == "small":
            ensure_data()
        else:
            run("-m", "dataset", "prepare", "--source", "pystdlib", "--tokenizer", study.decoder,
                "--out", study.data)  # fmt: skip
    data = dataset.open(ROOT / study.data)
    if study.decoder == "small":
        model, tokenizer = pretrained(study.out, study.data, study.pretrain_steps), None
    else:
        model, tokenizer = load_decoder(study.decoder), load_tokenizer(study.decoder)
        if data.vocab > model.config.vocab_size:
            raise SystemExit(
                f"{study.data}: vocabulary {data.vocab}, the decoder has {model.config.vocab_size}"
            )
    how = Reading(context=study.context, target=study.target, samples=4000)
    rows, held, _ = read(str(ROOT / study.data), None, how)
    return model, tokenizer, rows, held[: study.effort.examples]


def refuse_others(study: Study) -> None:
    """One folder, one study: results of another decoder or effort would stand in one table with these.

    Raises SystemExit that says what differs.
    """
    arch = ARCH.read_text(encoding="utf-8") if study.decoder == "small" else study.decoder
    mine = {
        "decoder": arch, "pretrain_steps": study.pretrain_steps, "context": study.context,
        "target": study.target, "ratio": study.ratio, "data": str(study.data), **vars(study.effort),
    }  # fmt: skip
    file = study.out / "study.json"
    if file.exists() or any((study.out / "results").glob("*.json")):
        made = json.loads(file.read_text()) if file.exists() else {}
        if other := [key for key in mine if made.get(key) != mine[key]]:
            raise SystemExit(
                f"{study.out}: its results were made with another {', '.join(other)}; "
                "give --out another folder, or move this one away"
            )
    write_json(file, mine)


def result_file(study: Study, name: str, seed: int) -> Path:
    return study.out / "results" / f"{name}_{seed}.json"


def todo(study: Study) -> list[tuple[Arm, int]]:
    """What has no result yet, seed by seed. What draws nothing at random is scored once."""
    every = arms(study.effort, study.ratio, study.ratios, study.context)
    unknown = set(study.only) - {a.name for a in every}
    if unknown:
        raise SystemExit(f"no arm {', '.join(sorted(unknown))}; there are {', '.join(a.name for a in every)}")
    chosen = [a for a in every if not study.only or a.name in study.only]
    return [
        (arm, seed)
        for seed in range(study.seeds)
        for arm in chosen
        if (seed == 0 or arm.random) and not result_file(study, arm.name, seed).exists()
    ]


def main(argv: Sequence[str] | None = None, summary: Path = HERE) -> int:
    study = parse(argv)
    left = todo(study)
    (study.out / "results").mkdir(parents=True, exist_ok=True)
    refuse_others(study)
    if left:
        model, tokenizer, rows, held = prepare(study)
        ends = bounds(model, held)
    for arm, seed in left:
        variable = result_file(study, VARIABLE, seed)
        if arm.name == MATCHED and not variable.exists():
            print(f"{arm.name}, seed {seed}: needs {VARIABLE} first, left out", flush=True)
            continue
        settled = fitted(arm, json.loads(variable.read_text()) if variable.exists() else None, study.context)
        made = run_arm(settled, seed, model, rows, held, study.effort, study.out / "runs", ends, tokenizer)
        write_json(result_file(study, arm.name, seed), made)
        R = "gap too small" if made["R"] is None else f"R {made['R'][0]:.3f}"
        cpu = made["train_cpu_s"] + made["score_cpu_s"]
        print(f"{arm.name}, seed {seed}: {R}, {cpu:.0f} CPU seconds", flush=True)
    results = report.load(study.out / "results")
    text = report.write(results, summary / study.name, study.ratio)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
