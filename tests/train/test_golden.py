"""Golden losses: 20 fp32 steps of small versions of the shipped architectures.

A change here means that training computes something else than before. If that is meant, write the file anew
and say why in the commit:  python -m tests.train.test_golden
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest

from dataset.plan import Request as PrepareRequest
from dataset.prepare import prepare as prepare_data
from tests.train.conftest import write_texts
from train.assembly import assemble
from train.feed import Feed
from train.loop import train_step
from train.stage import Request, prepare
from train.world import World

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "losses.json"
STEPS = 20
SMALL = [
    "dim=48",
    f"run={{steps: {STEPS}, batch: 4, micro: 2, context: 48, precision: fp32}}",
    "optim.lr=4e-3",
    "schedule.warmup=2",
]
SAMBA = [
    "defaults.mamba2={state: 16, head_dim: 16}",
    "defaults.swa={head_dim: 16, group: 3, window: 16}",
    "defaults.mlp.multiple_of=8",
]
ONION = [*SAMBA, "embed={from: null, project: null, frozen: false}", "grow.from=null"]
CASES = {
    "llama": ["stack.0.repeat=2", "defaults.attention.head_dim=16", "defaults.mlp.multiple_of=8"],
    "mamba2": ["stack.0.repeat=2", "defaults.mamba2={state: 16, head_dim: 16}"],
    "samba": ["stack.0.repeat=1", *SAMBA],
    "onion_stage1": ONION,
    "onion_stage3": [*ONION, "stack.0.onion.s3.blend={steps: 10}"],
    "onion_open": ONION,
}


def losses(arch: str, data: Path) -> list[float]:
    """Training loss of every step; nothing is written."""
    world = World()
    request = Request([arch], [*SMALL, *CASES[arch]], data, Path("never-made"))
    stage = prepare(request, arch, world)
    state, _ = assemble(stage, world)
    # In stored order: the shuffle is keyed by the dataset's id, in which the name of its folder counts.
    feed = Feed(stage.data.view(stage.config.run.context, shuffle=False), stage.config.run, world)
    try:
        return [train_step(state, feed.micros(s), stage.config, world).loss for s in range(STEPS)]
    finally:
        feed.close()


@pytest.mark.parametrize("arch", CASES)
def test_golden_losses(arch, data, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    golden = json.loads(GOLDEN.read_text())[arch]
    # Other processors round otherwise, and 20 steps carry that on; a change of the mathematics shows earlier.
    found = losses(arch, data)
    assert found == pytest.approx(golden, rel=2e-3)
    assert found[:3] == pytest.approx(golden[:3], rel=1e-5)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        texts, data = Path(folder, "text"), Path(folder, "data")
        texts.mkdir()
        write_texts(texts)
        prepare_data(PrepareRequest(sources=(str(texts),), tokenizer="bytes", heldout=0.2), data)
        found = {arch: losses(arch, data) for arch in CASES}
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
    for arch, values in found.items():
        print(f"{arch:14} {values[0]:.5f} -> {values[-1]:.5f}")


if __name__ == "__main__":
    main()
