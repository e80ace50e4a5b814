"""The modules of a bank: built from their specs, and scaled at initialization."""

from __future__ import annotations

import torch
from torch import nn

from model.blocks.memory import KVMemory, make_memory
from model.combine import Faded, Residual
from model.core import Bottleneck
from model.items import ModuleSpec
from model.quant.adapter import Adapter
from model.registry import make_block, make_quantizer, make_wrap


def scale_residual_outputs(module: nn.Module, visits: int) -> None:
    """Divide every residual output projection by sqrt(visits): the stream's variance stays O(1)."""
    with torch.no_grad():
        for linear in residual_outputs(module):
            linear.weight /= visits**0.5


def residual_outputs(module: nn.Module) -> list[nn.Linear]:
    """The Linears that write to the residual stream: those a block marks `residual_out`."""
    return [m for m in module.modules() if isinstance(m, nn.Linear) and getattr(m, "residual_out", False)]


def build_module(spec: ModuleSpec, norm_eps: float) -> nn.Module:
    """The module that a spec describes. Raises TypeError for a class that is no part of a plan."""
    module: nn.Module
    if spec.kind == "block":
        module = Residual(make_block(spec.name, spec.dim, **spec.params), norm_eps)
    elif spec.kind == "quant":
        module = make_quantizer(spec.name, spec.dim, **spec.params)
    elif spec.kind == "wrap":
        module = make_wrap(spec.name, spec.dim, **spec.params)
    elif spec.kind == "memory":
        module = make_memory(spec.dim, **spec.params)
    elif spec.kind == "adapter":
        module = Adapter(spec.dim, **spec.params)
    else:
        module = Faded(**spec.params)
    if not isinstance(module, Residual | Bottleneck | Faded | KVMemory):
        raise TypeError(f"{spec.name} is not a block or a bottleneck")
    return module.requires_grad_(not spec.frozen)
