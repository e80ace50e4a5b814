"""Choosing a backend: `auto` takes the first that can serve; a named one serves or is refused."""

from __future__ import annotations

import pytest
import torch

from model.ops import select
from model.ops.select import Backend, BackendError, choose, needs_cuda, package, register


@pytest.fixture(autouse=True)
def operator(monkeypatch):
    monkeypatch.setattr(select, "OPERATORS", {})
    register(
        "toy",
        Backend("gpu", print, supports=needs_cuda),
        Backend("absent", print, available=package("no_such_package_at_all")),
        Backend("short", print, supports=lambda x, **_: "too long" if x.numel() > 3 else None),
        Backend("any", print),
    )


def test_auto_takes_the_first_that_can_serve():
    assert choose("toy", "auto", torch.zeros(3)).name == "short"
    assert choose("toy", "auto", torch.zeros(4)).name == "any"


def test_a_name_is_used_or_refused():
    assert choose("toy", "any", torch.zeros(3)).name == "any"
    for name, why in (("gpu", "needs CUDA tensors"), ("absent", "not installed"), ("short", "too long")):
        with pytest.raises(BackendError, match=f"toy: backend '{name}' cannot serve") as error:
            choose("toy", name, torch.zeros(4))
        assert f"{name}: {why}" in str(error.value) or why in str(error.value)
        assert "any: can serve" in str(error.value)


def test_an_unknown_name_lists_what_there_is():
    with pytest.raises(BackendError, match="no backend called 'fast'") as error:
        choose("toy", "fast", torch.zeros(4))
    assert all(f"  {name}: " in str(error.value) for name in ("gpu", "absent", "short", "any"))


def test_auto_with_nothing_to_choose_says_why():
    register("toy", Backend("gpu", print, supports=needs_cuda))
    with pytest.raises(BackendError, match=r"no backend can serve this call \(torch.float32 on cpu\)"):
        choose("toy", "auto", torch.zeros(4))


def test_a_failing_device_check_spares_the_package_look_up():
    asked = []
    register(
        "toy",
        Backend("gpu", print, supports=needs_cuda, available=lambda: asked.append(1)),
        Backend("any", print),
    )
    choose("toy", "auto", torch.zeros(4))
    assert not asked
