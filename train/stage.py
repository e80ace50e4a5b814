"""What a run is to be, before anything happens: configuration, data, folder and source of weights.

Everything that can be refused is refused here, and nothing is written.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from pathlib import Path

import dataset
from dataset.files import DatasetError
from dataset.format import Dataset
from dataset.views import View
from model.config import load
from model.hub import PACKAGES
from model.schema import Config, ConfigError
from train import rundir, settings
from train.batches import BatchPlan
from train.errors import UserError
from train.outer import team
from train.rundir import Source
from train.world import World

DATA = Path("data/pystdlib")
RUNS = Path("runs")


@dataclass(frozen=True)
class Request:
    """What the command line asked for."""

    archs: list[str]
    sets: list[str]
    data: Path | None = None
    run: Path | None = None
    resume: bool = False
    init_from: Path | None = None
    dry_run: bool = False
    decay_now: bool = False
    profile: int = 0

    def folder(self, config: Config) -> Path:
        if self.run is None:
            return RUNS / config.name
        return self.run / config.name if len(self.archs) > 1 else self.run


@dataclass(frozen=True)
class Stage:
    """One architecture's run, checked and not yet begun.

    begun: the folder holds the run already.     saved: the checkpoint to go on from, or None.
    """

    config: Config
    data: Dataset
    view: View
    heldout: View | None
    folder: Path
    source: Source | None
    begun: bool
    saved: Path | None = None
    decay_now: bool = False


def prepare(request: Request, arch: str, world: World) -> Stage:
    """Read and check everything; nothing is written. Raises ConfigError, DatasetError or UserError."""
    config = load(arch, request.sets)
    data = open_data(request.data, config)
    view = training_view(config, data)
    config = settle(config, data, view)
    settings.check(config, world)
    folder = team.folder(request.folder(config), world)
    begun = rundir.exists(folder)
    if begun and not request.dry_run:
        rundir.check_same(folder, config, data)
        if not request.resume:
            status = rundir.status_of(folder)
            where = f"{status['status']}, step {status.get('step', 0)} of {status.get('total', '?')}"
            raise UserError(
                f"{folder}: holds this run already ({where}); go on with it by --resume, or give another "
                f"folder with --run"
            )
    saved = team.resume_from(folder)
    source = find_source(request, config, world) if saved is None else None
    if source is not None:
        data.require(identity=source.tokenizer)
    if request.decay_now:
        check_decay(config, request, source, begun)
    heldout = heldout_view(config, data)
    return Stage(config, data, view, heldout, folder, source, begun, saved, request.decay_now)


def check_decay(config: Config, request: Request, source: Source | None, begun: bool) -> None:
    """Raises UserError when there is nothing that `--decay-now` could go on with."""
    if config.schedule.kind != "wsd":
        raise UserError(f"--decay-now: schedule.kind {config.schedule.kind!r} has no decay; set it to wsd")
    if begun:
        return  # with --resume
    if request.init_from is None or source is None:
        raise UserError("--decay-now: say which run goes on, with --resume or with --init-from RUN")
    keys = ("batch", "context", "seed", "packing", "batch_warmup")
    other = [k for k in keys if getattr(source.config.run, k) != getattr(config.run, k)]
    if other:
        raise UserError(f"--decay-now: {source.path} had another {', '.join('run.' + k for k in other)}")


def open_data(path: Path | None, config: Config) -> Dataset:
    if path is None and not DATA.exists():
        tokenizer = config.embed.from_ if config.embed.from_ in PACKAGES else next(iter(PACKAGES))
        raise UserError(
            f"{DATA}: no dataset there yet; make it with\n  python -m dataset prepare --source pystdlib "
            f"--tokenizer {tokenizer} --merges 2048 --out {DATA}\nor give another one with --data"
        )
    return dataset.open(path or DATA)


def settle(config: Config, data: Dataset, view: View) -> Config:
    """Fill in what depends on the dataset: vocabulary and number of steps. Raises ConfigError."""
    run = config.run
    if run.steps is not None and run.tokens is not None:
        raise ConfigError([f"{config.name}: give run.steps or run.tokens, not both"])
    steps = run.steps
    if steps is None:
        tokens = run.tokens if run.tokens is not None else view.rows * run.context
        steps = BatchPlan(run).steps_for(tokens / run.context)  # without either: once through the data
    if config.vocab is not None:
        data.require(vocab=config.vocab)
    if config.grow.when == "plateau" and config.schedule.kind == "cosine":
        raise ConfigError(
            [f"{config.name}: grow.when: plateau needs a constant learning rate; set schedule.kind to wsd"]
        )
    return replace(config, vocab=data.vocab, run=replace(run, steps=steps, tokens=None))


def training_view(config: Config, data: Dataset) -> View:
    """The rows to train on, with the sidecar that a selection reads. Raises ConfigError, DatasetError."""
    rho, run = config.select.rho, config.run
    side = rho.ref if rho is not None else config.select.weights
    view = data.view(run.context, seed=run.seed, packing=run.packing, sidecar=side)
    want = "loss" if rho is not None else "weight"
    if side is not None and view.side_kind != want:
        raise ConfigError([f"select: sidecar {side} holds values of kind {view.side_kind!r}, want {want!r}"])
    return view


def heldout_view(config: Config, data: Dataset) -> View | None:
    """Held-out rows in an order of their own, the same for every run; None when nothing was held out."""
    try:
        return data.view(config.run.context, seed=0, split="heldout", packing=config.run.packing)
    except DatasetError:
        if config.grow.when == "plateau" or config.nowcast.every:
            raise
        return None


def find_source(request: Request, config: Config, world: World) -> Source | None:
    """The weights to start from: --init-from, else `grow.from`, else none.

    All workers start from the same; only what `--decay-now` takes over is each worker's own.
    """
    if request.init_from is not None:
        where = team.counterpart(request.init_from, world) if request.decay_now else request.init_from
        return rundir.source_of(where)
    name, folder = config.grow.from_, request.folder(config)
    if name is None:
        return None
    if Path(name).is_dir():
        return rundir.source_of(Path(name))
    run, others = rundir.latest_complete(name, [folder.parent, RUNS])
    if run is not None:
        return rundir.source_of(run)
    lines = [f"{config.name}: grow.from: no complete run of {name!r} in {folder.parent}; make it with"]
    if others:
        lines = [f"{config.name}: grow.from: the run {others[-1]} is not complete; finish it with"]
    raise UserError("\n  ".join([*lines, command_for(request, name, others[-1] if others else None)]))


def command_for(request: Request, name: str, unfinished: Path | None) -> str:
    """The command that makes (or finishes) the run that this one needs."""
    words = ["torchrun", "train/pretrain.py", "--arch", f"{name}.yaml"]
    sibling = next((a for a in request.archs if Path(a).parent != Path(".")), None)
    if sibling is not None and (Path(sibling).parent / f"{name}.yaml").is_file():
        words[3] = str(Path(sibling).parent / f"{name}.yaml")
    if request.data is not None:
        words += ["--data", str(request.data)]
    if unfinished is not None:
        words += ["--run-dir", str(unfinished), "--resume"]
    elif request.run is not None:
        root = request.run if len(request.archs) > 1 else request.run.parent
        words += ["--run-dir", str(root / name)]
    for item in request.sets:
        words += ["--set", item]
    return shlex.join(words)
