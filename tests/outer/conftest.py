"""A small problem that every transport can train: a linear map learned from rows drawn by seed.

Shape legend: D inputs  B rows.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from model.sections import OuterConfig
from train.outer import codec as codecs
from train.outer.diloco import DiLoCo
from train.outer.exchange import Alone, Comm, Meeting
from train.outer.lockstep import Lockstep, parts_of
from train.outer.streaming import Streaming

D = 12


class Net(nn.Module):
    """Four matrices in a bank, one of them frozen, and a statistic."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.bank = nn.ModuleDict({n: nn.Linear(D, D, bias=False, dtype=dtype) for n in ("a", "b", "c", "d")})
        self.bank["a"].register_buffer("seen", torch.zeros(2, dtype=dtype))
        for p in self.parameters():
            p.data = (torch.randn(p.shape, generator=g) / D**0.5).to(dtype)
        self.bank["d"].weight.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.bank.values():
            x = torch.tanh(layer(x)) if layer is not self.bank["c"] else layer(x)
        return x


def rows(shard: int, step: int, n: int = 8, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    g = torch.Generator().manual_seed(1000 * shard + step)
    return torch.randn(n, D, generator=g).to(dtype)


def loss_of(net: Net, x: torch.Tensor) -> torch.Tensor:
    return (net(x) - x.flip(1)).square().mean()


def inner_step(net: Net, optimizer: torch.optim.Optimizer, shard: int, step: int) -> float:
    loss = loss_of(net, rows(shard, step, dtype=net.bank["a"].weight.dtype))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    net.bank["a"].seen += torch.tensor([1.0, float(shard)], dtype=net.bank["a"].seen.dtype)
    return float(loss.detach())


def adamw(net: Net) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2, fused=True)


def sgd(net: Net) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)


def make_outer(net: Net, comm: Comm, **options: Any) -> Lockstep:
    config = OuterConfig(**{"kind": "diloco", "every": 5, **options})
    kind = Streaming if config.kind == "streaming" else DiLoCo
    return kind(config, parts_of(net, config), comm, {"plan": "p", "data": "d", "code": "c"})


def make_exact(outer: Lockstep) -> None:
    """fp64 on the wire, for fp64 models."""
    for r in outer.replicas:
        for sender in (*r.channel.up, r.channel.down):
            sender.codec, sender.feedback = codecs.make("fp64"), False


def run(
    comm: Comm,
    steps: int,
    optimizer: Callable[[Net], torch.optim.Optimizer] = adamw,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> tuple[Net, Lockstep]:
    """One worker from its first step to its last."""
    net = Net(dtype=dtype)
    outer, opt = make_outer(net, comm, **options), optimizer(net)
    if dtype == torch.float64:
        make_exact(outer)
    state = SimpleNamespace(step=0, schedule=SimpleNamespace(total=steps))
    outer.begin(state)
    for step in range(steps):
        inner_step(net, opt, comm.rank, step)
        state.step = step + 1
        outer.maybe_sync(state)
    return net, outer


def together(k: int, work: Callable[[Comm], Any]) -> list[Any]:
    """The results of k workers, each a thread; the first failure is raised."""
    if k == 1:
        return [work(Alone())]
    meeting, results, failures = Meeting(k), [None] * k, []

    def one(rank: int) -> None:
        try:
            results[rank] = work(meeting.place(rank))
        except Exception as error:
            failures.append(error)
            meeting._barrier.abort()

    threads = [threading.Thread(target=one, args=(r,)) for r in range(k)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(2e-4)  # workers meet often here
    try:
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    finally:
        sys.setswitchinterval(before)
    if failures:
        raise min(failures, key=lambda e: isinstance(e, threading.BrokenBarrierError))
    return results


def values(net: nn.Module) -> dict[str, torch.Tensor]:
    return {n: t.detach().clone() for n, t in net.state_dict().items()}


def gap(a: nn.Module, b: nn.Module) -> float:
    """Largest difference of two models' tensors."""
    return max(float((x - y).abs().max()) for x, y in zip(values(a).values(), values(b).values()))
