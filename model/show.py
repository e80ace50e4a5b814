"""Tables on the terminal: what an architecture is made of, and which backends there are."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import replace

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from model import config as configs
from model import ops
from model.describe import Description, Site, diagram, fold, si, size_of
from model.ops.select import OPERATORS, Backend

COLUMNS = ("", "site", "block", "shape", ">parameters", ">FLOPs/token", ">state", ">+ a token", "notes")


def _console() -> Console:
    """As wide as any table, so that nothing is cut; a narrow terminal wraps."""
    return Console(width=1000, highlight=False, soft_wrap=True)


def _table(*columns: str) -> Table:
    """Columns by name; a leading `>` aligns to the right."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        side = "right" if column.startswith(">") else "left"
        table.add_column(column.lstrip(">"), justify=side, no_wrap=True)  # type: ignore[arg-type]
    return table


def _print(out: Console, table: Table) -> None:
    """A table without blanks at the ends of its lines."""
    with out.capture() as captured:
        out.print(table)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()), end="\n\n")


def show(description: Description, expand: bool = False) -> None:
    """Print the description; runs of equal sites are folded into one with their number, unless `expand`."""
    out, cfg, sites = _console(), description.lm.config, description.sites
    out.print(f"[bold]{escape(cfg.name)}[/bold]  dim {cfg.dim}  vocab {description.lm.vocab}", end="")
    out.print(f"  digest {configs.digest(cfg)[:12]}  arch {configs.arch_digest(cfg)[:12]}")
    out.print(escape(diagram(description.lm)), style="cyan", end="\n\n")
    table, at = _table(*COLUMNS), 0
    alike = [replace(site, site="", module="") for site in sites]
    for times, group in [(1, alike)] if expand else fold(alike):
        for i, site in enumerate(sites[at : at + len(group)]):
            bar = "" if times == 1 else "|" if i else f"{times} ×"
            table.add_row(bar, *_row(site))
        at += times * len(group)
    _print(out, table)
    _totals(out, description)


def _row(site: Site) -> list[str]:
    notes = list(site.notes)
    if site.bits is not None:
        notes.insert(0, f"{site.bits:g} bits/token")
    return [
        "  " * site.depth + escape(site.site),
        site.block,
        site.shape,
        si(site.parameters) if site.parameters else "-",
        si(site.flops) if site.flops else "-",
        size_of(site.state_fixed) if site.state_fixed else "-",
        size_of(site.state_per_token) if site.state_per_token else "-",
        escape(", ".join(notes)),
    ]


def _totals(out: Console, d: Description) -> None:
    p = d.parameters()
    out.print(
        f"parameters   {si(p['total'])}: {si(p['trained'])} trained, {si(p['frozen'])} frozen;"
        f" {si(p['embedding'])} of them in the embedding"
    )
    out.print(
        f"FLOPs/token  {si(d.total('flops'))} forward, {si(d.total('training'))} in training,"
        f" at context {d.context}"
    )
    out.print(
        f"state/row    {size_of(d.total('state_fixed'))} + {size_of(d.total('state_per_token'))} a token;"
        f" {size_of(d.state_bytes(d.context))} at context {d.context} (fp32)"
    )
    bits = [f"{site.site} {site.bits:g}" for site in d.sites if site.bits is not None]
    if bits:
        out.print(f"bits/token   {', '.join(bits)}")
    for note in d.notes:
        out.print(f"note         {escape(note)}")


def backends() -> None:
    """Print every operator's backends, in the order in which `auto` tries them, and why not, if so."""
    for info in pkgutil.walk_packages(ops.__path__, "model.ops."):
        importlib.import_module(info.name)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    table = _table("operator", "backend", f"on {device}")
    for op in sorted(OPERATORS):
        for i, backend in enumerate(OPERATORS[op]):
            why = _why_not(backend, device)
            table.add_row(op if i == 0 else "", backend.name, f"no: {escape(why)}" if why else "yes")
    out = _console()
    _print(out, table)
    out.print("`auto` takes the first that can serve the call; a named backend is used or refused.")


def _why_not(backend: Backend, device: str) -> str | None:
    """Why a backend cannot run on this machine, or None; what depends on a call's shapes is left out."""
    missing = backend.available()
    if missing:
        return missing
    try:
        refused = backend.supports(torch.empty(1, 1, 1, 16, device=device))
    except Exception:  # it asks for more than a tensor: it is here, and each call decides
        return None
    return refused if refused and "CUDA" in refused else None
