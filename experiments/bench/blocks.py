"""Every registered block at one shape: what it costs, and how fast it runs forward and backward.

    python -m experiments.bench blocks           times them and writes the table of model/README.md
    python -m experiments.bench.blocks           writes the table without speeds

4 rows of 512 tokens, 256 wide, fp32, every block with its defaults but for PARAMS. The base of the ratios is
`attention`. This compares layers as they would be used, not operators.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from experiments.bench.harness import Candidate, Case, Result, measure
from model.blocks.memory import KVMemory
from model.core import Block, Ctx
from model.describe import si, size_of
from model.ops.select import OPERATORS
from model.registry import BLOCKS, make_block

B, T, D, BASE = 4, 512, 256, "attention"
PARAMS: dict[str, dict[str, Any]] = {  # windows that bite at 512 tokens
    "swa": {"window": 128},
    "pair_attn": {"window": 128},
    "samba": {"swa": {"window": 128}},
}
# The operators that a block calls, in `python -m model backends`; None: plain torch.
CALLS: dict[str, tuple[str, ...]] = {
    "attention": ("attention",),
    "swa": ("attention",),
    "xattn": ("attention",),
    "recall": ("attention",),
    "steer": ("attention",),
    "summary": ("attention",),
    "compressed_attn": ("nsa",),
    "sparsek": ("sparsek",),
    "mamba2": ("ssd", "conv"),
    "samba": ("ssd", "conv", "attention"),
    "gla": ("gla",),
    "retention": ("ssd",),
    "deltanet": ("delta_rule", "conv"),
    "gated_deltanet": ("gated_delta_rule", "conv"),
    "kda": ("gated_delta_rule", "conv"),
    "rwkv6": ("rwkv6",),
    "mix": ("ssd", "delta_rule", "conv"),
}
READS_MEMORY = ("xattn", "recall")
ROOT = Path(__file__).resolve().parents[2]
PAGE, ORACLES = ROOT / "model" / "README.md", ROOT / "model" / "ops" / "ORACLES.md"
START, END = "<!-- costs of the blocks: made by experiments/bench/blocks.py -->", "<!-- end of the costs -->"


def build(name: str) -> tuple[Block, Ctx]:
    """A block, and what it needs around it."""
    torch.manual_seed(0)
    block = make_block(name, D, **PARAMS.get(name, {}))
    if name not in READS_MEMORY:
        return block, Ctx()
    with torch.no_grad():
        memory = KVMemory(D, head_dim=block.head_dim)(torch.randn(B, T, D), None, Ctx())[0]
    return block, Ctx(memory=memory)


def candidate(name: str) -> Candidate:
    block, ctx = build(name)
    x = torch.randn(B, T, D, requires_grad=True)

    def run() -> object:
        step = block(x, None, ctx)
        loss = step.y.square().mean() + sum(step.aux.losses.values())
        loss.backward()
        block.zero_grad(set_to_none=True)
        x.grad = None
        return loss

    return Candidate(name, run)


def run(rounds: int) -> list[Result]:
    names = [BASE, *(n for n in BLOCKS.names() if n != BASE)]
    threads = torch.get_num_threads()
    title = f"Forward and backward of one block, B{B} T{T} D{D}, fp32, {threads} thread{'s' * (threads > 1)}"
    result = measure(Case(title, [candidate(n) for n in names], BASE), rounds)
    write_page({row.name: B * T / row.median for row in result.rows}, threads)
    return [result]


# ----------------------------------------------------------------------------- the table


def row(name: str, speed: float | None) -> str:
    """One line of the table: what can be counted is counted by running the block once."""
    block, ctx = build(name)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        block(torch.randn(B, T, D), None, ctx)
    cost = block.cost(T)
    parameters = sum(p.numel() for p in block.parameters())
    calls = CALLS.get(name, ())
    names = {op: [b.name for b in OPERATORS[op] if b.name != "reference"] for op in calls}
    backends = "; ".join(f"{op}: {', '.join(found)}" for op, found in names.items()) or "torch"
    cells = [
        f"`{name}`",
        si(parameters),
        si(counter.get_total_flops() / (B * T)),
        size_of(cost.state_fixed) if cost.state_fixed else "-",
        size_of(cost.state_per_token) if cost.state_per_token else "-",
        backends,
        oracle(name, calls),
    ]
    return "| " + " | ".join([*cells, *([] if speed is None else [f"{speed / 1000:.0f}"])]) + " |"


def oracle(name: str, calls: tuple[str, ...]) -> str:
    """The peers in ORACLES.md that this block, or else one of its operators, is compared with."""
    called = {"attention": "sliding window", "conv": "convolution", "delta_rule": "delta rule"}
    called |= {"gated_delta_rule": "kda" if name == "kda" else "gated delta rule"}
    rows = [line.strip("| ").split(" | ")[:2] for line in ORACLES.read_text(encoding="utf-8").splitlines()]
    for wanted in ([f"block {name}"], [called.get(op, op) for op in calls]):
        peers = dict.fromkeys(r[1] for r in rows if len(r) == 2 and {*wanted} & {r[0], *r[0].split(", ")})
        if peers:
            return ", ".join(peers)
    return "-"


def write_page(speed: dict[str, float], threads: int | None = None, page: Path = PAGE) -> None:
    """Put the table between its marks in the architecture page."""
    head = ["block", "parameters", "FLOPs/token", "state", "state/token", "backends", "oracle"]
    told = (
        f"{D} wide, {T} tokens, fp32; forward FLOPs by torch's counter. Every operator also has a reference."
    )
    if speed:
        head.append("k tokens/s")
        told += f" Speed: forward and backward of {B} rows, {threads} threads,"
        told += " `python -m experiments.bench blocks`."
    lines = [told, "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += [row(name, speed.get(name) if speed else None) for name in BLOCKS.names()]
    old = page.read_text(encoding="utf-8")
    pattern = re.compile(re.escape(START) + ".*" + re.escape(END), re.DOTALL)
    if not pattern.search(old):
        raise ValueError(f"{page}: the marks {START!r} and {END!r} are missing")
    text = "\n".join([START, "", *lines, "", END])
    partial = page.with_suffix(".tmp")
    partial.write_text(pattern.sub(lambda _: text, old), encoding="utf-8")
    partial.replace(page)


if __name__ == "__main__":
    write_page({})
    Console().print(f"written: {PAGE.relative_to(ROOT)}")
