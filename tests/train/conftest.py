"""A tiny corpus and tiny models: everything here runs in seconds on one thread."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from dataset.plan import Request as PrepareRequest
from dataset.prepare import prepare
from model.schema import Config
from train.assembly import assemble
from train.hooks import Signals
from train.loop import fit
from train.session import begin
from train.stage import Request
from train.stage import prepare as prepare_stage
from train.world import World

ROOT = Path(__file__).resolve().parents[2]
PRETRAIN = ROOT / "train" / "pretrain.py"

TINY = """
dim: 32
stack: [{repeat: 2, of: [{attention: {head_dim: 16, group: 1}}, {mlp: {mult: 2, multiple_of: 8}}]}]
heads: {recon: {shift: 0, weight: 0.5}, next: {shift: 1}}
run: {steps: 12, batch: 4, micro: 2, context: 32, precision: fp32, eval_every: 4, eval_tokens: 256,
      save_every: 4, log_every: 3}
optim: {lr: 1e-2}
"""

ONION = """
dim: 32
stack:
  - onion:
      - {name: s1, body: [mlp], to: 8, quant: int8}
heads: {recon: {shift: 0}, next: {shift: 1}}
run: {steps: 8, batch: 4, context: 32, precision: fp32, eval_every: 4, eval_tokens: 256,
      save_every: 4, log_every: 4}
"""

ONION2 = """
extends: small1.yaml
grow: {from: small1, head_lr: 0.5}
stack:
  - onion:
      - {name: s1, body: [mlp], to: 8, quant: int8, frozen: true}
      - {name: s2, body: [mlp], to: 8, quant: int8, blend: {steps: 4}}
"""


def write_texts(folder: Path) -> None:
    """60 small documents of words, so that rows of 32 bytes hold several."""
    rng = np.random.default_rng(0)
    words = ["def", "return", "self", "yield", "x = 1\n", "naïve", "for i in range(n):\n    "]
    for i in range(60):
        (folder / f"{i:03d}.txt").write_text(" ".join(rng.choice(words, int(rng.integers(2, 60)))))


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    write_texts(folder)
    return folder


MIXED = """
extends: tiny.yaml
defaults:
  mamba2: {state: 8, head_dim: 16}
  swa: {head_dim: 16, group: 1, window: 8}
stack:
  - onion:
      - {name: s1, body: [samba], to: 16, quant: int8, frozen: true}
      - {name: s2, body: [samba], to: 16, quant: {fsq: {levels: 8}}}
"""


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory, text_folder: Path) -> Path:
    out = tmp_path_factory.mktemp("data") / "bytes"
    prepare(PrepareRequest(sources=(str(text_folder),), tokenizer="bytes", heldout=0.2), out)
    return out


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A working folder with the tiny architectures in it."""
    (tmp_path / "tiny.yaml").write_text(TINY)
    (tmp_path / "mixed.yaml").write_text(MIXED)
    (tmp_path / "small1.yaml").write_text(ONION)
    (tmp_path / "small2.yaml").write_text(ONION2)
    return tmp_path


class Fit:
    """One run in this process: its stage, state, log lines."""

    def __init__(self, request: Request, stop_after: int | None = None) -> None:
        from train.hooks import RunHooks
        from train.metrics import Log, read

        world = World()
        self.stage = prepare_stage(request, request.archs[0], world)
        self.state, self.growth = assemble(self.stage, world)
        begin(self.stage, self.state)
        log = Log(self.stage.folder, True, self.state.schedule.total)
        signals = Signals(alone=True)
        hooks = RunHooks(self.stage.folder, self.config, self.stage.heldout, log, world, signals, peak=1e9)
        from train.feed import Feed

        feed = Feed(self.stage.view, self.config.run, world)
        after = hooks.after_step

        def stop_there(state, result) -> None:
            after(state, result)
            if state.step == stop_after:
                signals.caught = 15

        hooks.after_step = stop_there  # type: ignore[method-assign]
        if self.state.step == 0:
            hooks.save(self.state)  # as `session.train` does
        self.finished = fit(self.state, feed, hooks, self.config, world)
        feed.close()
        log.close()
        self.records = list(read(self.stage.folder))

    @property
    def config(self) -> Config:
        return self.stage.config

    def tensors(self) -> dict[str, torch.Tensor]:
        """Parameters and optimizer moments by name."""
        out = {f"model/{n}": t.clone() for n, t in self.state.model_tensors().items()}
        for name, moments in self.state.state_dict()["optimizer"].items():
            kept = {k: torch.as_tensor(v) for k, v in moments.items() if v is not None}
            out |= {f"optim/{name}/{k}": v.clone() for k, v in kept.items()}
        return out

    def losses(self) -> list[tuple]:
        """What was logged about the losses, in order: no clock in it."""
        keys = ("kind", "step", "tokens", "loss", "losses", "bpb", "grad_norm", "lr", "stats")
        return [tuple(repr(r.get(k)) for k in keys) for r in self.records if r["kind"] in ("train", "eval")]


@pytest.fixture
def request_of(place: Path, data: Path) -> Callable[..., Request]:
    def make(run: str, *sets: str, arch: str = "tiny", resume: bool = False, **rest) -> Request:
        return Request([str(place / f"{arch}.yaml")], list(sets), data, place / run, resume, **rest)

    return make


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Bit equality of two sets of named tensors."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def command(
    *words: object, cwd: Path, ranks: int = 0, timeout: float = 1800, script: Path = PRETRAIN
) -> subprocess.CompletedProcess[str]:
    """Run `train/pretrain.py` as a user would; ranks > 0: under torchrun."""
    launcher = [sys.executable]
    if ranks:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    full = [*launcher, str(script), *map(str, words)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(full, cwd=cwd, env=environment(), start_new_session=True, **pipes)
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)  # torchrun passes it on to its workers
        out, err = process.communicate(timeout=60)
        pytest.fail(f"{full} did not end in {timeout} s:\n{out}\n{err}")
    return subprocess.CompletedProcess(full, process.returncode, out, err)


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}
