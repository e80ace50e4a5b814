"""Every registered block on a device beside itself on the CPU, packed documents, from an empty state."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from model.core import Block, Ctx
from tests.gpu.operators import Row, _off
from tests.laws.cases import CASES
from tests.laws.harness import Case, docs_from, random_rows, registered_cases


def compare_blocks(device: str, names: tuple[str, ...] | None = None) -> Iterator[Row]:
    """A row for every case of the laws; `output` counts the final state too."""
    for case in registered_cases(CASES):
        if names is not None and case.name not in names:
            continue
        try:
            ours, theirs = (_results(case, where) for where in (device, "cpu"))
        except Exception as error:  # one broken block must not hide the others
            yield Row(str(case), "auto", "packed", why=f"FAILED {type(error).__name__}: {error}"[:200])
            continue
        errors = [max((_off(a.cpu(), b) for a, b in zip(o, t)), default=0.0) for o, t in zip(ours, theirs)]
        yield Row(str(case), "auto", "packed", *errors)


def _results(case: Case, device: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """(output and final state, gradients of input and parameters) in fp32."""
    block: Block = copy.deepcopy(case.build(torch.float32)).to(device)
    x = case.input(2, case.T, torch.float32).to(device).requires_grad_()
    docs = docs_from(random_rows(random.Random(0), 2, case.T)).to(device)
    ctx: Any = Ctx(docs=docs, progress=torch.zeros((), device=device))
    step = block(x, block.init_state(2, x), ctx)
    generator = torch.Generator().manual_seed(7)
    loss = (step.y * torch.randn(step.y.shape, generator=generator).to(device)).sum()
    inputs = [x, *(p for p in block.parameters() if p.requires_grad)]
    found = torch.autograd.grad(loss, inputs, allow_unused=True)
    states = [t for t in tree_leaves(step.state) if isinstance(t, torch.Tensor) and t.is_floating_point()]
    return [step.y, *states], [g for g in found if g is not None]
