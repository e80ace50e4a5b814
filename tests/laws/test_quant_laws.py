"""Every quantizer law on every registered quantizer, and on one that breaks it."""

from __future__ import annotations

import pytest

from model.registry import QUANTIZERS

from .cases import QUANT_CASES, QUANT_EXEMPT
from .laws_quant import QUANT_BREAKS, QUANT_LAWS, Broken, QuantCase, registered


@pytest.mark.parametrize("name", QUANT_LAWS)
@pytest.mark.parametrize("case", registered(QUANT_CASES), ids=str)
def test_law(case: QuantCase, name: str) -> None:
    if (case.name, name) in QUANT_EXEMPT:
        pytest.skip(QUANT_EXEMPT[case.name, name])
    QUANT_LAWS[name](case)


def test_tables_name_what_exists() -> None:
    names = set(QUANTIZERS.names())
    assert not set(QUANT_CASES) - names
    for quantizer, name in QUANT_EXEMPT:
        assert quantizer in names and name in QUANT_LAWS


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch):
    def add(bug: str) -> QuantCase:
        monkeypatch.setitem(QUANTIZERS._classes, "broken", type("Toy", (Broken,), {"bug": bug}))
        return QuantCase("broken")

    return add


@pytest.mark.parametrize("name", QUANT_LAWS)
def test_honest_toy_obeys(name: str, broken) -> None:
    QUANT_LAWS[name](broken(""))


@pytest.mark.parametrize("name", QUANT_LAWS)
def test_broken_toy_is_found_out(name: str, broken) -> None:
    with pytest.raises((AssertionError, RuntimeError)):
        QUANT_LAWS[name](broken(QUANT_BREAKS[name]))
