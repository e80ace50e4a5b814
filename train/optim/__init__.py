"""Optimizers: a table of factories over parameter groups.

groups.py        what learns how; state by name     muon.py  adam_mini.py  adalomo.py  schedulefree.py
release.py       update inside the backward pass    wiener.py  the Wiener gain     mup.py  width scaling
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from model.registry import did_you_mean
from model.schema import ConfigError
from model.sections import OptimConfig
from train.optim.adalomo import AdaLomo
from train.optim.adam_mini import AdamMini
from train.optim.groups import (
    Group,
    groups_of,
    load_by_name,
    named_parameters,
    parameters,
    set_lr,
    state_by_name,
    traits_of,
)
from train.optim.muon import Muon
from train.optim.schedulefree import ScheduleFree, averaged

__all__ = [
    "OPTIMIZERS", "Group", "averaged", "build", "load_by_name", "named_parameters", "narrow", "parameters",
    "set_lr", "state_by_name",
]  # fmt: skip

Factory = Callable[[list[Group], OptimConfig], torch.optim.Optimizer]


def _adamw(groups: list[Group], config: OptimConfig) -> torch.optim.Optimizer:
    """Decoupled weight decay (Loshchilov & Hutter 2019); the fused kernel serves CPU and CUDA."""
    return torch.optim.AdamW(groups, lr=config.lr, betas=_betas(config), eps=config.eps, fused=True)


def _muon(groups: list[Group], config: OptimConfig) -> torch.optim.Optimizer:
    return Muon(groups, config.lr, config.momentum, _betas(config), config.eps)


def _schedulefree(groups: list[Group], config: OptimConfig) -> torch.optim.Optimizer:
    return ScheduleFree(groups, config.lr, _betas(config), config.eps)


def _adam_mini(groups: list[Group], config: OptimConfig) -> torch.optim.Optimizer:
    try:
        return AdamMini(groups, config.lr, _betas(config), config.eps)
    except ValueError as error:
        raise ConfigError([f"optim.name: adam_mini: {error}"]) from error


def _adalomo(groups: list[Group], config: OptimConfig) -> torch.optim.Optimizer:
    return AdaLomo(groups, config.lr)


def _optimi(name: str) -> Factory:
    """An optimizer of the torch-optimi package; its Kahan summation and gradient release come with it."""

    def factory(groups: list[Group], config: OptimConfig) -> torch.optim.Optimizer:
        import optimi as package
        from optimi.utils import HAS_TRITON

        options: dict[str, Any] = {"lr": config.lr, "betas": tuple(config.betas), "weight_decay": 0.0}
        if name != "Lion":
            options["eps"] = config.eps
        cuda = any(p.is_cuda for group in groups for p in group["params"])
        return getattr(package, name)(
            groups,
            kahan_sum=config.kahan,
            gradient_release=config.release,
            foreach=False,
            triton=cuda and HAS_TRITON,
            **options,
        )

    return factory


OPTIMIZERS: dict[str, Factory] = {
    "adamw": _adamw,
    "muon": _muon,
    "stableadamw": _optimi("StableAdamW"),
    "lion": _optimi("Lion"),
    "adan": _optimi("Adan"),
    "schedulefree": _schedulefree,
    "adam_mini": _adam_mini,
    "adalomo": _adalomo,
}


def build(
    model: nn.Module,
    config: OptimConfig,
    no_decay: set[str],
    lr_scales: Mapping[str, float],
    decay_scales: Mapping[str, float] | None = None,
) -> torch.optim.Optimizer:
    """An optimizer over the trainable parameters of `model`.

    no_decay:     names that take no weight decay.
    lr_scales:    factor on the learning rate by name; 1 for a name that is not in it.
    decay_scales: the same for the weight decay.
    Groups carry `names` (in the order of `params`) and `lr_scale`.
    Raises ConfigError for an optimizer that does not exist, and when nothing is trainable.
    """
    if config.name not in OPTIMIZERS:
        raise ConfigError(
            [f"optim.name: no optimizer {config.name!r}{did_you_mean(config.name, OPTIMIZERS)}"]
        )
    if len(config.betas) != (3 if config.name == "adan" else 2):
        raise ConfigError([f"optim.betas: {config.name} cannot do with {config.betas}"])
    traits = replace(traits_of(model, no_decay, lr_scales), decay_scale=decay_scales or {})
    if config.name != "muon":
        traits = replace(traits, matrix=set())  # no group is split for what nobody reads
    if config.name != "adam_mini":
        traits = replace(traits, rows={})
    groups = groups_of(model, traits, config.decay)
    if not groups:
        raise ConfigError(["the model has no trainable parameter; unfreeze something"])
    return OPTIMIZERS[config.name](groups, config)


def narrow(model: nn.Module) -> None:
    """Make the weights of hidden linear layers bf16, for Kahan summation; before the model is wrapped."""
    names = traits_of(model, set(), {}).matrix
    for name, p in model.named_parameters():
        if name in names:
            p.data = p.data.to(torch.bfloat16)


def _betas(config: OptimConfig) -> tuple[float, float]:
    return cast(tuple[float, float], tuple(config.betas))
