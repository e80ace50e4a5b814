"""What `make test-gpu` does on a GPU, on the CPU: a good backend passes, a wrong or broken one shows."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from model.ops.select import OPERATORS
from tests.gpu import operators
from tests.gpu.__main__ import main, table, wrong
from tests.gpu.blocks import compare_blocks

SMALL = {"B": 2, "T": 9, "H": 2, "K": 8}


@pytest.fixture(autouse=True)
def once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "ROUNDS", 1)


def test_every_operator_has_a_row_for_every_backend() -> None:
    rows = list(operators.compare("cpu", torch.float32, **SMALL))
    for op, backends in OPERATORS.items():
        mine = [r for r in rows if r.operator.split("/")[0] == op]
        if mine:
            assert {r.backend for r in mine} == {b.name for b in backends if b.name != "reference"}
    ran = [r for r in rows if not r.why]
    assert {r.backend for r in ran} == {"chunked", "shifts", "cpu"}
    assert not [r for r in ran if wrong(r, 1e-3)]
    assert all("CUDA" in r.why or "needs" in r.why for r in rows if r.why)
    assert table([("float32", r) for r in rows]).row_count == len(rows)


@pytest.mark.parametrize("fault", ["wrong", "broken"])
def test_a_bad_backend_is_found_out(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    *rest, shifts, reference = OPERATORS["conv"]

    def bad(*args: Any, **kwargs: Any) -> Any:
        if fault == "broken":
            raise RuntimeError("illegal memory access")
        y, last = shifts.fn(*args, **kwargs)
        return y * 1.1, last

    worse = dataclasses.replace(shifts, name="worse", fn=bad)
    monkeypatch.setitem(OPERATORS, "conv", (*rest, worse, shifts, reference))
    rows = [r for r in operators.compare("cpu", torch.float32, **SMALL) if r.backend == "worse"]
    assert rows and all(wrong(r, 5e-2) for r in rows)


def test_blocks_are_compared_with_themselves() -> None:
    rows = list(compare_blocks("cpu", names=("mlp", "swa")))
    assert len(rows) > 3 and all(r.output == r.gradient == 0.0 and not r.why for r in rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the command would run on it")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture) -> None:
    assert main() == 0
    assert "no CUDA device" in capsys.readouterr().out
