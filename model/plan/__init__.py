"""From the grammar to a plan (`model.items`): which bank module is visited at which site.

Bank names do not depend on what comes after them, so a model's names are a prefix of those of the model
grown from it.

    builder   names, sites, labels, errors
    forms     block, use, repeat, mirror, wrap
    yoco, onion
"""

from __future__ import annotations

from model.items import Bracket, Cross, Fade, Item, ModuleSpec, Plan, Visit
from model.plan import forms
from model.plan.builder import Builder, Form
from model.plan.onion import onion
from model.plan.yoco import settle, yoco
from model.schema import (
    BlockNode,
    Config,
    ConfigError,
    MirrorNode,
    OnionNode,
    RepeatNode,
    UseNode,
    WrapNode,
    YocoNode,
)

__all__ = ["Bracket", "Cross", "Fade", "Item", "ModuleSpec", "Plan", "Visit", "make_plan"]

FORMS: dict[type, Form] = {
    BlockNode: forms.block,
    UseNode: forms.use,
    RepeatNode: forms.repeat,
    MirrorNode: forms.mirror,
    WrapNode: forms.wrap,
    OnionNode: onion,
    YocoNode: yoco,
}


def make_plan(config: Config) -> Plan:
    """The plan of a configuration. Raises ConfigError with the place in the file."""
    builder = Builder(FORMS)
    items = settle(builder, builder.nodes(config.stack, config.dim), config)
    for name in config.heads:
        builder.usable(name, f"{config.name}: heads")
    if builder.errors:
        raise ConfigError(builder.errors)
    first = config.stack[0] if config.stack else None
    return Plan(items, builder.modules, isinstance(first, OnionNode) and first.onion[0].frozen)
