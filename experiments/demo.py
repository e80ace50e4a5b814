"""`make demo`: grow an onion in three stages on the Python sources, and say how good it became.

It types the project's own commands, one after another, and can be stopped and started again. It ends in
runs/demo/README.md: losses, code usage, speed, sample text, and the held-out bits per byte beside those
of an order-2 byte model of the same training bytes and of xz.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import dataset
from dataset.files import write_bytes
from experiments.byte_baselines import order_n_bits, xz_bits
from experiments.commands import ROOT, ensure_data, pretrain, run
from train.metrics import read

STAGES = ("onion_stage1", "onion_stage2", "onion_stage3")
OUT = Path("runs/demo")


def split_bytes(data: dataset.Dataset, name: str) -> bytes:
    """The text of a split, documents joined."""
    decode = data.tokenizer.decode
    return "".join(decode(ids[ids != data.eos_id].tolist()) for ids in data.splits[name]).encode()


def summary(folders: list[Path], data: dataset.Dataset) -> dict[str, float]:
    """The figures that the demo is judged by, from the runs' evaluations and records."""
    first, last = (
        json.loads((f / "evaluation.json").read_text())["heads"] for f in (folders[0], folders[-1])
    )
    stats = [r for r in read(folders[-1]) if r["kind"] == "eval"][-1]["stats"]
    train, heldout = split_bytes(data, "train"), split_bytes(data, "heldout")
    return {
        "onion_bits_per_byte": last["next"]["bits_per_byte"],
        "stage1_bits_per_byte": first["next"]["bits_per_byte"],
        "order2_bits_per_byte": order_n_bits(train, heldout),
        "xz_bits_per_byte": xz_bits(heldout),
        "stage1_reconstruction_top1": first["recon"]["top1"],
        "least_code_usage": min(v for name, v in stats.items() if name.endswith("/usage")),
    }


def page(figures: dict[str, float]) -> str:
    """The table that stands above the report's plots."""
    rows = [
        ("onion, three stages: held-out bits per byte", f"{figures['onion_bits_per_byte']:.3f}"),
        ("onion, first stage", f"{figures['stage1_bits_per_byte']:.3f}"),
        ("order-2 byte model of the same training bytes", f"{figures['order2_bits_per_byte']:.3f}"),
        ("xz -9e of the held-out text", f"{figures['xz_bits_per_byte']:.3f}"),
        ("stage 1: tokens reconstructed first choice", f"{figures['stage1_reconstruction_top1']:.1%}"),
        ("least code usage of a quantizer", f"{figures['least_code_usage']:.1%}"),
    ]
    lines = ["# What `make demo` made", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in rows]
    return "\n".join(lines) + "\n\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.demo", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="passed on to training"
    )
    args = parser.parse_args()
    data = dataset.open(ensure_data())
    pretrain([f"{name}.yaml" for name in STAGES], sets=args.set)
    folders = [ROOT / "runs" / name for name in STAGES]
    run("-m", "train", "report", *[f.relative_to(ROOT) for f in folders], "--out", OUT)
    for folder in (folders[0], folders[-1]):
        run("train/evaluate.py", folder.relative_to(ROOT), "--tokens", "65536")
    figures = summary(folders, data)
    report = ROOT / OUT / "README.md"
    write_bytes(report, (page(figures) + report.read_text()).encode())
    write_bytes(ROOT / OUT / "figures.json", f"{json.dumps(figures, indent=1)}\n".encode())
    print("\n" + page(figures) + f"the page: {OUT / 'README.md'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
