"""Fit the network that guesses where weights are going (`train.nowcast`) on the checkpoints of finished runs.

    python -m experiments.nowcast.fit RUN... --every 100 --history 5 --ahead 5 --out nowcast.safetensors

A run must have kept a checkpoint every `--every` steps: train it with run.save_every and run.keep to suit.
The network learns the move from one checkpoint to the one `--ahead` later, from the `--history` before it, in
units of the mean step; coordinates are drawn evenly from every tensor of every run.

Shape legend: N coordinates  h history
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from dataset.files import DatasetError, write_bytes
from train import checkpoint
from train.errors import EXIT_USER, UserError
from train.nowcast import NowcastNet, features

PER_TENSOR = 2048  # coordinates of a tensor and place that are learned from
BATCH = 4096


def examples(path: Sequence[Tensor], history: int, ahead: int, gen: torch.Generator) -> tuple[Tensor, Tensor]:
    """([N, h-1] inputs, [N] moves in units of the mean step) from every place of a tensor's path."""
    inputs, targets = [], []
    for first in range(len(path) - history - ahead + 1):
        past, goal = list(path[first : first + history]), path[first + history + ahead - 1]
        x, scale = features(past)
        if not scale > 0:
            continue
        move = (goal.float() - past[-1].float()).flatten() / scale
        pick = torch.randperm(len(move), generator=gen)[:PER_TENSOR]
        inputs.append(x[pick])
        targets.append(move[pick])
    if not inputs:
        return torch.zeros(0, history - 1), torch.zeros(0)
    return torch.cat(inputs), torch.cat(targets)


def fit(paths: Sequence[Sequence[Tensor]], history: int, ahead: int, steps: int, seed: int) -> NowcastNet:
    """The network with the least mean absolute error on the moves of these tensors' paths, oldest first."""
    gen = torch.Generator().manual_seed(seed)
    parts = [examples(path, history, ahead, gen) for path in paths]
    x, y = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
    if not len(x):
        raise UserError(f"no path is as long as {history} + {ahead} checkpoints: lower run.save_every")
    torch.manual_seed(seed)
    net = NowcastNet(history)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, steps)
    for _ in range(steps):
        rows = torch.randint(len(x), (min(BATCH, len(x)),), generator=gen)
        loss = (net(x[rows]) - y[rows]).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    return net


def paths_of(run: Path, every: int) -> list[list[Tensor]]:
    """The path of every floating tensor of a run through its checkpoints. Raises UserError."""
    found = {int(p.name.removeprefix("step_")): p for p in checkpoint.saved(run)}
    steps = [s for s in sorted(found) if s % every == 0]
    if len(steps) < 2 or steps != list(range(steps[0], steps[-1] + 1, every)):
        raise UserError(
            f"{run}: want checkpoints {every} steps apart (run.save_every, run.keep), got {steps}"
        )
    tensors = [checkpoint.load_tensors(found[s]) for s in steps]
    names = [n for n, t in tensors[0].items() if t.is_floating_point() and t.numel() > 1]
    return [[t[name] for t in tensors] for name in names]


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="experiments.nowcast.fit", description=__doc__.split("\n")[0])
    p.add_argument("runs", type=Path, nargs="+")
    p.add_argument("--every", type=int, default=100, help="steps between two weights, as nowcast.every")
    p.add_argument("--history", type=int, default=5, help="as nowcast.history")
    p.add_argument("--ahead", type=int, default=5, help="checkpoints to guess ahead")
    p.add_argument("--steps", type=int, default=2000, help="steps of the fit")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, required=True)
    args = p.parse_args(argv)
    if args.out.exists():
        print(f"{args.out}: is there already, and left as it is")
        return 0
    try:
        paths = [path for run in args.runs for path in paths_of(run, args.every)]
        net = fit(paths, args.history, args.ahead, args.steps, args.seed)
    except (UserError, DatasetError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER
    write_bytes(args.out, save(net.state_dict()))
    print(f"{args.out}: fitted on {len(paths)} tensors; use it with --set nowcast.net={args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
