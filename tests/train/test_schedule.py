"""Schedules as functions of the step, and the plateau rule on curves whose end is known."""

from __future__ import annotations

import itertools
import math
import random
import statistics

import pytest

from model.schema import ConfigError
from model.sections import GrowConfig, ScheduleConfig
from train.plateau import Plateau
from train.schedule import Schedule


def factors(config: ScheduleConfig, steps: int) -> list[float]:
    schedule = Schedule(config, steps)
    return [schedule.factor(s) for s in range(schedule.total)]


@pytest.mark.parametrize("shape", ["linear", "sqrt", "cosine"])
def test_wsd_rises_stays_and_falls(shape) -> None:
    f = factors(ScheduleConfig("wsd", shape, warmup=0.1, decay=0.3, final=0.1), 100)
    assert f[:10] == pytest.approx([(s + 1) / 11 for s in range(10)])
    assert f[10:70] == [1.0] * 60
    assert all(a > b for a, b in itertools.pairwise(f[69:])) and 0.1 < f[-1] < 0.2


def test_shapes_in_the_middle_of_the_decay() -> None:
    # 99 decay steps: the 50th is exactly half way
    half = {"linear": 0.5, "sqrt": 1 - math.sqrt(0.5), "cosine": 0.5}
    for shape, value in half.items():
        f = factors(ScheduleConfig("wsd", shape, warmup=0, decay=99), 200)
        assert f[101 + 49] == pytest.approx(value)


def test_cosine_and_constant() -> None:
    f = factors(ScheduleConfig("cosine", warmup=10, final=0.1), 110)
    assert f[10] == 1.0 and f[60] == pytest.approx(0.55) and f[-1] == pytest.approx(0.1, abs=1e-3)
    assert set(factors(ScheduleConfig("constant", warmup=0), 50)) == {1.0}


def test_decay_started_early_keeps_its_share_and_survives_a_reload() -> None:
    config = ScheduleConfig("wsd", warmup=0, decay=0.2)
    schedule = Schedule(config, 1000)
    schedule.start_decay(400)
    assert (schedule.decay_at, schedule.total) == (400, 500)
    assert schedule.factor(399) == 1.0 and schedule.factor(450) == pytest.approx(0.5, abs=0.01)
    again = Schedule(config, 1000)
    again.load_state_dict(schedule.state_dict())
    assert [again.factor(s) for s in range(500)] == [schedule.factor(s) for s in range(500)]
    late = Schedule(config, 1000)
    late.start_decay(900)
    assert (late.decay_at, late.total) == (800, 1000)  # it was decaying already
    steps = Schedule(ScheduleConfig("wsd", warmup=0, decay=50), 1000)
    steps.start_decay(100)
    assert steps.total == 150
    with pytest.raises(ValueError, match="cosine"):
        Schedule(ScheduleConfig("cosine"), 10).start_decay(5)


def test_parts_longer_than_the_run_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"warm-up \(80 steps\) and decay \(40\)"):
        Schedule(ScheduleConfig(warmup=80, decay=40), 100)


# ----------------------------------------------------------------------------- plateau


def simulate(seed: int, jitter: float, spread: float, flat: bool = False) -> tuple[int | None, float]:
    """Feed the rule a power law with noise; when it fires, and how fast the curve then truly falls.

    L(t) = E + A ((t + t0) / t0)^-a at evaluation t. jitter: noise of a whole evaluation (the weights
    move about at a constant rate), spread: noise of each of 32 groups, both relative to L.
    Returns the evaluation, and the true fall per evaluation over delta * L there.
    """
    rng = random.Random(seed)
    floor, height, start, power = (rng.uniform(*r) for r in ((0.5, 3), (0.5, 4), (0.5, 5), (0.2, 1)))
    height = 0.0 if flat else height

    def curve(t: float) -> float:
        return floor + height * ((t + start) / start) ** -power

    rule, offsets = Plateau(), [rng.gauss(0, 0.3) for _ in range(32)]
    for t in range(400):
        loss = curve(t)
        common = rng.gauss(0, jitter) * loss
        groups = [loss + common + offset + rng.gauss(0, spread) * loss for offset in offsets]
        if rule.update(groups, tokens=t).reached:
            return t, (curve(t - rule.window) - loss) / rule.window / (rule.delta * loss)
    return None, 0.0


@pytest.mark.parametrize(("jitter", "spread"), [(0, 0.002), (0.0005, 0.005), (0.001, 0.01), (0.002, 0.01)])
def test_plateau_rarely_fires_early(jitter, spread) -> None:
    """Early: while the curve still truly falls by over 1.25 times the threshold."""
    runs = [simulate(seed, jitter, spread) for seed in range(100)]
    early = sum(speed > 1.25 for _, speed in runs)
    assert early / len(runs) < 0.05
    assert sum(t is not None for t, _ in runs) > 75  # and it does fire in the end


def test_plateau_fires_on_a_converged_curve_soon() -> None:
    times = [simulate(seed, 0.001, 0.005, flat=True)[0] for seed in range(100)]
    assert all(t is not None for t in times)
    assert statistics.median(t for t in times if t is not None) <= 8  # window + patience - 1 at the soonest


def test_plateau_waits_for_tokens_and_keeps_its_memory() -> None:
    config = GrowConfig(when="plateau", tokens_per_param=5.0)
    rule = Plateau.of(config, trainable=1000)
    verdicts = [rule.update([2.0, 3.0], tokens=100 * t) for t in range(40)]
    assert not any(v.reached for v in verdicts)  # 3,900 tokens of 5,000
    again = Plateau.of(config, trainable=1000)
    again.load_state_dict(rule.state_dict())
    assert again.update([2.0, 3.0], tokens=5000) == rule.update([2.0, 3.0], tokens=5000)
    assert again.update([2.0, 3.0], tokens=5000).reached
    with pytest.raises(ValueError, match="held-out rows changed"):
        again.update([2.0], tokens=5000)


def test_a_fall_that_is_certain_but_tiny_still_counts_as_flat() -> None:
    rule = Plateau(patience=1)
    falling = [rule.update([2.0 - 0.001 * t] * 4, 0) for t in range(5)]  # 0.05 % per evaluation, no noise
    assert falling[-1].reached and falling[-1].drop == pytest.approx(0.001)
    fast = Plateau(patience=1)
    assert not any(fast.update([2.0 - 0.02 * t] * 4, 0).reached for t in range(30))


def test_from_the_third_stage_a_stage_must_have_spent_its_new_speed() -> None:
    """A slow but steady fall: flat by the first rule, yet as fast per FLOP as just after the insertion."""
    config = GrowConfig(when="plateau", tokens_per_param=0.0, patience=1)

    def ends_at(stage: int, falls: list[float], flops: list[float]) -> int | None:
        rule, loss = Plateau.of(config, 1, stage), 2.0
        for t, (fall, spent) in enumerate(zip(falls, flops)):
            loss -= fall
            if rule.update([loss] * 4, 0, spent).reached:
                return t
        return None

    even = [float(t) for t in range(30)]
    steady = [0.001] * 30
    slowing = [0.001] * 10 + [0.0002] * 20
    assert ends_at(2, steady, even) == ends_at(1, steady, even) == 4
    assert ends_at(3, steady, even) is None
    found = ends_at(3, slowing, even)
    assert found is not None and 10 < found < 14
    dearer = [float(t) if t < 10 else 10.0 + 5 * (t - 10) for t in range(30)]  # the price rises fivefold
    assert ends_at(3, steady, dearer) is not None
    rule = Plateau.of(config, 1, 3)
    for t in range(8):
        rule.update([2.0 - 0.001 * t] * 4, 0, float(t))
    again = Plateau.of(config, 1, 3)
    again.load_state_dict(rule.state_dict())
    assert again.update([1.99] * 4, 0, 8.0) == rule.update([1.99] * 4, 0, 8.0)
