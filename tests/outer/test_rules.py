"""Outer arithmetic against torch's own optimizer and against the papers' formulas."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from train.outer import rules
from train.outer.coordinator import Coordinator, Terms
from train.outer.rules import Delayed, Step


def torch_steps(theta, deltas, rule: Step):
    p = torch.nn.Parameter(torch.from_numpy(theta.copy()))
    sgd = torch.optim.SGD([p], lr=rule.lr, momentum=rule.momentum, nesterov=rule.nesterov)
    for d in deltas:
        p.grad = torch.from_numpy(d.copy())
        sgd.step()
    return p.detach().numpy()


@pytest.mark.parametrize("rule", [Step(), Step(1.0, 0.0, False), Step(0.4, 0.8, False)])
def test_descend_is_torch_sgd(rule: Step) -> None:
    rng = np.random.default_rng(0)
    theta, deltas = rng.standard_normal(50), rng.standard_normal((20, 50))
    want, m = torch_steps(theta, deltas, rule), None
    for d in deltas:
        theta, m = rules.descend(theta, d, m, rule)
    np.testing.assert_allclose(theta, want, atol=1e-12)


@given(st.integers(1, 8), st.sampled_from(["float64", "float32"]), st.booleans())
def test_delayed_nesterov_on_one_base_is_one_step_on_the_mean(n: int, dtype: str, nesterov: bool) -> None:
    """c = 0, N = k, one base: a cycle of pushes is one torch step on their mean (invariant 2)."""
    rng, rule = np.random.default_rng(n), Step(nesterov=nesterov)
    theta = rng.standard_normal(64).astype(dtype)
    pushes = rng.standard_normal((20, n, 64)).astype(dtype)
    want = torch_steps(theta, pushes.mean(1), rule)
    state = Delayed(np.zeros(64, dtype), np.zeros(64, dtype))
    for cycle in pushes:
        for g in cycle:
            theta, state = rules.delayed(theta, g, state, rule, n)
    # 1.4e-5 absolute in fp32 is 3 ulp of values that reach 50 after 20 rounds.
    np.testing.assert_allclose(
        theta, want, rtol=1e-12 if dtype == "float64" else 1e-5, atol=1e-12 if dtype == "float64" else 1e-5
    )


def test_delayed_heavy_ball_is_the_same_for_every_c() -> None:
    """What the pushes between take along of the momentum, the N-th takes less."""
    rng, rule, ends = np.random.default_rng(0), Step(nesterov=False), []
    pushes = rng.standard_normal((12, 64))
    for c in (0.0, 0.1, 1 / 3):
        theta, state = np.ones(64), Delayed(np.zeros(64), np.zeros(64))
        for g in pushes:
            theta, state = rules.delayed(theta, g, state, rule, 3, c)
        ends.append(theta)
    np.testing.assert_allclose(ends[1:], [ends[0]] * 2, atol=1e-12)


def test_delayed_nesterov_with_c_follows_the_formula() -> None:
    rule, n, c, g = Step(0.5, 0.9), 3, 0.1, np.ones(1)
    theta, state = np.zeros(1), Delayed(np.full(1, 2.0), np.zeros(1))
    m, want = 2.0, 0.0
    for t in range(1, 7):
        if t % n:
            want -= 0.5 * (c * 0.9 * m + 1 / n)
        else:
            m = 0.9 * m + 1.0
            want -= 0.5 * ((1 - c * n + c) * 0.9 * m + 1 / n)
        theta, state = rules.delayed(theta, g, state, rule, n, c)
        assert theta[0] == pytest.approx(want, abs=1e-14)


def test_naive_pushes_go_further_than_their_mean() -> None:
    """k equal pushes one by one: -ε(4 + 4β + 3β² + 2β³ + β⁴)g for k = 4, the published account."""
    theta, m, b = np.zeros(1), None, 0.9
    for _ in range(4):
        theta, m = rules.descend(theta, np.ones(1), m, Step(1.0, b))
    assert -theta[0] == pytest.approx(4 + 4 * b + 3 * b**2 + 2 * b**3 + b**4)


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=8), st.integers(1, 500))
def test_dynamic_steps(speeds: list[float], every: int) -> None:
    steps = [rules.dynamic_steps(every, v, max(speeds)) for v in speeds]
    assert max(steps) == every and min(steps) >= 1
    assert sorted(steps) == [s for _, s in sorted(zip(speeds, steps))]


def test_blend_is_exact_at_its_ends() -> None:
    a, b = np.array([1.0, np.inf]), np.array([-0.0, 2.0])
    assert rules.blend(a, b, 0) is b and rules.blend(a, b, 1) is a
    np.testing.assert_allclose(rules.blend(np.ones(2), np.zeros(2), 0.25), 0.25)


def test_outliers_need_a_past() -> None:
    assert not rules.outlier(1e9, [1.0] * 15)
    assert rules.outlier(1.1, [1.0] * 16) and not rules.outlier(1.02, [1.0] * 16)


@pytest.mark.parametrize("names", ["a", "ab"])
def test_pushes_that_stay_larger_are_taken_in_the_end(names: str) -> None:
    """A spike is refused; a level that comes again and again is a level, of one shard as of all."""
    terms = Terms(n=4, total=10**6, plain_from=4, shards=len(names), stale=10**6)
    core = Coordinator(terms, np.zeros(4, "float32"))

    def push(name: str, size: float) -> str:
        lease = core.lease_of(name)
        assert lease is not None
        return core.push(name, lease.id, 1.0, core.codec.encode(np.full(4, size, "float32")), 0.0)

    for name in names:
        core.join(name, 0.0)
    assert [push(n, 1.0) for _ in range(20) for n in names] == ["applied"] * 20 * len(names)
    assert push("a", 50.0) == "outlier" and push("a", 1.0) == "applied"  # a spike, as before
    larger = []
    for _ in range(30):  # shard 0 stays 1.5 times as large; the other one's pushes do not
        larger.append(push("a", 1.5))
        assert names == "a" or push("b", 1.0) == "applied"
        rest, arrays = core.state()
        core = Coordinator.restore(json.loads(json.dumps(rest)), arrays)
    assert larger == ["outlier"] * 4 + ["applied"] * 26
    assert core.outliers == [0] * len(names)  # and has become usual
