"""Every arch of model/archs learns: `make test-slow AREA=archs`.

Each is trained by the real command for 100 steps of 1024 bytes of Python source, 192 wide and one round of
every `repeat`; a grown stage starts from its trained predecessor. Its loss must end well below what the
frequencies of bytes alone allow.
"""

from __future__ import annotations

import json
import os
import sysconfig
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import model
from dataset import open as open_dataset
from dataset.__main__ import main as dataset_main
from model import config as configs
from model.config.sources import ARCHS
from model.schema import Config, EmbedConfig, RepeatNode
from train import pretrain

pytestmark = pytest.mark.slow
STEPS, ROWS, CONTEXT, DIM = 100, 8, 128, 192
MARGIN = 0.5  # nats below the entropy of single bytes
NAMES = sorted(path.stem for path in ARCHS.glob("*.yaml"))
TEXTS = (
    "argparse",
    "typing",
    "inspect",
    "tarfile",
    "doctest",
    "mailbox",
    "zipfile",
    "pickletools",
    "optparse",
)


def small(config: Config) -> Config:
    """The same architecture 192 wide over bytes, one round of every `repeat` (two where weights are tied)."""
    sets = {
        "steps": STEPS,
        "tokens": None,
        "batch": ROWS,
        "micro": None,
        "context": CONTEXT,
        "precision": "fp32",
    }
    sets |= {"eval_every": 0, "save_every": 0, "log_every": 10}
    return replace(
        _shorter(config),
        dim=DIM,
        vocab=None,
        embed=EmbedConfig(),
        run=replace(config.run, **sets),
        optim=replace(config.optim, lr=3e-3),
        schedule=replace(config.schedule, kind="constant", warmup=10),
        grow=replace(config.grow, when="step"),
    )


def _shorter(node: Any) -> Any:
    if isinstance(node, RepeatNode):
        node = replace(node, repeat=2 if node.tied else 1)
    if isinstance(node, list):
        return [_shorter(x) for x in node]
    if is_dataclass(node) and not isinstance(node, type):
        lists = {f.name: getattr(node, f.name) for f in fields(node)}
        changed = {k: _shorter(v) for k, v in lists.items() if isinstance(v, list) or is_dataclass(v)}
        return replace(node, **changed)
    return node


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shrunken archs and a dataset of the interpreter's own sources."""
    folder = tmp_path_factory.mktemp("archs")
    (folder / "texts").mkdir()
    for name in TEXTS:
        source = Path(sysconfig.get_paths()["stdlib"]) / f"{name}.py"
        (folder / "texts" / f"{name}.txt").write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    words = [
        "prepare",
        "--source",
        str(folder / "texts"),
        "--tokenizer",
        "bytes",
        "--out",
        str(folder / "data"),
    ]
    assert dataset_main(words) == 0
    for name in NAMES:
        (folder / f"{name}.yaml").write_text(configs.dumps(small(configs.load(name, search=[ARCHS]))))
    return folder


@pytest.fixture(scope="module")
def unigram(here: Path) -> float:
    """Entropy of single bytes, in nats."""
    view = open_dataset(here / "data").view(context=CONTEXT, seed=0)
    counts = np.bincount(np.asarray(view.batch(0, 256).tokens).ravel(), minlength=260)
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


def train(here: Path, name: str) -> dict[str, float]:
    """{head: mean loss of the last logged steps}; the run is made once, after the one it grows from."""
    run = here / "runs" / name
    if not (run / "metrics.jsonl").exists():
        parent = configs.load(here / f"{name}.yaml").grow.from_
        if parent is not None:
            train(here, parent)
        torch.manual_seed(0)
        words = ["--arch", f"{name}.yaml", "--data", str(here / "data"), "--run", str(run)]
        assert pretrain.main(words) == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line["losses"] for line in lines if line["kind"] == "train"]
    return {head: float(np.mean([s[head] for s in steps[-2:]])) for head in steps[-1]}


@pytest.mark.parametrize("name", NAMES)
def test_archs_learn_real_text(name: str, here: Path, unigram: float, monkeypatch: Any) -> None:
    monkeypatch.chdir(here)
    losses = train(here, name)
    report = os.environ.get("LATENT_LAB_ARCHS_REPORT")
    if report:
        parameters = sum(p.numel() for p in model.load(here / "runs" / name).parameters())
        with open(report, "a", encoding="utf-8") as file:
            file.write(
                json.dumps({"arch": name, "parameters": parameters, "unigram": unigram, **losses}) + "\n"
            )
    assert losses["next"] < unigram - MARGIN
