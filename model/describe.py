"""What an architecture is, before anything is trained: sites, parameters, FLOPs, state, bits.

The model is built on the meta device, so a description takes no memory and reads no weights. Parameters
are counted once per bank module; a later visit is `shared`. FLOPs and state are counted per visit.

Shape legend: T tokens of context  V vocabulary  W width of pretrained rows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import torch
from torch import nn

from model import config as configs
from model.build import DEFAULT_VOCAB, build
from model.flops import SiteCost, site_costs
from model.heads import Head
from model.hub import SourceError, table_shape
from model.items import Cross, Fade, Item, Visit
from model.lm import LanguageModel
from model.quant.base import Quantizer
from model.schema import Config, ConfigError

H = TypeVar("H", bound=Hashable)


@dataclass(frozen=True)
class Site:
    """One visit of one bank module.

    kind:       embed | visit | bracket | memory | head.    depth: how many brackets stand around it.
    parameters: of the module, 0 where it was visited before (`shared`).
    frozen:     it has parameters, and none of them is trained.
    flops, training: forward, and forward with backward, per token of the outermost length.
    state_fixed, state_per_token: bytes per row in fp32.
    bits:       of a quantizer's codes per token of the outermost length, else None.
    """

    site: str
    module: str
    block: str
    kind: str
    depth: int
    shape: str
    parameters: int
    shared: bool = False
    frozen: bool = False
    flops: float = 0.0
    training: float = 0.0
    state_fixed: float = 0.0
    state_per_token: float = 0.0
    bits: float | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Description:
    """A model's sites in order, its totals, and the model itself (on the meta device)."""

    lm: LanguageModel
    context: int
    sites: list[Site]
    notes: tuple[str, ...] = ()

    def total(self, field: str) -> float:
        return sum(getattr(site, field) for site in self.sites)

    def parameters(self) -> dict[str, int]:
        every = list(self.lm.parameters())
        trained = sum(p.numel() for p in every if p.requires_grad)
        total = sum(p.numel() for p in every)
        embed = sum(p.numel() for p in self.lm.embed.parameters())
        return {"total": total, "trained": trained, "frozen": total - trained, "embedding": embed}

    def state_bytes(self, tokens: int) -> float:
        """Bytes of a row's state after `tokens` tokens, in fp32."""
        return self.total("state_fixed") + tokens * self.total("state_per_token")

    def json(self) -> dict[str, Any]:
        """Everything as plain data."""
        cfg = self.lm.config
        return {
            "name": cfg.name,
            "digest": configs.digest(cfg),
            "arch_digest": configs.arch_digest(cfg),
            "dim": cfg.dim,
            "vocab": self.lm.vocab,
            "context": self.context,
            "diagram": diagram(self.lm),
            "parameters": self.parameters(),
            "flops_per_token": {"forward": self.total("flops"), "training": self.total("training")},
            "state_bytes": {
                "fixed": self.total("state_fixed"),
                "per_token": self.total("state_per_token"),
                "at_context": self.state_bytes(self.context),
            },
            "bits_per_token": {s.site: s.bits for s in self.sites if s.bits is not None},
            "notes": list(self.notes),
            "sites": [asdict(site) for site in self.sites],
            "config": configs.dump(cfg),
        }


def describe(config: Config, *, vocab: int | None = None, context: int = 1024) -> Description:
    """Describe what `config` builds, at `context` tokens a row.

    vocab: default the configuration's, or the pretrained table's, or SmolLM2's.
    Raises ConfigError for whatever `build` refuses.
    """
    if context < 1:
        raise ValueError(f"context: want at least 1, got {context}")
    table, notes = None, []
    if config.embed.from_ is not None:
        try:
            shape = table_shape(config.embed.from_)
        except SourceError as error:
            raise ConfigError([f"{config.name}: embed.from: {error}"]) from error
        if shape is None:
            shape = (DEFAULT_VOCAB, config.dim)
            notes.append(f"embed.from: {config.embed.from_} is not here; its rows count as {config.dim} wide")
        table = torch.empty(vocab or config.vocab or shape[0], shape[1], device="meta")
    with torch.device("meta"):
        lm = build(config, vocab=vocab, table=table)
    if vocab is None and config.vocab is None:
        notes.append(f"vocab: {lm.vocab} is assumed; a dataset decides (--vocab N)")
    walker = _Walker(lm, context)
    walker.embed()
    walker.items(lm.plan.items)
    walker.heads()
    return Description(lm, context, walker.sites, tuple(notes))


class _Walker:
    """Sites in order of execution, beside the costs that `model.flops` counts in the same order."""

    def __init__(self, lm: LanguageModel, context: int) -> None:
        self.lm, self.context = lm, context
        self.costs = {c.site: c for c in site_costs(lm, context)}
        self.sites: list[Site] = []
        self.seen: set[str] = set()

    def add(self, item: Site, module: nn.Module, cost: SiteCost | None, share: float = 1.0) -> None:
        """share: positions at this site per token outside."""
        params = list(module.parameters())
        shared = item.module in self.seen
        self.seen.add(item.module)
        if cost is not None:
            item = replace(
                item,
                flops=cost.forward / self.context,
                training=cost.training / self.context,
                state_fixed=cost.cost.state_fixed,
                state_per_token=cost.cost.state_per_token * share,
            )
        frozen = bool(params) and not any(p.requires_grad for p in params)
        notes: tuple[str, ...] = getattr(module, "notes", ())  # what it has to say of itself
        marks = [word for word, on in (("shared", shared), ("frozen", frozen)) if on and params]
        count = 0 if shared else sum(p.numel() for p in params)
        self.sites.append(
            replace(item, parameters=count, shared=shared, frozen=frozen, notes=(*marks, *item.notes, *notes))
        )

    def embed(self) -> None:
        embed, cfg = self.lm.embed, self.lm.config.embed
        rows = f"{embed.vocab} × {embed.width}"
        shape = rows if embed.project is None else f"{rows} → {embed.dim}"
        notes = [f"rows of {cfg.from_}"] if cfg.from_ else []
        if cfg.vq is not None:
            bits, whole = embed.stored_bits, 32 * embed.vocab * embed.width
            each = f"{cfg.vq.groups} codes of {math.log2(cfg.vq.codes):g} bits a row"
            notes.append(f"{each}; {size_of(bits / 8)} with their tables, {size_of(whole / 8)} whole")
        if not embed.weight.requires_grad and any(p.requires_grad for p in embed.parameters()):
            notes.append("rows frozen")
        notes.append("tied to the logits" if cfg.tied else "logits have their own table")
        self.add(Site("embed", "embed", "embed", "embed", 0, shape, 0, notes=tuple(notes)), embed, None)

    def items(
        self, items: Sequence[Item], depth: int = 0, share: float = 1.0, notes: tuple[str, ...] = ()
    ) -> None:
        """share: positions here per token outside. notes: of the fade around these items."""
        for item in items:
            module, spec = self.lm.bank[item.module], self.lm.plan.modules[item.module]
            if isinstance(item, Fade):
                self.items(item.inner, depth, share, _fade_notes(item, spec.params))
                continue
            cost, name = self.costs[item.site], spec.name
            if isinstance(item, Visit):
                site = Site(item.site, item.module, name, "visit", depth, str(spec.dim), 0, notes=notes)
                self.add(site, module, cost, share)
                continue
            if isinstance(item, Cross):
                skip = "a prefill runs the cross half on the last token alone"
                noted = (skip, *notes) if item.skip else notes
                shape = f"{spec.dim} → 2 × {module.heads} × {module.head_dim}"
                site = Site(item.site, item.module, name, "memory", depth, shape, 0, notes=noted)
                self.add(site, module, cost, share)
                self.items(item.inner, depth + 1, share)
                continue
            merge = float(getattr(module, "merge", 1))
            shape = f"{spec.dim} → {module.code_dim}" + (f", T/{merge:g}" if merge > 1 else "")
            site = Site(item.site, item.module, name, "bracket", depth, shape, 0, notes=notes)
            if isinstance(module, Quantizer):
                site = replace(site, bits=module.bits_per_token * share)
            if item.turned:
                site = replace(site, notes=("exit first, then enter", *notes))
            self.add(site, module, cost, share)
            self.items(item.inner, depth + 1, share / merge)

    def heads(self) -> None:
        for name, head in self.lm.named_heads():
            site = f"heads.{name}"
            shape = f"{self.lm.config.dim} → {self.lm.vocab}"
            reads = head.readouts.values()
            shifts = ", ".join(f"+{read.shift}" for read in reads)
            draft = (f"drafts {head.reach}",) if head.reach else ()
            notes = (f"token {shifts}, weight {next(iter(reads)).weight:g}", *draft)
            self.add(Site(site, site, _kind(head), "head", 0, shape, 0, notes=notes), head, self.costs[site])


def _kind(head: Head) -> str:
    """`head`, or the kind of one that predicts several tokens."""
    return type(head).__name__.removesuffix("Head").lower().replace("single", "head")


def _fade_notes(item: Fade, params: dict[str, Any]) -> tuple[str, ...]:
    how = "residual: the outer code bypasses it" if item.residual else ""
    steps = f"blended in over {params['steps']} steps" if params["steps"] else ""
    return tuple(note for note in (how, steps) if note)


# ----------------------------------------------------------------------------- text


def fold(items: Sequence[H]) -> list[tuple[int, list[H]]]:
    """The items as (n, group) runs: each group stands n times in a row; the longest run first."""
    out: list[tuple[int, list[H]]] = []
    i = 0
    while i < len(items):
        times, period = 1, 1
        for p in range(1, (len(items) - i) // 2 + 1):
            n = 1
            while items[i + n * p : i + (n + 1) * p] == items[i : i + p]:
                n += 1
            if n > 1 and n * p > times * period:
                times, period = n, p
        out.append((times, list(items[i : i + period])))
        i += times * period
    return out


def diagram(lm: LanguageModel) -> str:
    """One line: `embed* s1.samba* s1.int8*> +( s2.samba ) <s1.int8* s1.samba* heads`.

    `q> ... <q` is a bracket, `*` is frozen, `+( )` adds to the code around it, `6×( )` stands six times,
    `memory[ ]` is a yoco's memory around the blocks that read it.
    """
    embed_frozen = not any(p.requires_grad for p in lm.embed.parameters())
    return " ".join(["embed" + "*" * embed_frozen, *_words(lm, lm.plan.items), "heads"])


def _words(lm: LanguageModel, items: Sequence[Item]) -> list[str]:
    words: list[str] = []
    for item in items:
        name = label(lm, item.module)
        if isinstance(item, Visit):
            words.append(name)
        elif isinstance(item, Fade):
            inner = _words(lm, item.inner)
            words.extend(["+(", *inner, ")"] if item.residual else inner)
        elif isinstance(item, Cross):
            words.extend([f"{name}[", *_words(lm, item.inner), "]"])
        else:
            ends = (f"<{name}", f"{name}>") if item.turned else (f"{name}>", f"<{name}")
            words.extend([ends[0], *_words(lm, item.inner), ends[1]])
    return [w for n, group in fold(words) for w in (group if n == 1 else [f"{n}×({' '.join(group)})"])]


def label(lm: LanguageModel, module: str) -> str:
    """A short name of a bank module: its block's (`mamba2`), with its shell (`s1.samba`); `*` if frozen."""
    spec = lm.plan.modules[module]
    counted = re.fullmatch(r"b\d+_(.+)", module)
    name = f"{spec.shell}.{spec.name}" if spec.shell else counted.group(1) if counted else module
    return name + "*" * spec.frozen


def mermaid(description: Description) -> str:
    """A flowchart: one node a visit, a subgraph a bracket, dotted lines for what bypasses a shell."""
    return _Mermaid(description).text()


class _Mermaid:
    def __init__(self, description: Description) -> None:
        self.sites = {site.site: site for site in description.sites}
        self.lm = description.lm
        self.lines = ["flowchart TD", "  classDef frozen stroke-dasharray: 4 3,fill:#eef"]
        self.count = 0

    def text(self) -> str:
        last = self.items(self.lm.plan.items, self.box("embed", "", self.sites["embed"]), "  ")
        for name in self.lm.heads:
            self.box(f"heads.{name}", last, self.sites[f"heads.{name}"])
        return "\n".join(self.lines) + "\n"

    def box(self, text: str, after: str, site: Site | None = None, indent: str = "  ") -> str:
        """A node after another one; the name of the new node."""
        node = f"n{self.count}"
        self.count += 1
        if site is not None:
            text += f"<br/>{site.shape}" + (f"<br/>{si(site.parameters)}" if site.parameters else "")
            text += "<br/>shared" if site.shared and site.notes else ""
        text = text.replace('"', "#quot;")
        style = ":::frozen" if site is not None and site.frozen else ""
        self.lines.append(f'{indent}{node}["{text}"]{style}')
        if after:
            self.lines.append(f"{indent}{after} --> {node}")
        return node

    def items(self, items: Sequence[Item], last: str, indent: str) -> str:
        for item in items:
            if isinstance(item, Visit):
                last = self.box(item.site, last, self.sites[item.site], indent)
            elif isinstance(item, Fade):
                inner = self.items(item.inner, last, indent)
                node = self.box("+" if item.residual else "blend", inner, None, indent)
                self.lines.append(f"{indent}{last} -.-> {node}")
                last = node
            elif isinstance(item, Cross):
                memory = self.box(item.site, last, self.sites[item.site], indent)
                self.lines.append(f'{indent}subgraph g{self.count}["cross half"]')
                last = self.items(item.inner, memory, indent + "  ")
                self.lines.append(f"{indent}end")
            else:
                first, second = ("exit", "enter") if item.turned else ("enter", "exit")
                title = item.site.replace('"', "#quot;")
                self.lines.append(f'{indent}subgraph g{self.count}["{title}"]')
                inside = self.box(first, last, self.sites[item.site], indent + "  ")
                inside = self.items(item.inner, inside, indent + "  ")
                last = self.box(second, inside, None, indent + "  ")
                self.lines.append(f"{indent}end")
        return last


def si(value: float) -> str:
    """Three digits and a unit: 1.24M."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= 0.9995 * size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.0f}"


def size_of(value: float) -> str:
    """Bytes in binary units: 165 KiB."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= size:
            return f"{value / size:.3g} {unit}" if value < 999.5 * size else f"{value / size:.0f} {unit}"
    return f"{value:.0f} B"
