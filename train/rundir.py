"""A run is a folder. What it holds, who may write to it, and how others find it.

config.yaml     the resolved configuration           run.json      name, origin, code, data, environment
status.json     running | stopped | complete | diverged, and where
metrics.jsonl   see `train.metrics`                   checkpoints/  see `train.checkpoint`
tokenizer.json  the dataset's, so that the folder can be talked to on its own
"""

from __future__ import annotations

import fcntl
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dataset.files import DatasetError, read_json, write_bytes
from dataset.format import Dataset
from model.config import digest, dump, dumps, load
from model.schema import Config, ConfigError
from train import checkpoint
from train.errors import CheckpointError, UserError, disk_full, is_disk_full

CONFIG, ABOUT, STATUS, TOKENIZER = "config.yaml", "run.json", "status.json", "tokenizer.json"
# Keys that change what is written and when, or only where the same sums are formed: they may differ on
# --resume, as the number of ranks may.
FREE = (
    "wandb",
    "run.log_every",
    "run.save_every",
    "run.keep",
    "outer.server",
    "outer.secret_file",
    "run.parallel",
    "run.shard",
    "run.reshard",
)


@dataclass(frozen=True)
class Source:
    """Where weights come from: a checkpoint folder, its configuration, and what is known of its run."""

    path: Path
    config: Config
    about: dict[str, Any]

    @property
    def tokenizer(self) -> str | None:
        return self.about.get("data", {}).get("tokenizer")


def create(run: Path, config: Config, data: Dataset, origin: dict[str, Any], command: Sequence[str]) -> None:
    """Make a new run folder. Raises DiskFull."""
    about = {
        "name": config.name,
        "digest": digest(config),
        "created": round(time.time(), 3),
        "command": list(command),
        "origin": origin,
        "data": {
            "path": str(data.path),
            "id": data.id,
            "tokenizer": data.tokenizer_identity,
            "vocab": data.vocab,
        },
        "code": code_revision(),
        "environment": environment(),
    }
    try:
        run.mkdir(parents=True, exist_ok=True)
        write_bytes(run / CONFIG, dumps(config).encode())
        write_bytes(run / TOKENIZER, data.tokenizer.source)
    except Exception as error:
        if is_disk_full(error):
            raise disk_full(run) from error
        raise UserError(f"{run}: cannot make the run folder ({error})") from error
    checkpoint.record(run, ABOUT, about)


def exists(run: Path) -> bool:
    """Whether the folder holds a run; raises UserError when it holds anything else."""
    if (run / CONFIG).is_file():
        return True
    if run.exists() and (not run.is_dir() or any(p.name not in (".lock", "workers") for p in run.iterdir())):
        raise UserError(f"{run}: is not empty and holds no run; give another folder with --run")
    return False


def check_same(run: Path, config: Config, data: Dataset) -> None:
    """Refuse to go on with another configuration or other data. Raises UserError."""
    old = flat(dump(stored_config(run)))
    new = flat(dump(config))
    changed = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k) and k not in FREE]
    if changed:
        lines = [f"  {k}: {old.get(k)!r} in the folder, {new.get(k)!r} now" for k in changed[:12]]
        raise UserError(
            f"{run}: holds a run of another configuration:\n" + "\n".join(lines) + "\n"
            "give another folder with --run, or the configuration of this one"
        )
    about = about_of(run)
    if about["data"]["id"] != data.id:
        raise UserError(
            f"{run}: was trained on dataset {about['data']['id'][:16]} ({about['data']['path']}), not on "
            f"{data.path} ({data.id[:16]}); give that one with --data, or another folder with --run"
        )


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """Nested plain data as {dotted path: leaf}."""
    if isinstance(value, dict) and value:
        return {
            k: v
            for key, child in value.items()
            for k, v in flat(child, f"{path}.{key}" if path else key).items()
        }
    if isinstance(value, list) and value and not all(isinstance(v, int | float | str) for v in value):
        return {k: v for i, child in enumerate(value) for k, v in flat(child, f"{path}[{i}]").items()}
    return {path: value}


def stored_config(folder: Path) -> Config:
    """The configuration of a run or checkpoint folder. Raises UserError."""
    try:
        return load(folder / CONFIG)
    except ConfigError as error:
        raise UserError(f"{folder}: its configuration cannot be read:\n{error}") from error


def about_of(run: Path) -> dict[str, Any]:
    try:
        return read_json(run / ABOUT)
    except DatasetError as error:
        raise UserError(f"{run}: no run folder, or an unfinished one ({error})") from error


def set_status(run: Path, status: str, **where: Any) -> None:
    checkpoint.record(run, STATUS, {"status": status, "time": round(time.time(), 3), **where})


def status_of(run: Path) -> dict[str, Any]:
    with suppress(DatasetError):
        return read_json(run / STATUS)
    return {"status": "unknown"}


# ----------------------------------------------------------------------------- finding weights


def latest_complete(name: str, roots: Sequence[Path]) -> tuple[Path | None, list[Path]]:
    """The latest complete run of that name below `roots`, and the runs of that name that are not complete."""
    complete, others = [], []
    for root in dict.fromkeys(p.resolve() for p in roots):
        for about in sorted(root.glob(f"*/{ABOUT}")):
            run = about.parent
            with suppress(DatasetError, KeyError, TypeError):
                if read_json(about)["name"] != name:
                    continue
                status = status_of(run)
                if status["status"] == "complete":
                    complete.append((status["time"], run))
                else:
                    others.append(run)
    return (max(complete)[1] if complete else None), others


def source_of(folder: Path) -> Source:
    """The newest whole checkpoint of a run folder, a checkpoint folder itself, or a folder of weights alone
    (`python -m model import`). Raises UserError."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; want a run, a checkpoint or an import")
    if (folder / checkpoint.MANIFEST).is_file():
        checkpoint.verify(folder)
        run = folder.parent.parent
        return Source(folder, stored_config(folder), about_of(run) if (run / ABOUT).is_file() else {})
    if checkpoint.is_weights_alone(folder):
        return Source(folder, stored_config(folder), {})
    path, complaints = checkpoint.newest(folder)
    if path is None:
        why = "; ".join(complaints) or "no checkpoint in it"
        raise CheckpointError(f"{folder}: no complete checkpoint ({why})")
    return Source(path, stored_config(path), about_of(folder) if (folder / ABOUT).is_file() else {})


# ----------------------------------------------------------------------------- the folder's one writer


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold the run folder: a second process that wants to train in it is refused. Raises UserError."""
    run.mkdir(parents=True, exist_ok=True)
    with open(run / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{run}: another process is training in this folder") from None
        yield


# ----------------------------------------------------------------------------- provenance


def code_revision() -> str:
    """The commit of this code, `+changes` when files differ from it, or 'unknown'."""
    root = Path(__file__).resolve().parents[1]

    def git(*words: str) -> str:
        out = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10)
        return out.stdout.strip() if out.returncode == 0 else ""

    try:
        revision = git("rev-parse", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no") if revision else ""
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return (revision + ("+changes" if changed else "")) or "unknown"


def environment() -> dict[str, Any]:
    cards = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": cards,
        "world": int(os.environ.get("WORLD_SIZE", 1)),
        "argv0": Path(sys.argv[0]).name,
    }
