"""Stage n -> stage n+1: which weights are loaded, which are fresh, which stay frozen.

Names do the work: a bank's names do not depend on what is further in or further on, so a smaller
model's weights have the same names in the larger one. What is checked is that the smaller model really
is a part of the larger: shells by name, body, code and quantizer; plain layers by the sequence of their
visits; heads that both have, and what decides how the token table is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from model.bank import residual_outputs
from model.items import Fade, Item, Visit
from model.lm import LanguageModel
from model.plan import make_plan
from model.quant.adapter import Adapter
from model.schema import Config, ConfigError, OnionNode


@dataclass(frozen=True)
class Growth:
    """What happened to each parameter of the larger model, and what was left behind.

    copied: fresh name -> loaded name whose weights it starts from (`how: copy`).
    faded:  shell -> how far it counts, below 1: its stage ended while it was faded in, and so it stays.
    """

    loaded: list[str]
    fresh: list[str]
    frozen: list[str]
    copied: dict[str, str]
    dropped: list[str]
    faded: dict[str, float]

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
        for shell, s in self.faded.items():
            out.append(
                f"faded   shell {shell} counts for {s:.3f} and stays there: the stage that it grew in was"
                " shorter than its `blend`"
            )
        return out


def load_into(lm: LanguageModel, source: Config, tensors: Mapping[str, Tensor]) -> Growth:
    """Give a larger model the weights of a smaller one.

    tensors: the smaller model's state_dict. Raises ConfigError (with the place in the larger model's
    file) when the smaller is no part of the larger, or a tensor has another shape.
    """
    target = lm.config
    _check_around(target, source)
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
    fades = [i.module for i in lm.plan.walk() if isinstance(i, Fade) and f"bank.{i.module}.s" in loaded]
    reached = {str(lm.plan.modules[name].shell): float(own[f"bank.{name}.s"]) for name in fades}
    return Growth(loaded, fresh, frozen, copied, dropped, {k: s for k, s in reached.items() if s < 1})


# ----------------------------------------------------------------------------- who becomes whom


def _check_around(target: Config, source: Config) -> None:
    """What no weight says, but every logit depends on: around the stack it has to be the same."""
    said: list[tuple[str, object, object]] = [
        ("dim", target.dim, source.dim),
        ("norm_eps", target.norm_eps, source.norm_eps),
        ("optim.mup", target.optim.mup, source.optim.mup),
    ]
    for key in ("project", "tied", "scale", "vq"):
        said.append((f"embed.{key}", getattr(target.embed, key), getattr(source.embed, key)))
    if None in (target.embed.from_, source.embed.from_):  # only pretrained rows are scaled
        said.append(("embed.from", target.embed.from_, source.embed.from_))
    for name in (n for n in target.heads if n in source.heads):
        mine, theirs = target.heads[name], source.heads[name]
        keys = [f.name for f in fields(mine) if f.name != "weight"]
        said += [(f"heads.{name}.{key}", getattr(mine, key), getattr(theirs, key)) for key in keys]
    errors = [
        f"{target.name}: {key}: {_short(mine)}, but {source.name} has {_short(theirs)};"
        " a grown model reads its old weights as they were trained"
        for key, mine, theirs in said
        if mine != theirs
    ]
    if errors:
        raise ConfigError(errors)


def _mapping(target: Config, source: Config) -> dict[str, str]:
    """Bank module of the target -> bank module of the source that it starts from."""
    new, old = _onion(target), _onion(source)
    if (new is None) != (old is None):
        raise ConfigError(
            [f"grow.from: {source.name} and {target.name} are not both onions or both plain stacks"]
        )
    if new is not None and old is not None:
        _check_shells(new, old, source.name)
        _check_outside(target, source)
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


def _check_outside(target: Config, source: Config) -> None:
    """Beside the onion: the same before it, the same after it, where more may follow."""
    new, old = (next(i for i, n in enumerate(c.stack) if isinstance(n, OnionNode)) for c in (target, source))
    after = source.stack[old + 1 :]
    if target.stack[:new] != source.stack[:old] or target.stack[new + 1 :][: len(after)] != after:
        raise ConfigError(
            [
                f"{target.name}: what stands around the onion is not what {source.name} has there;"
                " only after the last of its layers may new ones follow"
            ]
        )


def _layers(target: Config, source: Config) -> dict[str, str]:
    """A deeper plain stack: its first layers are the old ones; the rest are copies, or new.

    `how: zero` appends layers whose output projections are zero, so that no logit changes.
    `how: copy` repeats the old layers in order (stacking, arXiv 2405.15319).
    """
    new, old = _visits(target), _visits(source)
    n = len(old)
    copied = target.grow.how == "copy"
    fits = 0 < n <= len(new) and all(
        v.alike == old[i % n].alike for i, v in enumerate(new if copied else new[:n])
    )
    if not fits:
        raise ConfigError(
            [
                f"{target.name}: the layers of {source.name} are no prefix of its stack"
                f" ({n} layers there: {_kinds(old)}; {len(new)} here: {_kinds(new)})"
            ]
        )
    if copied:
        return {v.module: old[i % n].module for i, v in enumerate(new)}
    again = [v.module for i, v in enumerate(new[n:], n) if i - v.alike[0] < n]
    if again:
        raise ConfigError(
            [
                f"{target.name}: visits {again[0]} of {source.name} once more, which changes every logit;"
                " want new layers"
            ]
        )
    return {}


class _Layer(NamedTuple):
    """A visit of a bank module.

    alike: what must agree: how many visits ago the module came first (0: now), how many brackets stand
           around it, and how it is made.
    """

    module: str
    alike: tuple[int, int, str, int, str]


def _visits(config: Config) -> list[_Layer]:
    """All visits of a plain stack, in order."""
    plan = make_plan(config)
    out: list[_Layer] = []
    first: dict[str, int] = {}

    def add(items: tuple[Item, ...], depth: int) -> None:
        for item in items:
            at, spec = len(out), plan.modules[item.module]
            back = at - first.setdefault(item.module, at)
            params = repr(sorted(spec.params.items()))
            out.append(_Layer(item.module, (back, depth, spec.name, spec.dim, params)))
            if not isinstance(item, Visit):
                add(item.inner, depth + 1)

    add(plan.items, 0)
    return out


def _source_name(name: str, modules: Mapping[str, str]) -> str:
    parts = name.split(".")
    if parts[0] == "bank" and parts[1] in modules:
        parts[1] = modules[parts[1]]
    return ".".join(parts)


def _silence_new_parts(lm: LanguageModel, fresh: list[str]) -> None:
    """New plain layers, and new residual shells, start with zero output, so that the logits stay bit-equal.
    (A shell that replaces its outer code is faded in instead.)"""
    new = dict.fromkeys(n.split(".")[1] for n in fresh if n.startswith("bank."))
    for item in lm.plan.walk():
        if isinstance(item, Fade) and item.module in new:
            _silence_shell(lm, item)
    if _onion(lm.config) is None and lm.config.grow.how != "zero":
        return
    for name in (n for n in new if lm.plan.modules[n].shell is None):
        outputs = residual_outputs(lm.bank[name])
        if not outputs:
            raise ConfigError(
                [f"{lm.config.name}: {name} has no output projection to zero; use `grow: {{how: copy}}`"]
            )
        for linear in outputs:
            torch.nn.init.zeros_(linear.weight)
            if linear.bias is not None:
                torch.nn.init.zeros_(linear.bias)


def _silence_shell(lm: LanguageModel, fade: Fade) -> None:
    """A residual shell's way out gives nothing at first. One that is faded in needs nothing, if it is."""
    (bracket,) = fade.inner
    way_out, spec = lm.bank[bracket.module], lm.plan.modules[fade.module]
    onion = _onion(lm.config)
    assert onion is not None
    shell = next(s for s in onion.onion if s.name == spec.shell)
    if shell.blend.steps and not spec.params["steps"]:
        raise ConfigError(
            [
                f"{shell.mark}: shell {shell.name!r} is new, and so is one inside it: only the innermost is"
                " faded in; grow one shell a stage"
            ]
        )
    if shell.residual and isinstance(way_out, Adapter):
        way_out.zero_exit()
    elif shell.residual and not shell.blend.steps:
        raise ConfigError(
            [
                f"{shell.mark}: shell {shell.name!r} cannot start silent under `reading: whole`;"
                " fade it in with `blend: {steps: N}`"
            ]
        )


# ----------------------------------------------------------------------------- wording


def _kinds(layers: list[_Layer]) -> str:
    kinds = [layer.alike[2] for layer in layers]
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
