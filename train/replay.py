"""Steps that were not finite: kept with everything they need, and run again to see where they broke.

RUN/replay/checkpoints/step_N/   model and training state before the step (see `train.checkpoint`)
RUN/replay/step_N.RANK.safetensors   the micro batches of a rank

python train/pretrain.py --replay RUN/replay [--set run.precision=fp32]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import model
from model.config import load
from model.core import Docs
from model.lm import LanguageModel
from model.schema import Config, ConfigError
from train import checkpoint
from train.errors import EXIT_USER, UserError
from train.feed import Micro
from train.meter import StepResult
from train.state import TrainState
from train.world import World, autocast, seed_step

FOLDER = "replay"
MOST = 3  # steps kept a run: each is as large as a checkpoint


def keep(
    run: Path, state: TrainState, micros: Sequence[Micro], result: StepResult, config: str, world: World
) -> Path:
    """Keep the step just refused, whose weights were not touched. Called on every rank; gives the folder.

    Rank 0 writes the batches of all: the others need not see the folder.
    """
    root, step = run / FOLDER, state.step - 1
    if world.on_main(lambda: len(checkpoint.saved(root)) < MOST):
        checkpoint.save(root, step, state.model_tensors(), state.state_dict(), config, MOST, world)
        part, at = state.outer.place(step)
        meta = {"at": str(at), "progress": str(at / state.schedule.total), "loss": str(result.loss)}
        meta["first"] = str(part * world.size)  # the ranks of all workers are counted through
        batches = world.gather(_tensors(micros))
        world.on_main(lambda: _write(root / f"step_{step:08d}", batches, meta))
    return root


def _tensors(micros: Sequence[Micro]) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for i, micro in enumerate(micros):
        parts = {"tokens": micro.tokens, "weights": micro.weights, "reference": micro.reference}
        parts |= {"segments": micro.docs.segments, "positions": micro.docs.positions}
        out |= {f"{i}/{k}": v.detach().cpu().contiguous().clone() for k, v in parts.items() if v is not None}
    return out


def _write(stem: Path, batches: Sequence[dict[str, Tensor]], meta: dict[str, str]) -> None:
    for rank, tensors in enumerate(batches):
        file = stem.with_suffix(f".{rank}.safetensors")
        save_file(tensors, file.with_suffix(".partial"), metadata=meta)
        file.with_suffix(".partial").replace(file)


def command(folder: Path, sets: list[str]) -> int:
    """`--replay`: returns the exit code."""
    try:
        replay(folder, sets, Console())
    except (UserError, ConfigError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER
    return 0


def replay(folder: Path, sets: list[str], console: Console, rank: int = 0) -> dict[str, Any]:
    """Run the newest kept step again and print where it stops being finite.

    {"step", "loss", "first": the first site whose output is not finite, or None, "gradients": names of
    gradients that are not}. Raises UserError.
    """
    path, complaints = checkpoint.newest(folder)
    if path is None:
        raise UserError(f"{folder}: no step kept for replay ({'; '.join(complaints) or 'want RUN/replay'})")
    step = checkpoint.verify(path)
    config = load(path / checkpoint.CONFIG, sets)
    lm = model.load(path).train()
    micros, meta = _read(folder / f"{path.name}.{rank}.safetensors")
    lm.advance(int(meta["at"]), float(meta["progress"]))
    seed_step(config.run.seed, int(meta["at"]), int(meta["first"]) + rank)
    sites: list[tuple[str, bool, float]] = []
    loss = run_step(lm, micros, config, sites)
    gradients = [n for n, p in lm.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    first = next((name for name, fine, _ in sites if not fine), None)
    _show(console, path, step, meta["loss"], loss, sites, gradients)
    return {"step": step, "loss": loss, "first": first, "gradients": gradients}


def run_step(
    lm: LanguageModel, micros: list[Micro], config: Config, sites: list[tuple[str, bool, float]]
) -> float:
    """Forward and backward of the micro batches of one rank; notes (module, finite, largest) of each call."""

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            tensors = [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor)]
            tensors = [t for t in tensors if t.is_floating_point() and t.numel()]
            fine = all(bool(t.isfinite().all()) for t in tensors)
            sites.append((name, fine, max((float(t.detach().abs().max()) for t in tensors), default=0.0)))

        return hook

    handles = [lm.embed.register_forward_hook(note("embed"))]
    for part, modules in (("bank", lm.bank), ("heads", lm.heads)):
        handles += [m.register_forward_hook(note(f"{part}.{n}")) for n, m in modules.items()]
    counts = [lm.head_counts(m.labels, m.docs, m.weights) for m in micros]
    norms = {head: max(float(sum(c[head] for c in counts)), 1e-9) for head in counts[0]}
    rows, total = sum(len(m.tokens) for m in micros), 0.0
    for m in micros:
        with autocast(torch.device("cpu"), config.run.precision):
            out = lm(m.tokens, m.labels, m.weights, m.docs, norms=norms, aux_scale=len(m.tokens) / rows)
        out.loss.backward()
        total += float(out.loss.detach())
    for handle in handles:
        handle.remove()
    return total


def _read(path: Path) -> tuple[list[Micro], dict[str, str]]:
    if not path.is_file():
        raise UserError(f"{path}: the batch of that step is missing")
    try:
        with safe_open(path, "pt") as file:
            meta, tensors = file.metadata(), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    micros = []
    for i in range(1 + max(int(k.split("/")[0]) for k in tensors)):
        tokens = tensors[f"{i}/tokens"]
        docs = Docs.from_segments(tensors[f"{i}/segments"], tensors[f"{i}/positions"])
        rest = (tensors.get(f"{i}/weights"), tensors.get(f"{i}/reference"))
        micros.append(Micro(tokens, tokens, docs, *rest))
    return micros, meta


def _show(
    console: Console,
    path: Path,
    step: int,
    was: str,
    loss: float,
    sites: list[tuple[str, bool, float]],
    gradients: list[str],
) -> None:
    table = Table(title=f"{path}: step {step}, loss {loss} here, {was} in the run")
    for title in ("module, in order of calls", "finite", "largest"):
        table.add_column(title)
    for name, fine, largest in sites:
        table.add_row(name, "yes" if fine else "NO", f"{largest:.4g}")
    console.print(table)
    console.print(f"gradients that are not finite: {', '.join(gradients[:20]) or 'none'}", soft_wrap=True)
