"""From a command line to a running fit: configuration, data, folder, weights, optimizer, loop.

Everything that can be refused is refused before anything is written.
"""

from __future__ import annotations

import math
import shlex
import sys
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import dataset
import model
from dataset.files import DatasetError, read_json
from dataset.format import Dataset
from dataset.views import View
from model import grow
from model.config import arch_digest, load
from model.hub import PACKAGES
from model.lm import LanguageModel
from model.ops.allocator import keep_freed_memory
from model.schema import Config, ConfigError
from train import checkpoint, optim, outer, rundir
from train.errors import EXIT_DIVERGED, EXIT_USER, Diverged, UserError, is_disk_full
from train.feed import Feed, micro_rows
from train.hooks import RunHooks, Signals
from train.loop import fit
from train.metrics import Log, peak_flops, rewind
from train.plateau import Plateau
from train.rundir import Source
from train.schedule import Schedule
from train.state import TrainState, load_model
from train.world import World, autocast, joined

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

    def folder(self, config: Config) -> Path:
        if self.run is None:
            return RUNS / config.name
        return self.run / config.name if len(self.archs) > 1 else self.run


@dataclass(frozen=True)
class Stage:
    """One architecture's run, checked and not yet begun."""

    config: Config
    data: Dataset
    view: View
    heldout: View | None
    folder: Path
    source: Source | None
    begun: bool


def run_all(request: Request) -> int:
    """Train every architecture in turn; returns the exit code (see `train.errors`)."""
    keep_freed_memory()
    with ExitStack() as stack:
        try:
            world = stack.enter_context(joined())
            signals = stack.enter_context(Signals(alone=world.size == 1))
            for arch in request.archs:
                if code := run_stage(request, arch, world, signals):
                    return code
            return 0
        except (UserError, ConfigError, DatasetError) as error:
            return _complain(str(error), EXIT_USER)
        except Diverged as error:
            return _complain(str(error), EXIT_DIVERGED)
        except KeyboardInterrupt:
            return _complain("interrupted before the step was saved; go on with --resume", 130)
        except OSError as error:
            if is_disk_full(error):
                return _complain(f"no space left on the disk ({error})", EXIT_USER)
            raise


def _complain(message: str, code: int) -> int:
    from os import environ

    if environ.get("RANK", "0") == "0":
        print(f"error: {message}", file=sys.stderr, flush=True)
    return code


def run_stage(request: Request, arch: str, world: World, signals: Signals) -> int:
    """One run from its first step, or from its newest checkpoint, to its end. Returns the exit code."""
    stage = prepare(request, arch, world)
    if request.dry_run:
        from train.dryrun import dry_run

        return dry_run(stage, world)
    if stage.begun and rundir.status_of(stage.folder)["status"] == "complete":
        if world.main:
            print(f"{stage.folder}: already complete")
        return 0
    state, growth = assemble(stage, world)
    with ExitStack() as stack:
        if world.main:
            stack.enter_context(rundir.locked(stage.folder))
        world.on_main(lambda: begin(stage, state))
        log = Log(stage.folder, world.main, state.schedule.total, stage.config.wandb)
        stack.callback(log.close)
        announce(stage, state, growth, log)
        return train(stage, state, log, world, signals)


# ----------------------------------------------------------------------------- checks


def prepare(request: Request, arch: str, world: World) -> Stage:
    """Read and check everything; nothing is written. Raises ConfigError, DatasetError or UserError."""
    config = load(arch, request.sets)
    data = open_data(request.data, config)
    view = data.view(config.run.context, seed=config.run.seed)
    config = settle(config, data, view)
    micro_rows(config.run, world)  # refuses a batch that does not divide among the ranks
    folder = request.folder(config)
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
    source = None
    if not begun or checkpoint.newest(folder)[0] is None:
        source = find_source(request, config, folder)
    if source is not None:
        data.require(identity=source.tokenizer)
    return Stage(config, data, view, heldout_view(config, data), folder, source, begun)


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
        steps = math.ceil(tokens / (run.batch * run.context))  # without either: once through the data
    if config.vocab is not None:
        data.require(vocab=config.vocab)
    if config.grow.when == "plateau" and config.schedule.kind == "cosine":
        raise ConfigError(
            [f"{config.name}: grow.when: plateau needs a constant learning rate; set schedule.kind to wsd"]
        )
    return replace(config, vocab=data.vocab, run=replace(run, steps=steps, tokens=None))


def heldout_view(config: Config, data: Dataset) -> View | None:
    """Held-out rows in an order of their own, the same for every run; None when nothing was held out."""
    try:
        return data.view(config.run.context, seed=0, split="heldout")
    except DatasetError:
        if config.grow.when == "plateau":
            raise
        return None


def find_source(request: Request, config: Config, folder: Path) -> Source | None:
    """The weights to start from: --init-from, else `grow.from`, else none."""
    if request.init_from is not None:
        return rundir.source_of(request.init_from)
    name = config.grow.from_
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


# ----------------------------------------------------------------------------- building


def assemble(stage: Stage, world: World) -> tuple[TrainState, grow.Growth | None]:
    """Model, weights, optimizer and counters, as of the newest checkpoint or of the source."""
    config = stage.config
    torch.manual_seed(config.run.seed)
    saved = checkpoint.newest(stage.folder)[0] if stage.begun else None
    loaded = checkpoint.load(saved) if saved is not None else None
    lm = model.build(config, vocab=stage.data.vocab, rows=stage.data.tokenizer.rows)
    growth, scales, origin = None, {}, 0
    if loaded is None and stage.source is not None:
        growth = take_weights(lm, stage.source)
        scales = head_scales(config, growth)
        origin = tokens_behind(stage.source)
    elif loaded is not None:
        scales = rundir.about_of(stage.folder)["origin"].get("lr_scales", {})
    lm.to(world.device)
    if config.run.compile:
        lm.compile_blocks()
    assert config.run.steps is not None  # settled
    optimizer = optim.build(lm, config.optim, lm.no_decay(), scales)
    trainable = sum(p.numel() for p in optim.parameters(optimizer))
    state = TrainState(
        lm,
        world.parallel(lm),
        optimizer,
        Schedule(config.schedule, config.run.steps),
        Plateau.of(config.grow, trainable),
        outer.make(config.outer),
        origin=origin,
    )
    if loaded is not None:
        state.load(loaded)
    return state, growth


def take_weights(lm: LanguageModel, source: Source) -> grow.Growth | None:
    """The same architecture's weights as they are; a smaller one's by growth. Raises ConfigError."""
    tensors = checkpoint.load_tensors(source.path)
    if arch_digest(source.config) == arch_digest(lm.config):
        load_model(lm, tensors, str(source.path))
        return None
    return grow.load_into(lm, source.config, tensors)


def head_scales(config: Config, growth: grow.Growth | None) -> dict[str, float]:
    """Loaded heads learn at `grow.head_lr` times the rate: they are trained already."""
    if growth is None or config.grow.head_lr == 1.0:
        return {}
    return {name: config.grow.head_lr for name in growth.loaded if name.startswith("heads.")}


def tokens_behind(source: Source) -> int:
    counters = read_json(source.path / checkpoint.REST).get("counters", {})
    return int(counters.get("tokens", 0)) + int(counters.get("origin", 0))


# ----------------------------------------------------------------------------- running


def begin(stage: Stage, state: TrainState) -> None:
    """Make the folder, or bring it back to where the checkpoint stands. On rank 0."""
    checkpoint.tidy(stage.folder)
    first = not stage.begun
    if first:
        origin: dict[str, Any] = {"from": None, "tokens": state.origin}
        if stage.source is not None:
            origin["from"] = str(stage.source.path)
        scales = {n: g["lr_scale"] for g in state.optimizer.param_groups for n in g["names"]}
        origin["lr_scales"] = {n: s for n, s in scales.items() if s != 1.0}
        rundir.create(stage.folder, stage.config, stage.data, origin, sys.argv)
    has_checkpoint = checkpoint.newest(stage.folder)[0] is not None
    rewind(stage.folder, state.step if has_checkpoint else None)
    rundir.set_status(stage.folder, "running", step=state.step, total=state.schedule.total)


def announce(stage: Stage, state: TrainState, growth: grow.Growth | None, log: Log) -> None:
    """Say what starts, from what, before any training."""
    parameters = sum(p.numel() for p in state.model.parameters())
    trained = sum(p.numel() for p in optim.parameters(state.optimizer))
    log.say(
        f"{stage.config.name}: {parameters:,} parameters, {trained:,} trained; data {stage.data.path} "
        f"({stage.data.vocab:,} ids); run {stage.folder}"
    )
    if stage.begun:
        log.say(f"resumed at step {state.step} of {state.schedule.total}")
        log.write("event", state.step, event="resume", total=state.schedule.total)
        return
    origin = str(stage.source.path) if stage.source is not None else None
    log.write(
        "event",
        0,
        event="start",
        name=stage.config.name,
        origin=state.origin,
        source=origin,
        total=state.schedule.total,
    )
    if origin is not None:
        log.say(f"weights from {origin}, which had seen {state.origin:,} tokens")
    if growth is not None:
        for line in growth.lines():
            log.say(f"  {line}")
        log.write("event", 0, event="grown", loaded=growth.loaded, fresh=growth.fresh, frozen=growth.frozen)


def train(stage: Stage, state: TrainState, log: Log, world: World, signals: Signals) -> int:
    """Fit, with the folder's status kept true. Returns the exit code."""
    config = stage.config
    peak = float(
        world.sum(torch.tensor([peak_flops(world.device, config.run.precision)], device=world.device))
    )
    hooks = RunHooks(stage.folder, config, stage.heldout, log, world, signals, peak)
    feed = Feed(stage.view, config.run, world)
    where: Any = lambda: {"step": state.step, "total": state.schedule.total, "tokens": state.tokens}  # noqa: E731
    try:
        if state.step == 0:
            hooks.save(state)  # a full disk shows before hours of work, and growth has its starting point
        finished = fit(state, feed, hooks, config, world)
    except Diverged:
        world.on_main(lambda: rundir.set_status(stage.folder, "diverged", **where()))
        raise
    finally:
        feed.close()
    if finished:
        sample(stage, state, log, world)
    event = "done" if finished else "stop"
    log.write("event", state.step, event=event, signal=signals.caught)
    world.on_main(lambda: rundir.set_status(stage.folder, "complete" if finished else "stopped", **where()))
    if finished:
        log.say(f"{stage.folder}: complete after {state.step} steps, {state.tokens:,} tokens")
        return 0
    log.say(f"{stage.folder}: stopped and saved at step {state.step}; go on with --resume")
    return 128 + (signals.caught or 15)


def sample(stage: Stage, state: TrainState, log: Log, world: World, new: int = 120) -> None:
    """A continuation of the first held-out text, for the report."""
    if stage.heldout is None or not world.main:
        return
    prompt = stage.heldout.batch(0, 1).tokens[:, : min(32, stage.config.run.context)].to(world.device)
    with autocast(world.device, stage.config.run.precision):
        out = state.model.generate(prompt, max_new_tokens=new, temperature=0.8, top_p=0.95, seed=0)
    ids = out[0].tolist()
    decode, cut = stage.data.tokenizer.decode, prompt.shape[1]
    log.write("sample", state.step, tokens=state.tokens, prompt=decode(ids[:cut]), text=decode(ids[cut:]))
