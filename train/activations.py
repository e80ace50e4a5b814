"""Memory of the backward pass: activation checkpointing by site, and activations kept in few bits.

Checkpointed visits keep their input alone and run again in the backward pass (Chen et al. 2016), without
reentrance, so a block that is visited twice is as exact as any.

Compressed linear layers keep their input in 2, 4 or 8 bits (ActNN, Chen et al. 2021, arXiv 2104.14129): in
groups of 256, between the group's extremes, with stochastic rounding. The forward pass and the gradient to
the input are exact; the gradient of the weight is unbiased, for it is linear in what was rounded. Inputs of
norms, activations and softmax are kept as they are: their gradients would be biased.

Shape legend: N elements of a tensor  G = ceil(N / 256) groups
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.core import Ctx, Step
from model.items import Visit
from model.lm import LanguageModel
from model.registry import did_you_mean
from model.schema import ConfigError
from model.sections import ActivationsConfig

GROUP = 256


class Packed(NamedTuple):
    """codes: uint8 [G * 256 * bits / 8].  low, step: fp32 [G, 1], value = low + code * step."""

    codes: Tensor
    low: Tensor
    step: Tensor

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self)


def compress(x: Tensor, bits: int, generator: torch.Generator | None = None) -> Packed:
    """x of any shape in `bits` (2, 4, 8) bits, rounded up or down at random so that the mean is x."""
    flat = x.detach().float().flatten()
    groups = nn.functional.pad(flat, (0, -flat.numel() % GROUP)).view(-1, GROUP)
    low, high = groups.aminmax(dim=1, keepdim=True)
    top = 2**bits - 1
    step = ((high - low) / top).clamp_min(1e-30)
    noise = torch.rand(groups.shape, generator=generator, device=x.device)
    codes = ((groups - low) / step + noise).floor_().clamp_(0, top).to(torch.uint8).flatten()
    packed = codes.view(-1, 8 // bits)
    shifts = torch.arange(0, 8, bits, device=x.device, dtype=torch.uint8)
    return Packed((packed << shifts).sum(1, dtype=torch.uint8), low, step)


def restore(packed: Packed, bits: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    shifts = torch.arange(0, 8, bits, device=packed.codes.device, dtype=torch.uint8)
    codes = (packed.codes[:, None] >> shifts) & (2**bits - 1)
    values = codes.view(-1, GROUP).float() * packed.step + packed.low
    return values.flatten()[: shape.numel()].view(shape).to(dtype)


class _Linear(torch.autograd.Function):
    """y = x w' + b, whose backward pass has x from its compressed form."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, bits: int, generator: torch.Generator | None
    ) -> Tensor:
        ctx.bits, ctx.shape, ctx.dtype = bits, x.shape, x.dtype
        kept = compress(x, bits, generator) if ctx.needs_input_grad[1] else ()
        ctx.save_for_backward(weight, *kept)
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:  # type: ignore[override]
        weight, *kept = ctx.saved_tensors
        flat = grad.flatten(0, -2)
        grad_x = grad @ weight if ctx.needs_input_grad[0] else None
        grad_weight = grad_bias = None
        if kept:
            x = restore(Packed(*kept), ctx.bits, ctx.shape, ctx.dtype)
            grad_weight = flat.t() @ x.flatten(0, -2)
        if ctx.needs_input_grad[2]:
            grad_bias = flat.sum(0)
        return grad_x, grad_weight, grad_bias, None, None


class Noise:
    """Random numbers of the rounding, of its own: the training's other draws do not change.

    They follow from (step, layer), so a resumed run rounds alike.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._generators: list[torch.Generator] = []

    def generator(self) -> torch.Generator:
        self._generators.append(torch.Generator(self._device))
        return self._generators[-1]

    def begin(self, step: int) -> None:
        for i, generator in enumerate(self._generators):
            generator.manual_seed((step * 0x9E3779B97F4A7C15 + i * 0x94D049BB133111EB) % 2**63)


class ThriftyLinear(nn.Linear):
    """A Linear that keeps its input in `bits` bits; an nn.Linear becomes one by change of class."""

    bits: int
    generator: torch.Generator

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and torch.is_grad_enabled()):
            return super().forward(x)
        device = x.device.type
        parts: list[Tensor | None] = [x, self.weight, self.bias]
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            parts = [None if part is None else part.to(dtype) for part in parts]
        with torch.autocast(device, enabled=False):
            return _Linear.apply(*parts, self.bits, self.generator)


def install(lm: LanguageModel, config: ActivationsConfig, device: torch.device) -> Noise | None:
    """Make `lm` keep less, as configured; before it is compiled or wrapped. Raises ConfigError.

    Gives the noise of the rounding, None when nothing is compressed.
    """
    lm.around = {site: _rerun for site in sites_named(lm, config.checkpoint, "activations.checkpoint")}
    if config.bits is None:
        return None
    noise = Noise(device)
    visits = lm.plan.sites()
    modules = {visits[site] for site in sites_named(lm, config.only, "activations.only")}
    for name in sorted(modules):
        for layer in lm.bank[name].modules():
            if type(layer) is nn.Linear:
                layer.__class__ = ThriftyLinear
                layer.bits, layer.generator = config.bits, noise.generator()  # type: ignore[assignment]
    return noise


def sites_named(lm: LanguageModel, names: list[str], key: str) -> list[str]:
    """The sites of blocks that a list of names means: of a block kind, a bank module or a site."""
    found, known = [], set()
    for item in lm.plan.walk():
        if isinstance(item, Visit):
            called = {item.site, item.module, lm.plan.modules[item.module].name}
            known |= called
            if called & set(names):
                found.append(item.site)
    if strange := [n for n in names if n not in known]:
        raise ConfigError([f"{key}: no block, module or site {n!r}{did_you_mean(n, known)}" for n in strange])
    return found


def _rerun(module: nn.Module, x: Tensor, ctx: Ctx) -> Step:
    return checkpoint(partial(module), x, None, ctx, use_reentrant=False)
