"""Every law on every registered block, and every law on a toy that breaks it."""

from __future__ import annotations

import pytest

from model.registry import BLOCKS

from . import laws_time, laws_training  # noqa: F401 - they register the laws
from .cases import CASES, EXEMPT
from .harness import LAWS, Case, registered_cases
from .toys import BREAKS, MORE_BREAKS, Cache, Decay

REAL = registered_cases(CASES)


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("case", REAL, ids=str)
def test_law(case: Case, name: str) -> None:
    if (case.name, name) in EXEMPT:
        pytest.skip(EXEMPT[case.name, name])
    LAWS[name](case)


def test_tables_name_what_exists() -> None:
    """A case or exemption for a block or law that is gone is dead."""
    names = set(BLOCKS.names())
    assert not set(CASES) - names
    for block, name in EXEMPT:
        assert block in names and name in LAWS


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch):
    """Register a toy block for one test; gives its case."""

    def add(cls: type, bug: str = "") -> Case:
        monkeypatch.setitem(BLOCKS._classes, "toy", type(cls.__name__, (cls,), {"bug": bug}))
        return Case("toy", dim=8, T=12)

    return add


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("cls", [Decay, Cache])
def test_honest_toy_obeys(cls: type, name: str, toy) -> None:
    LAWS[name](toy(cls))


def test_every_law_has_a_block_that_breaks_it() -> None:
    assert set(BREAKS) == set(LAWS)


@pytest.mark.parametrize(("name", "cls", "bug"), [*((n, *b) for n, b in BREAKS.items()), *MORE_BREAKS])
def test_broken_toy_is_found_out(name: str, cls: type, bug: str, toy) -> None:
    with pytest.raises((AssertionError, RuntimeError)):
        LAWS[name](toy(cls, bug))
