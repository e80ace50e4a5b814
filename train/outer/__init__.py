"""Outer loops: what workers tell each other every so many inner steps. One file each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from model.registry import did_you_mean
from model.schema import ConfigError
from model.sections import OuterConfig
from train.outer.none import NoOuter


class Outer(Protocol):
    """The interface; see `NoOuter` for what each method is for."""

    def maybe_sync(self, state: Any) -> None: ...
    def boundary(self, step: int) -> bool: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


OUTERS: dict[str, Callable[[OuterConfig], Outer]] = {"none": lambda config: NoOuter()}


def make(config: OuterConfig) -> Outer:
    """The outer loop of a configuration. Raises ConfigError when there is none of that name."""
    if config.kind not in OUTERS:
        raise ConfigError([f"outer.kind: no outer loop {config.kind!r}{did_you_mean(config.kind, OUTERS)}"])
    return OUTERS[config.kind](config)
