"""`python -m experiments run SWEEP.yaml`: train what is not trained yet, measure it, and write it down.

Safe to kill at any moment: a run that was begun is resumed, one that is done is left alone, and a summary is
written when its run is measured. `--part I/N` does every N-th run, so that machines can share a sweep.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import dataset
import model
from dataset.files import DatasetError, write_bytes
from dataset.format import Dataset
from experiments import summary
from experiments.commands import ROOT
from experiments.commands import run as command
from experiments.summary import short
from experiments.sweep import Run, Sweep
from model.config import dumps
from model.describe import describe
from model.lm import LanguageModel
from model.schema import Config
from train import rundir
from train.errors import EXIT_DIVERGED, EXIT_INTERRUPTED, EXIT_TERMINATED, UserError
from train.evaluate import evaluate
from train.world import autocast

RUNS = Path("runs/sweeps")
PROBE_STEPS = 8  # steps that a budget in seconds is measured on


@dataclass(frozen=True)
class Options:
    """only: cases to run, none: all.  part: (I, N).  out: where run folders go."""

    only: Sequence[str] = ()
    part: tuple[int, int] = (0, 1)
    out: Path | None = None


def run_sweep(sweep: Sweep, options: Options, console: Console) -> None:
    """Everything that is left to do. Raises UserError, ConfigError or DatasetError."""
    summary.refuse_changed(sweep)
    todo = chosen(sweep, options)
    root = (options.out or ROOT / RUNS / sweep.name).resolve()
    have = summary.read(summary.file_of(sweep))
    done = [any(is_of(line, run, sweep) for line in have) for run in todo]
    if not all(done):
        prepare(sweep, [run.data for run, is_done in zip(todo, done) if not is_done])
    for i, (run, is_done) in enumerate(zip(todo, done)):
        head = f"[{i + 1}/{len(todo)}] {run.label}"
        if is_done:
            console.print(f"{head}: done", highlight=False, markup=False)
            continue
        console.print(head, highlight=False, markup=False)
        one(sweep, run, root)


def chosen(sweep: Sweep, options: Options) -> list[Run]:
    """The runs that this call is about. Raises UserError for a case that does not exist."""
    for name in options.only:
        if name not in sweep.cases:
            raise UserError(f"--only {name}: no such case; there are {', '.join(sweep.cases)}")
    index, parts = options.part
    clocks = [k for k in ("seconds", "cpu_seconds") if vars(sweep.spec.budget)[k] is not None]
    if parts > 1 and clocks:
        raise UserError(
            f"--part: {sweep.path} has a budget in {clocks[0]}, which becomes tokens at one machine's speed; "
            "run it on one machine, or change it to tokens or flops"
        )
    number = {sweep.key(run): n for n, run in enumerate(sweep.runs)}
    # what starts from another run is in that run's part, where its folder is
    mine = [run for run in sweep.runs if number[sweep.key(run.after or run)] % parts == index]
    return [run for run in mine if not options.only or run.case in options.only]


def is_of(line: summary.Line, run: Run, sweep: Sweep) -> bool:
    return summary.place(line) == ("run", run.data, run.case, run.seed) and line["digest"] == sweep.key(run)


# ----------------------------------------------------------------------------- one run


def one(sweep: Sweep, run: Run, root: Path) -> None:
    """Train (or resume), evaluate, and write the summary."""
    data = dataset.open(data_path(sweep.spec.data[run.data].path))
    case = case_line(sweep, run, data, root)
    summary.put(sweep, case)
    folder = root / sweep.key(run)
    config = sized(run, case["tokens"])
    write_bytes(make(root / "configs") / f"{folder.name}.yaml", dumps(config).encode())
    words: list[str | Path] = ["train/pretrain.py", "--arch", root / "configs" / f"{folder.name}.yaml"]
    words += ["--data", data.path.resolve(), "--run-dir", folder, "--resume"]
    if run.after is not None:
        first = root / sweep.key(run.after)
        if rundir.status_of(first)["status"] != "complete":
            one(sweep, run.after, root)
        if rundir.status_of(first)["status"] != "complete":  # diverged: so does this
            summary.put(sweep, diverged(sweep, run, first))
            return
        words += ["--init-from", first]
    try:
        command(*words)
    except SystemExit as stop:
        if stop.code == EXIT_DIVERGED:  # an answer too: the other cases go on
            summary.put(sweep, diverged(sweep, run, folder))
            return
        if stop.code in (EXIT_INTERRUPTED, EXIT_TERMINATED):  # it has saved
            raise
        raise UserError(f"{run.label}: training ended with exit code {stop.code}; see above") from None
    summary.put(sweep, run_line(sweep, run, folder))


def diverged(sweep: Sweep, run: Run, folder: Path) -> summary.Line:
    """The line of a run without metrics; folder: of the run that ended in numbers that are none."""
    return {**identity(sweep, run, folder), "metrics": {}, **summary.measure(folder, "")}


def sized(run: Run, tokens: int) -> Config:
    """The run's configuration with its seed and length."""
    return replace(run.config, run=replace(run.config.run, seed=run.seed, tokens=tokens))


def prepare(sweep: Sweep, names: Collection[str]) -> dict[str, Dataset]:
    """The datasets of those names, made if they are not there, and whatever else comes before the runs.

    Raises DatasetError, and SystemExit with the exit code of a command that fails.
    """
    found = {}
    for name, spec in sweep.spec.data.items():
        path = data_path(spec.path)
        if name in names:
            if not (path / "manifest.json").is_file() and spec.make:
                command("-m", "dataset", *spec.make, "--out", path)
            found[name] = dataset.open(path)
    for words in sweep.spec.before:
        command(*words)
    return found


def data_path(path: str) -> Path:
    """Relative paths are the project's."""
    return ROOT / path


def case_line(sweep: Sweep, run: Run, data: Dataset, root: Path) -> summary.Line:
    """What a case is, its length included. A length found earlier is kept: every seed has the same.

    Raises UserError when the dataset is not the one of the case's other runs.
    """
    old = [x for x in summary.read(summary.file_of(sweep)) if x["kind"] == "case"]
    for line in old:
        if (line["case"], line["data"]) == (run.case, run.data):
            if line["dataset"] != data.manifest["id"]:
                raise UserError(
                    f"{data.path}: is not the dataset that {run.case!r} was trained on before "
                    f"({line['dataset'][:12]} then, {data.manifest['id'][:12]} now); bring that one, or drop "
                    "its runs with\n"
                    f"  python -m experiments forget {sweep.path} --only {run.case!r}"
                )
            return line
    shape = describe(run.config, vocab=data.vocab, context=run.config.run.context)
    flops = shape.total("training")
    parameters = shape.parameters()
    return {
        "kind": "case",
        "case": run.case,
        "data": run.data,
        "digest": summary.identity_digest(sweep, run),
        "identity": sweep.identity(run),
        "measured": sweep.measured(run),
        "dataset": data.manifest["id"],
        "parameters": parameters["total"],
        "trained": parameters["trained"],
        "flops_per_token": short(flops),
        "state_bytes": short(shape.state_bytes(run.config.run.context)),
        "context": run.config.run.context,
        "tokens": tokens_of(sweep, run, data, flops, root),
    }


def tokens_of(sweep: Sweep, run: Run, data: Dataset, flops: float, root: Path) -> int:
    """The budget in training tokens, a whole number of steps."""
    budget, r = sweep.spec.budget, run.config.run
    if budget.tokens is not None:
        tokens = budget.tokens
    elif budget.bytes is not None:
        split = data.manifest["splits"]["train"]
        tokens = budget.bytes * split["tokens"] / split["text_bytes"]
    elif budget.flops is not None:
        tokens = budget.flops / flops
    else:
        clock = "seconds" if budget.seconds is not None else "cpu_seconds"
        tokens = getattr(budget, clock) * speed(run, data, root / "probes" / sweep.key(run), clock)
    step = r.batch * r.context
    return max(1, round(tokens * run.share / step)) * step


def speed(run: Run, data: Dataset, folder: Path, clock: str) -> float:
    """Training tokens a second (of `seconds` or `cpu_seconds`) on this machine now, from a few steps.

    The first is left out.
    """
    r = run.config.run
    tokens = PROBE_STEPS * r.batch * r.context
    config = replace(
        run.config,
        run=replace(r, tokens=tokens, log_every=1, eval_every=0, save_every=0, eval_tokens=r.context),
        # the study's own warm-up and decay may be longer than this
        schedule=replace(run.config.schedule, kind="constant", warmup=PROBE_STEPS),
    )
    path = make(folder) / "probe.yaml"
    write_bytes(path, dumps(config).encode())
    words = ("--data", data.path.resolve(), "--run-dir", folder / "run", "--resume")
    command("train/pretrain.py", "--arch", path, *words)
    found = [x for x in summary.records_of(folder / "run") if x["kind"] == "train"]
    pairs = itertools.pairwise(found)
    return statistics.median((b["tokens"] - a["tokens"]) / (b[clock] - a[clock]) for a, b in pairs)


def make(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def run_line(sweep: Sweep, run: Run, folder: Path) -> summary.Line:
    """Measure a finished run."""
    spec = sweep.spec
    if rundir.status_of(folder)["status"] != "complete":
        raise UserError(f"{folder}: {run.label} is not complete; run the same command again")
    data = spec.data[run.data]
    heldout = None if data.heldout is None else data_path(data.heldout)
    found = evaluate(folder, heldout, spec.eval_tokens, data.tasks, spec.samples)
    lm = model.load(folder)
    metrics = summary.metrics_of(found, lm.output_head)
    if spec.prefill:
        try:
            lm.init_state(1)
        except ValueError:
            pass  # a router that looks ahead has no state, and no prefill
        else:
            metrics["prefill_ms"] = prefill_ms(lm, spec.prefill, run.config.run.precision)
    return {
        **identity(sweep, run, folder),
        "metrics": metrics,
        **summary.measure(folder, lm.output_head),
    }


def identity(sweep: Sweep, run: Run, folder: Path) -> summary.Line:
    """Which run a line is about, and what made it."""
    about = rundir.about_of(folder)
    return {
        "kind": "run",
        "case": run.case,
        "data": run.data,
        "seed": run.seed,
        "digest": sweep.key(run),
        "code": about["code"],
        "torch": about["environment"]["torch"],
    }


@torch.no_grad()
def prefill_ms(lm: LanguageModel, tokens: int, precision: str, rounds: int = 5) -> float:
    """Median milliseconds from a prompt of `tokens` tokens to its last logits, on one row."""
    ids = torch.zeros(1, tokens, dtype=torch.int64)
    times = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        with autocast(torch.device("cpu"), precision):
            lm(ids, state=lm.init_state(1), last=True)
        times.append(time.perf_counter() - began)
    return short(1000 * statistics.median(times[1:]))


# ----------------------------------------------------------------------------- without running


def plan_table(sweep: Sweep, options: Options) -> Table:
    """What a run would do: a row a case and dataset, parameters and work where the dataset is there."""
    done = summary.read(summary.file_of(sweep))
    table = Table(title=f"{sweep.name}: {sweep.spec.question}")
    for title in ("case", "data", "parameters", "MFLOP/token", "state KiB", "tokens", "seeds done"):
        table.add_column(title, justify="left" if title in ("case", "data") else "right")
    mine = chosen(sweep, options)
    for case, data in dict.fromkeys((run.case, run.data) for run in mine):
        runs = [run for run in mine if (run.case, run.data) == (case, data)]
        count = sum(any(is_of(line, run, sweep) for line in done) for run in runs)
        table.add_row(case, data, *shape_cells(sweep, runs[0]), f"{count}/{len(runs)}")
    return table


def expected_vocab(make: Sequence[str]) -> int | None:
    """Ids of a dataset that is not there yet; None: a pretrained tokenizer's."""
    if make and make[0] == "continue":
        try:
            return dataset.open(data_path(make[1])).vocab
        except DatasetError:
            return None
    return 260 if "smollm2" not in " ".join(make) else None


def shape_cells(sweep: Sweep, run: Run) -> list[str]:
    path = data_path(sweep.spec.data[run.data].path)
    try:
        vocab: int | None = dataset.open(path).vocab
    except DatasetError:
        vocab = expected_vocab(sweep.spec.data[run.data].make)
    shape = describe(run.config, vocab=vocab, context=run.config.run.context)
    flops, budget = shape.total("training"), sweep.spec.budget
    tokens = run.share * (budget.tokens or (budget.flops / flops if budget.flops else 0))
    return [
        f"{shape.parameters()['total']:,}",
        f"{flops / 1e6:.1f}",
        f"{shape.state_bytes(run.config.run.context) / 1024:,.0f}",
        f"{tokens:,.0f}" if tokens else ", ".join(f"{v:,.0f} {k}" for k, v in vars(budget).items() if v),
    ]
