"""A sweep file: one question, its cases, and the runs that answer it.

    question: Which mixer ...?
    arch: base.yaml                    # beside the sweep file, or in model/archs/
    set: {run.context: 256}            # patches on it, for every case
    data:                              # every case is trained once on each
      text:   {path: data/pystdlib-bytes, make: [prepare, --source, pystdlib]}
      recall: {path: data/recall, make: [task, mqar, copy], tasks: [mqar, copy]}
    cases:
      gla:    {set: {defaults.mixer...}}
      mamba2: {arch: other.yaml, about: "words for the report"}
    grid: {optim.lr: [1e-3, 3e-3]}     # times every case
    base: gla                          # others are paired against it (with a grid: at the same values)
    before: [[-m, dataset, score, ...]]  # `python WORDS`, first; each leaves alone what it finds done
    seeds: 3
    budget: {tokens: 1e6}              # or {bytes: 4e6}, {flops: 1e13}, {seconds: 60}, {cpu_seconds: 60}

What a run is follows from what is written: the architecture's file with everything that it extends, the
patches, the data, the budget and the seed. Its folder is the digest of that, so a run is found again whatever
was added to the sweep, and never mistaken for another.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dataset.files import canonical, digest
from dataset.tasks import parse as parse_task
from model.config import load, sources
from model.config.reader import FAIL, Reader
from model.schema import Config, ConfigError
from train.rundir import flat

SECTIONS = ("run", "optim", "schedule", "outer", "grow", "loss", "select", "activations", "nowcast")


@dataclass(frozen=True)
class DataSpec:
    """make: words after `python -m dataset` that make the folder (`--out` is added).
    tasks: questions asked of the models trained on it (`train.taskeval`).
    heldout: folder of another dataset, whose held-out text they are scored on."""

    path: str
    make: list[str] = field(default_factory=list)
    tasks: list[str] = field(default_factory=list)
    heldout: str | None = None


@dataclass(frozen=True)
class CaseSpec:
    """arch: instead of the sweep's.  after: a case from whose weights (same data and seed) it starts.
    share: of the budget, which is spent on this run: a case and the one it starts from can add up to 1.
    on: names of the datasets that it is trained on; none: all.  about: words for the report."""

    set_: dict[str, Any] = field(default_factory=dict)
    arch: str | None = None
    after: str | None = None
    share: float = 1.0
    on: list[str] = field(default_factory=list)
    about: str = ""


@dataclass(frozen=True)
class BudgetSpec:
    """Of one run, exactly one of: training tokens, bytes of text (for datasets of unlike tokenizers),
    training FLOPs, or seconds of training at the speed that a few steps on this machine show: by its clock
    (it is to be idle), or in CPU seconds of the process, which other programs do not lengthen."""

    tokens: float | None = None
    bytes: float | None = None
    flops: float | None = None
    seconds: float | None = None
    cpu_seconds: float | None = None


@dataclass(frozen=True)
class SweepSpec:
    """The file. measure: what the plots show, `bits_per_byte` or the name of a task.
    samples: per task and difficulty.  prefill: tokens of a timed prefill, 0: none.
    before: words after `python` of commands that make what the cases need, run in the project's folder
    when the datasets are there; each leaves alone what it finds done."""

    question: str
    arch: str
    data: dict[str, DataSpec]
    budget: BudgetSpec
    cases: dict[str, CaseSpec]
    set_: dict[str, Any] = field(default_factory=dict)
    grid: dict[str, list[Any]] = field(default_factory=dict)
    base: str | None = None
    seeds: int = 3
    measure: str = "bits_per_byte"
    samples: int = 50
    eval_tokens: int = 16384
    prefill: int = 0
    before: list[list[str]] = field(default_factory=list)


@dataclass(frozen=True)
class Run:
    """One training run: a case on one dataset with one seed.

    written: the architecture as written, patches applied, before defaults: {dotted key: value}.
    share:   of the sweep's budget.
    """

    case: str
    data: str
    seed: int
    config: Config
    written: dict[str, Any]
    after: Run | None = None
    share: float = 1.0

    @property
    def label(self) -> str:
        return f"{self.case} on {self.data}, seed {self.seed}"


@dataclass(frozen=True)
class Sweep:
    """A sweep file that was read and checked; `runs` in the order in which they are done: seed by seed.

    measured_in: the file of its summaries, None: beside the sweep.
    """

    path: Path
    spec: SweepSpec
    cases: dict[str, CaseSpec]
    runs: list[Run]
    measured_in: Path | None = None

    @property
    def name(self) -> str:
        return self.path.parent.name if self.path.stem == "sweep" else self.path.stem

    def base_of(self, case: str) -> str:
        """The case that another is compared with: the sweep's base, at the same values of the grid."""
        base = self.spec.base or next(iter(self.spec.cases))
        if base in self.cases:
            return base
        name = max((n for n in self.spec.cases if case.startswith(n)), key=len)
        return base + case.removeprefix(name)

    @property
    def apart(self) -> bool:
        """Whether datasets are questions of their own; not when every case has just one, which is a part
        of what the case is (as bytes against BPE)."""
        return any(len(case.on or self.spec.data) > 1 for case in self.cases.values())

    def identity(self, run: Run) -> dict[str, Any]:
        """What makes a run what it is, besides the seed."""
        data, budget = self.spec.data[run.data], self.spec.budget
        whole = {k: v for k, v in vars(budget).items() if v is not None}
        found = {
            "config": run.written,
            "data": {"path": data.path, "make": data.make},
            "budget": whole if run.share == 1 else {**whole, "share": run.share},
            "after": self.identity(run.after) if run.after else None,
        }
        return {**found, "before": self.spec.before} if self.spec.before else found

    def measured(self, run: Run) -> dict[str, Any]:
        """How a finished run is measured; another measure of the same run is no longer comparable."""
        spec = self.spec
        found: dict[str, Any] = {"eval_tokens": spec.eval_tokens, "prefill": spec.prefill}
        data = spec.data[run.data]
        if data.tasks:
            found |= {"tasks": data.tasks, "samples": spec.samples}
        return {**found, "heldout": data.heldout} if data.heldout else found

    def key(self, run: Run) -> str:
        """The name of the run's folder."""
        return digest(canonical({**self.identity(run), "seed": run.seed}))[:16]


def read(path: Path) -> Sweep:
    """Read a sweep file and resolve every run of it. Raises ConfigError with all that is wrong."""
    errors = sources.Errors()
    root = sources.read(path, errors)
    spec = Reader(errors).object(SweepSpec, root, "")
    if errors.lines or spec is FAIL:
        raise ConfigError(errors.lines)
    cases = expand(spec)
    if wrong := list(mistakes(spec, cases)):
        raise ConfigError([f"{sources.shown(path)}: {message}" for message in wrong])
    resolved = {name: resolve(path, spec, name, case) for name, case in cases.items()}
    made: dict[tuple[str, str, int], Run] = {}
    for seed, data in itertools.product(range(spec.seeds), spec.data):
        for name in ordered(cases):
            if data not in trained_on(spec, cases[name]):
                continue
            config, written = resolved[name]
            after = made[cases[name].after, data, seed] if cases[name].after else None  # type: ignore[index]
            made[name, data, seed] = Run(name, data, seed, config, written, after, cases[name].share)
    return Sweep(path, spec, cases, list(made.values()))


def expand(spec: SweepSpec) -> dict[str, CaseSpec]:
    """The cases, each once for every combination of the grid."""
    out = {}
    for name, case in spec.cases.items():
        for values in itertools.product(*spec.grid.values()):
            chosen = dict(zip(spec.grid, values))
            suffix = "".join(f" {key.rpartition('.')[2]}={value}" for key, value in chosen.items())
            patch = {**dotted(case.set_), **chosen}
            after = case.after + suffix if case.after in spec.cases else case.after
            out[name + suffix] = replace(case, set_=patch, after=after)
    return out


def trained_on(spec: SweepSpec, case: CaseSpec) -> set[str]:
    return set(case.on or spec.data)


def mistakes(spec: SweepSpec, cases: Mapping[str, CaseSpec]):
    """What the types do not say."""
    if not spec.cases or not spec.data:
        yield "cases and data: want at least one of each"
    if spec.base is not None and spec.base not in {*cases, *spec.cases}:
        yield f"base: no case {spec.base!r}; there are {', '.join(spec.cases)}"
    budget = [k for k, v in vars(spec.budget).items() if v is not None]
    if len(budget) != 1 or getattr(spec.budget, budget[0]) <= 0:
        yield "budget: want exactly one of tokens, bytes, flops, seconds and cpu_seconds, above 0"
    if spec.seeds < 1 or spec.samples < 1 or spec.prefill < 0 or spec.eval_tokens < 1:
        yield "seeds, samples and eval_tokens: want at least 1; prefill at least 0"
    for name, case in cases.items():
        first = None if case.after is None else cases.get(case.after)
        if case.after is not None and (first is None or first.after):
            yield f"cases.{name}.after: {case.after!r} is no case that starts from nothing"
        elif first is not None and (gone := trained_on(spec, case) - trained_on(spec, first)):
            yield f"cases.{name}.on: {case.after!r}, which it starts from, is not trained on {sorted(gone)}"
        if not 0 < case.share <= 1:
            yield f"cases.{name}.share: {case.share}: want a share of the budget, above 0 and up to 1"
        for wanted in case.on:
            if wanted not in spec.data:
                yield f"cases.{name}.on: no data {wanted!r}; there are {', '.join(spec.data)}"
    for name, data in spec.data.items():
        for task in data.tasks:
            try:
                parse_task(task)
            except Exception as error:
                yield f"data.{name}.tasks: {error}"
    tasks = [task.partition(":")[0] for data in spec.data.values() for task in data.tasks]
    if spec.measure != "bits_per_byte" and spec.measure not in tasks:
        yield f"measure: {spec.measure!r} is neither bits_per_byte nor a task of the data"


def ordered(cases: Mapping[str, CaseSpec]) -> list[str]:
    """Cases that others start from come first."""
    return sorted(cases, key=lambda name: cases[name].after is not None)


def resolve(path: Path, spec: SweepSpec, name: str, case: CaseSpec) -> tuple[Config, dict[str, Any]]:
    """A case's configuration (seed 0, no length yet), and the same as written. Raises ConfigError."""
    arch, search = case.arch or spec.arch, [path.parent]
    sets = {**dotted(spec.set_), **dotted(case.set_)}
    sets |= {"run.seed": 0, "run.steps": None, "run.tokens": None, "grow.from": None}
    errors = sources.Errors()
    try:
        root, _ = sources.gather(arch, sets, search, errors)
        config = load(arch, sets, search)
    except ConfigError as error:
        raise ConfigError([f"{sources.shown(path)}: cases.{name}: {line}" for line in error.errors]) from None
    return config, flat(root.plain())


def dotted(patch: Mapping[str, Any]) -> dict[str, Any]:
    """A patch with the keys of training sections spelled out: {run: {micro: 2}} as {"run.micro": 2}."""
    out: dict[str, Any] = {}
    for key, value in patch.items():
        if key in SECTIONS and isinstance(value, Mapping):
            out |= {f"{key}.{k}": v for k, v in value.items()}
        else:
            out[key] = value
    return out
