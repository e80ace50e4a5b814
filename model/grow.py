"""Stage n -> stage n+1: which weights are loaded, which are fresh, which stay frozen.

Names do the work: a bank's names do not depend on what is further in or further on, so a smaller
model's weights have the same names in the larger one. What is checked is that the smaller model really
is a part of the larger: shells by name, body, code and quantizer; plain layers by their sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from model.bank import residual_outputs
from model.items import Bracket, Cross, Fade, Visit
from model.lm import LanguageModel
from model.plan import make_plan
from model.quant.adapter import Adapter
from model.schema import Config, ConfigError, OnionNode


@dataclass(frozen=True)
class Growth:
    """What happened to each parameter of the larger model, and what was left behind.

    copied: fresh name -> loaded name whose weights it starts from (`how: copy`).
    """

    loaded: list[str]
    fresh: list[str]
    frozen: list[str]
    copied: dict[str, str]
    dropped: list[str]

    def lines(self) -> list[str]:
        """For people: what is listed before training starts."""
        rows = [
            ("loaded", self.loaded),
            ("fresh", self.fresh),
            ("frozen", self.frozen),
            ("dropped", self.dropped),
        ]
        out = []
        for title, names in rows:
            if names:
                out.append(f"{title:8}{len(names):4} tensors  {_summary(names)}")
        if self.copied:
            out.append(f"{'copied':8}{len(self.copied):4} tensors  {_summary(sorted(self.copied))}")
        return out


def load_into(lm: LanguageModel, source: Config, tensors: Mapping[str, Tensor]) -> Growth:
    """Give a larger model the weights of a smaller one.

    tensors: the smaller model's state_dict. Raises ConfigError (with the place in the larger model's
    file) when the smaller is no part of the larger, or a tensor has another shape.
    """
    target = lm.config
    names = _mapping(target, source)
    own = dict(lm.state_dict())
    errors: list[str] = []
    loaded, copied, dropped = [], {}, []
    used: dict[str, str] = {}
    with torch.no_grad():
        for name, tensor in own.items():
            old = _source_name(name, names)
            if old not in tensors:
                continue
            if tensors[old].shape != tensor.shape:
                errors.append(
                    f"{target.name}: {name} has shape {list(tensor.shape)}, but {source.name} has"
                    f" {list(tensors[old].shape)}; a grown model keeps the shapes of what it grew from"
                )
                continue
            tensor.copy_(tensors[old])
            used[old] = name
            if old == name:
                loaded.append(name)
            else:
                copied[name] = old
    dropped = [n for n in tensors if n not in used]
    bad = [n for n in dropped if not n.startswith("heads.")]
    errors += [f"{source.name}: {n} has no place in {target.name}" for n in bad]
    if errors:
        raise ConfigError(errors)
    have = set(loaded) | set(copied)
    fresh = [n for n in own if n not in have]
    _silence_new_parts(lm, fresh)
    frozen = [n for n, p in lm.named_parameters() if not p.requires_grad]
    return Growth(loaded, fresh, frozen, copied, dropped)


# ----------------------------------------------------------------------------- who becomes whom


def _mapping(target: Config, source: Config) -> dict[str, str]:
    """Bank module of the target -> bank module of the source that it starts from."""
    if target.dim != source.dim:
        raise ConfigError([f"{target.name}: dim: {target.dim}, but {source.name} has dim: {source.dim}"])
    new, old = _onion(target), _onion(source)
    if (new is None) != (old is None):
        raise ConfigError(
            [f"grow.from: {source.name} and {target.name} are not both onions or both plain stacks"]
        )
    if new is not None and old is not None:
        _check_shells(new, old, source.name)
        return {}
    return _layers(target, source)


def _onion(config: Config) -> OnionNode | None:
    return next((n for n in config.stack if isinstance(n, OnionNode)), None)


def _check_shells(new: OnionNode, old: OnionNode, source: str) -> None:
    """The old shells, compared by name, body, to and quant, must be a prefix of the new ones."""
    errors = []
    if new.reading != old.reading and len(old.onion) > 1:  # one shell reads the same either way
        errors.append(f"{new.mark}: reading: {new.reading}, but {source} was trained with {old.reading}")
    if len(old.onion) > len(new.onion):
        errors.append(f"{new.mark}: {len(new.onion)} shells, but {source} has {len(old.onion)}")
    for a, b in zip(new.onion, old.onion, strict=False):
        for key in ("name", "body", "to", "quant", "width", "tie", "residual", "merging"):
            mine, theirs = getattr(a, key), getattr(b, key)
            if mine != theirs:
                errors.append(
                    f"{a.mark}: shell {a.name!r} differs from {source}'s in `{key}`"
                    f" ({_short(mine)} here, {_short(theirs)} there); old shells must be a prefix of the new"
                )
    if errors:
        raise ConfigError(errors)


def _layers(target: Config, source: Config) -> dict[str, str]:
    """A deeper plain stack: its first layers are the old ones; the rest are copies, or new.

    `how: zero` appends layers whose output projections are zero, so that no logit changes.
    `how: copy` repeats the old layers in order (stacking, arXiv 2405.15319).
    """
    new, old = _bank_layers(target), _bank_layers(source)
    want = [spec for _, spec in old]
    have = [spec for _, spec in new]
    whole = len(old) > 0 and len(new) >= len(old)
    period_fits = all(have[i] == want[i % len(want)] for i in range(len(have))) if whole else False
    if not whole or have[: len(want)] != want or (target.grow.how == "copy" and not period_fits):
        raise ConfigError(
            [
                f"{target.name}: the layers of {source.name} are no prefix of its stack"
                f" ({len(old)} layers there: {_kinds(old)}; {len(new)} here: {_kinds(new)})"
            ]
        )
    if target.grow.how == "copy":
        return {name: old[i % len(old)][0] for i, (name, _) in enumerate(new)}
    return {}


def _bank_layers(config: Config) -> list[tuple[str, tuple]]:
    """Bank blocks in order of first visit: (name, what must agree)."""
    plan = make_plan(config)
    seen: dict[str, tuple] = {}
    for item in plan.walk():
        if isinstance(item, Visit | Cross) and item.module not in seen:
            spec = plan.modules[item.module]
            seen[item.module] = (spec.name, spec.dim, repr(sorted(spec.params.items())))
    return list(seen.items())


def _source_name(name: str, modules: Mapping[str, str]) -> str:
    parts = name.split(".")
    if parts[0] == "bank" and parts[1] in modules:
        parts[1] = modules[parts[1]]
    return ".".join(parts)


def _silence_new_parts(lm: LanguageModel, fresh: list[str]) -> None:
    """New layers of a plain stack, and new residual shells, start with zero output, so that the logits
    stay bit-equal. (A shell that replaces its outer code is faded in instead.)"""
    new = dict.fromkeys(n.split(".")[1] for n in fresh if n.startswith("bank."))
    for item in lm.plan.walk():
        if isinstance(item, Fade) and item.residual and item.module in new:
            for adapter in (i for i in item.inner if isinstance(i, Bracket)):
                cast(Adapter, lm.bank[adapter.module]).zero_exit()
    if _onion(lm.config) is not None or lm.config.grow.how != "zero":
        return
    for name in new:
        outputs = residual_outputs(lm.bank[name])
        if not outputs:
            raise ConfigError(
                [f"{lm.config.name}: {name} has no output projection to zero; use `grow: {{how: copy}}`"]
            )
        for linear in outputs:
            torch.nn.init.zeros_(linear.weight)
            if linear.bias is not None:
                torch.nn.init.zeros_(linear.bias)


# ----------------------------------------------------------------------------- wording


def _kinds(layers: list[tuple[str, tuple]]) -> str:
    kinds = [spec[0] for _, spec in layers]
    return " ".join(kinds[:8]) + (" ..." if len(kinds) > 8 else "")


def _summary(names: list[str]) -> str:
    """Module names with how many tensors each has: `bank.s1_0_samba (24)`."""
    counts: dict[str, int] = {}
    for name in names:
        parts = name.split(".")
        key = ".".join(parts[:2]) if parts[0] in ("bank", "heads") else parts[0]
        counts[key] = counts.get(key, 0) + 1
    return ", ".join(f"{k} ({n})" for k, n in counts.items())


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
