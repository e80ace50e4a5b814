"""Parameter groups: which parameter learns how, and the optimizer's state by parameter name.

State is kept by name and not by position, so that it survives a change of group order and can be followed
when a model grows. What an optimizer counts per group (its steps) is kept with every name of the group.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from train.sharding import like

Group = dict[str, Any]

# Counters that optimizers keep in their groups: optimi's step, schedule-free's, and ours.
GROUP_STATE = ("step", "setup", "k", "weight_sum", "lr_max")
GROUP = "group/"  # a name's entry `group/KEY` is of its group
TRAINED = "y"  # schedule-free: the weights that gradients are taken at


@dataclass(frozen=True)
class Traits:
    """What a model says about its parameters, by name; a name that is not there has the default.

    no_decay:  take no weight decay.
    matrix:    weights of hidden linear layers, [out, in]: what Muon orthogonalises and Kahan keeps in bf16.
    rows:      equal blocks of rows that share one step size in Adam-mini (heads); 0: one for each element.
               Default 1: one for the tensor.
    lr_scale:  factor on the learning rate.     decay_scale: factor on the weight decay.
    """

    no_decay: set[str] = field(default_factory=set)
    matrix: set[str] = field(default_factory=set)
    rows: Mapping[str, int] = field(default_factory=dict)
    lr_scale: Mapping[str, float] = field(default_factory=dict)
    decay_scale: Mapping[str, float] = field(default_factory=dict)


def traits_of(model: nn.Module, no_decay: set[str], lr_scale: Mapping[str, float]) -> Traits:
    """Read off a model what its modules declare: `no_decay` is the caller's, `row_groups` the blocks'."""
    matrix: set[str] = set()
    rows: dict[str, int] = {}
    for path, module in model.named_modules():
        dot = f"{path}." if path else ""
        if isinstance(module, nn.Linear) and not path.startswith("embed"):
            matrix.add(f"{dot}weight")
        rows |= {f"{dot}{name}": count for name, count in getattr(module, "row_groups", {}).items()}
    rows |= {name: 0 for name, _ in model.named_parameters() if name.startswith("embed")}
    return Traits(no_decay, matrix, rows, lr_scale)


def groups_of(model: nn.Module, traits: Traits, decay: float) -> list[Group]:
    """Groups of the trainable parameters, in a fixed order.

    A group carries `names` (in the order of `params`), `lr_scale`, `weight_decay`, `matrix` and `rows`.
    """
    groups: dict[tuple[bool, bool, float, float, int], Group] = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        decays = name not in traits.no_decay
        matrix = name in traits.matrix and p.dim() == 2
        scale = float(traits.lr_scale.get(name, 1.0))
        share = decay * traits.decay_scale.get(name, 1.0) if decays else 0.0
        rows = traits.rows.get(name, 1)
        fresh: Group = {"params": [], "names": [], "lr_scale": scale, "weight_decay": share}
        group = groups.setdefault(
            (decays, matrix, scale, share, rows), fresh | {"matrix": matrix, "rows": rows}
        )
        group["params"].append(p)
        group["names"].append(name)
    return [groups[key] for key in sorted(groups)]


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
    out: dict[str, dict[str, Any]] = {}
    for group in optimizer.param_groups:
        found = {k: group[k] for k in GROUP_STATE if k in group}
        shared = {f"{GROUP}{k}": v.item() if isinstance(v, Tensor) else v for k, v in found.items()}
        for name, p in zip(group["names"], group["params"]):
            own = {k: v for k, v in optimizer.state.get(p, {}).items() if k != "group"}
            if own and hasattr(optimizer, "averages"):
                own[TRAINED] = p.detach()  # the model's own tensors are saved as the average
            if own:
                out[name] = own | shared
    return out


def load_by_name(optimizer: torch.optim.Optimizer, state: Mapping[str, Mapping[str, Any]]) -> None:
    """Put state back by parameter name. Raises ValueError when names or shapes differ."""
    mine = dict(named_parameters(optimizer))
    if strange := sorted(set(state) - set(mine)):
        raise ValueError(f"optimizer state of parameters that are not trained here: {strange[:5]}")
    for group in optimizer.param_groups:
        for name, p in zip(group["names"], group["params"]):
            if name in state:
                _load_one(optimizer, group, name, p, state[name])


def _load_one(
    optimizer: torch.optim.Optimizer, group: Group, name: str, p: nn.Parameter, saved: Mapping[str, Any]
) -> None:
    own: dict[str, Any] = {}
    for key, value in saved.items():
        if key.startswith(GROUP):
            key = key.removeprefix(GROUP)
            group[key] = torch.tensor(value, dtype=torch.int32) if key == "step" else value  # optimi's
            continue
        if key == TRAINED:
            p.data.copy_(like(value, p.data))
            continue
        factor = key in ("row", "col", "block_sq")  # factored moments have a shape of their own
        if isinstance(value, Tensor) and value.dim() and value.shape != p.shape and not factor:
            raise ValueError(
                f"optimizer state {key} of {name}: shape {list(value.shape)}, want {list(p.shape)}"
            )
        if isinstance(value, Tensor):
            value = like(value, p) if value.shape == p.shape else value.to(p.device, copy=True)
        own[key] = value
    if "group" in optimizer.state.get(p, {}):
        own["group"] = group  # optimi's gradient release looks its group up here
    optimizer.state[p] = own
