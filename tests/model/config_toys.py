"""A made-up block library, and a configuration that uses every part of the grammar."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytest

from model import config
from model.registry import BLOCKS, QUANTIZERS
from model.schema import BlockNode, ConfigError


class Gla:
    def __init__(
        self,
        dim: int,
        *,
        heads: int = 4,
        gate: bool = True,
        drop: float | None = None,
        kind: Literal["plain", "delta"] = "plain",
        taps: Sequence[int] = (1,),
        span: tuple[int, float] = (1, 0.5),
        memory: int | list[int] | str = 3,
        ring: dict[str, Any] | None = None,
        rate: float = 1.0,
    ) -> None:
        if dim % heads:
            raise ValueError(f"heads={heads} does not divide {dim}")


class Mlp:
    def __init__(self, dim: int, *, act: str = "swiglu", mult: float = 2.0) -> None: ...


class Pair:
    def __init__(
        self,
        dim: int,
        *,
        gla: dict[str, Any] | None = None,
        mlp: dict[str, Any] | None = None,
        eps: float = 1e-5,
    ) -> None: ...


class Int8:
    def __init__(self, dim: int, *, channels: int = 32, bits: int = 8) -> None:
        if channels > dim:
            raise ValueError(f"{channels} channels are more than the {dim} outside")


class Fsq:
    def __init__(self, dim: int, *, channels: int = 32, levels: int = 8) -> None: ...


class Nothing:
    def __init__(self, dim: int, *, channels: int = 32) -> None: ...


BLOCK_TOYS = {"gla": Gla, "mlp": Mlp, "pair": Pair, "swa": Mlp}
QUANT_TOYS = {"int8": Int8, "fsq": Fsq, "none": Nothing}


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The made-up library instead of the real one, and an empty working folder."""
    for registry, classes in ((BLOCKS, BLOCK_TOYS), (QUANTIZERS, QUANT_TOYS)):
        monkeypatch.setattr(registry, "_classes", classes)
        monkeypatch.setattr(registry, "_loaded", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def errors(source: Any, sets: Any = ()) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        config.load(source, sets)
    assert str(caught.value) == "\n".join(caught.value.errors)
    return caught.value.errors


def stack(*nodes: Any, **rest: Any) -> dict[str, Any]:
    return {"dim": 64, "stack": list(nodes), **rest}


def params(source: Any, i: int = 0, sets: Any = ()) -> dict[str, Any]:
    node = config.load(source, sets).stack[i]
    assert isinstance(node, BlockNode)
    return node.params


FULL = stack(
    {"gla": {"heads": 2, "gate": False, "ring": {"slots": 3}}, "as": "g"},
    {"pair": {"gla": {"heads": 8}, "mlp": {"mult": 3.0}}},
    {"use": "g"},
    {"repeat": 2, "of": ["mlp", {"gla": {"drop": 0.5}}], "tied": True},
    {
        "onion": [
            {"name": "s1", "body": ["gla"], "to": 16, "quant": {"fsq": {"levels": 4}}},
            {"name": "s2", "body": [{"mlp": {"act": "gelu"}}], "to": 8, "width": 32, "blend": {"steps": 3}},
        ],
        "reading": "whole",
    },
    defaults={"gla": {"rate": 0.5}},
    heads={"next": {"shift": 1, "ffn": {"mult": 2.0}}, "recon": {"shift": 0}},
    embed={"from": "somewhere", "project": 64},
)
