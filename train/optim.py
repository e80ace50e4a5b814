"""Optimizers: parameter groups, a table of factories, and state by parameter name.

State is kept by name and not by position, so that it survives a change of group order and can be followed
when a model grows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from model.registry import did_you_mean
from model.schema import ConfigError
from model.sections import OptimConfig

Group = dict[str, Any]


def adamw(groups: list[Group], config: OptimConfig) -> torch.optim.Optimizer:
    """Decoupled weight decay (Loshchilov & Hutter 2019); the fused kernel serves CPU and CUDA."""
    beta1, beta2 = config.betas
    return torch.optim.AdamW(groups, lr=config.lr, betas=(beta1, beta2), eps=config.eps, fused=True)


OPTIMIZERS: dict[str, Callable[[list[Group], OptimConfig], torch.optim.Optimizer]] = {"adamw": adamw}


def build(
    model: nn.Module, config: OptimConfig, no_decay: set[str], lr_scales: Mapping[str, float]
) -> torch.optim.Optimizer:
    """An optimizer over the trainable parameters of `model`.

    no_decay:  names that take no weight decay.
    lr_scales: factor on the learning rate by name; 1 for a name that is not in it.
    Groups carry `names` (in the order of `params`) and `lr_scale`.
    Raises ConfigError for an optimizer that does not exist, and when nothing is trainable.
    """
    if config.name not in OPTIMIZERS:
        raise ConfigError(
            [f"optim.name: no optimizer {config.name!r}{did_you_mean(config.name, OPTIMIZERS)}"]
        )
    if len(config.betas) != 2:
        raise ConfigError([f"optim.betas: want two numbers, got {config.betas}"])
    groups: dict[tuple[bool, float], Group] = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        decays, scale = name not in no_decay, float(lr_scales.get(name, 1.0))
        fresh: Group = {"params": [], "names": [], "lr_scale": scale}
        group = groups.setdefault((decays, scale), {**fresh, "weight_decay": config.decay if decays else 0.0})
        group["params"].append(p)
        group["names"].append(name)
    if not groups:
        raise ConfigError(["the model has no trainable parameter; unfreeze something"])
    return OPTIMIZERS[config.name]([groups[key] for key in sorted(groups)], config)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def named_parameters(optimizer: torch.optim.Optimizer) -> Iterable[tuple[str, nn.Parameter]]:
    for group in optimizer.param_groups:
        yield from zip(group["names"], group["params"])


def parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for _, p in named_parameters(optimizer)]


def state_by_name(optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """{parameter name: {moment: tensor}}; a parameter that was never stepped has no entry."""
    return {n: dict(optimizer.state[p]) for n, p in named_parameters(optimizer) if optimizer.state.get(p)}


def load_by_name(optimizer: torch.optim.Optimizer, state: Mapping[str, Mapping[str, Any]]) -> None:
    """Put state back by parameter name. Raises ValueError when names or shapes differ."""
    mine = dict(named_parameters(optimizer))
    if strange := sorted(set(state) - set(mine)):
        raise ValueError(f"optimizer state of parameters that are not trained here: {strange[:5]}")
    for name, moments in state.items():
        p = mine[name]
        for key, value in moments.items():
            if isinstance(value, Tensor) and value.dim() and value.shape != p.shape:
                raise ValueError(
                    f"optimizer state {key} of {name}: shape {list(value.shape)}, want {list(p.shape)}"
                )
        optimizer.state[p] = {
            k: v.to(p.device, copy=True) if isinstance(v, Tensor) else v for k, v in moments.items()
        }
