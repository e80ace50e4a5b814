"""GLA, RWKV-6 and the delta rules, forward and backward, against fla's torch forms.

B4 T1024 H4 K64 V128. The peers run where they are installed, in the oracles' environment, and so do we:
one process, the same torch, allocator and threads. GLA's exact form bears any decay; the narrow one is
chosen when the decays are mild, which GLA's own gate nearly always is.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.bench.harness import Candidate, Case, Result, Row, measure
from model.core import Docs
from model.ops.allocator import keep_freed_memory
from model.ops.linear import delta_rule, gla, rwkv6

B, T, H, K, V = 4, 1024, 4, 64, 128
_CHILD = "import sys; from experiments.bench.linear import child; child(int(sys.argv[1]), int(sys.argv[2]))"


def run(rounds: int) -> list[Result]:
    """Measure in the oracles' environment (made if it is not there) and read back what it printed."""
    setup = [sys.executable, "-m", "tests.oracles", "--setup"]
    python = subprocess.run(setup, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1]
    command = [python, "-W", "ignore", "-c", _CHILD, str(rounds), str(torch.get_num_threads())]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    results = json.loads(out.splitlines()[-1])
    return [Result(**{**r, "rows": tuple(Row(**row) for row in r["rows"])}) for r in results]


def child(rounds: int, threads: int) -> None:
    keep_freed_memory()
    torch.set_num_threads(threads)
    print(json.dumps([asdict(measure(case, rounds, show=False)) for case in (_gla(), _delta())]))


def _peer(module: str, name: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """fla is installed in the oracles' environment alone."""
    return getattr(importlib.import_module(f"fla.ops.{module}"), name)


def _inputs() -> tuple[Tensor, ...]:
    """q, k of norm 1, v, log decays in [-0.1, 0], beta."""
    torch.manual_seed(0)
    q, k = torch.randn(B, T, H, K), F.normalize(torch.randn(B, T, H, K), dim=-1)
    return q, k, torch.randn(B, T, H, V), -0.1 * torch.rand(B, T, H, K), torch.rand(B, T, H)


def _both(fn: Callable[..., tuple[Tensor, Tensor | None]], *inputs: Tensor) -> Callable[[], object]:
    """Forward, and backward to every input."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    dy = torch.randn_like(leaves[2])

    def both() -> object:
        return torch.autograd.grad(fn(*leaves)[0], leaves, dy)

    return both


def _half(*inputs: Tensor) -> tuple[Tensor, ...]:
    """q, k, v in bf16; gates stay fp32."""
    return tuple(x.to(torch.bfloat16) if i < 3 else x for i, x in enumerate(inputs))


def _gla() -> Case:
    naive = _peer("gla.naive", "naive_recurrent_gla")
    q, k, v, g, _ = _inputs()
    docs = Docs.packed([0, 300, 310, 1500, 2048, 3000, B * T], rows=B)
    any_decay = -1e9  # a floor that promises nothing

    def ours(**kwargs) -> Callable[..., tuple[Tensor, Tensor | None]]:
        return lambda *a: gla(*a, **kwargs)

    def mixed(*a: Tensor) -> tuple[Tensor, Tensor]:
        return rwkv6(*a, floor=any_decay)

    return Case(
        f"GLA forward + backward, B{B} T{T} H{H} K{K} V{V}",
        [
            Candidate("fla naive_recurrent_gla, fp32", _both(naive, q, k, v, g)),
            Candidate("exact, fp32", _both(ours(floor=any_decay), q, k, v, g)),
            Candidate("exact, fp32, documents", _both(ours(floor=any_decay, docs=docs), q, k, v, g)),
            Candidate("exact, bf16", _both(ours(floor=any_decay), *_half(q, k, v, g))),
            Candidate("narrow, fp32", _both(ours(floor=-0.1), q, k, v, g)),
            Candidate("narrow, bf16", _both(ours(floor=-0.1), *_half(q, k, v, g))),
            Candidate("chosen by value, bf16", _both(ours(), *_half(q, k, v, g))),
            Candidate("rwkv6 exact, fp32", _both(mixed, q, k, v, g, torch.randn(H, K))),
        ],
        base="fla naive_recurrent_gla, fp32",
        bars={"exact, fp32": 25.0},
    )


def _delta() -> Case:
    chunkwise = _peer("delta_rule.naive", "delta_rule_chunkwise")
    q, k, v, g, beta = _inputs()
    first = [x.transpose(1, 2).contiguous() for x in (q, k, v, beta)]  # the peer wants heads first

    return Case(
        f"Delta rules forward + backward, B{B} T{T} H{H} K{K} V{V}",
        [
            Candidate("fla delta_rule_chunkwise, chunk 32, fp32", _both(chunkwise, *first)),
            Candidate("delta rule, fp32", _both(delta_rule, q, k, v, beta)),
            Candidate("delta rule, bf16", _both(delta_rule, *_half(q, k, v, beta))),
            Candidate("gated, fp32", _both(delta_rule, q, k, v, beta, g[..., 0])),
            Candidate("per channel (KDA), fp32", _both(delta_rule, q, k, v, beta, g)),
            Candidate("per channel (KDA), bf16", _both(delta_rule, *_half(q, k, v, beta, g))),
        ],
        base="fla delta_rule_chunkwise, chunk 32, fp32",
        bars={"delta rule, fp32": 1.5},
    )
