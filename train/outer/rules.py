"""The arithmetic of the outer loops: pure functions of flat vectors, in the precision they are given.

Shape legend: N values of a vector  k workers.

    Δ = θ - θᵢ          what a worker did in its inner steps, as a gradient to descend
    m <- βm + Δ         θ <- θ - ε(Δ + βm)        Nesterov as torch has it (DiLoCo, 2311.08105)

    Delayed Nesterov (Async DiLoCo, 2401.09135), for pushes g that come one by one, N to a cycle:
    s <- s + g
    every N-th:  m <- βm + s/N    θ <- θ - ε((1 - cN + c)βm + g/N)    s <- 0
    others:                       θ <- θ - ε(cβm + g/N)
    Without Nesterov the N-th takes the m from before its update: a cycle is then one step of heavy ball.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from train.outer.arrays import Array


@dataclass(frozen=True)
class Step:
    """lr ε, momentum β; without `nesterov` plain heavy-ball momentum: θ <- θ - εm."""

    lr: float = 0.7
    momentum: float = 0.9
    nesterov: bool = True


PLAIN = Step(1.0, 0.0)  # averages: for what is a statistic and no parameter


def descend(theta: Array, delta: Array, m: Array | None, rule: Step) -> tuple[Array, Array | None]:
    """One outer step on the mean delta: (θ, m). No momentum is kept at β = 0."""
    if rule.momentum == 0:
        return theta - rule.lr * delta, None
    m = delta if m is None else rule.momentum * m + delta
    ahead = delta + rule.momentum * m if rule.nesterov else m
    return theta - rule.lr * ahead, m


@dataclass(frozen=True)
class Delayed:
    """Memory of delayed Nesterov: momentum m, the sum s of pushes since it was last updated, their count."""

    m: Array
    s: Array
    count: int = 0


def delayed(
    theta: Array, g: Array, state: Delayed, rule: Step, n: int, c: float = 0.0
) -> tuple[Array, Delayed]:
    """One push under delayed Nesterov, n pushes to a cycle."""
    s, count, beta = state.s + g, state.count + 1, rule.momentum
    if count < n:
        return theta - rule.lr * (c * beta * state.m + g / n), Delayed(state.m, s, count)
    m = beta * state.m + s / n
    ahead = m if rule.nesterov else state.m
    theta = theta - rule.lr * ((1 - c * n + c) * beta * ahead + g / n)
    return theta, Delayed(m, s * 0, 0)


def mean(vectors: Sequence[Array]) -> Array:
    """The mean in the order given; every replica must add in the same order to get the same bits."""
    total = vectors[0]
    for v in vectors[1:]:
        total = total + v
    return total / len(vectors)


def blend(local: Array, fresh: Array, alpha: float) -> Array:
    """α θ_local + (1 - α) θ_fresh; at the ends exactly one of the two."""
    if alpha == 0:
        return fresh
    return local if alpha == 1 else alpha * local + (1 - alpha) * fresh


def dynamic_steps(every: int, speed: float, fastest: float) -> int:
    """Dynamic local updates: ⌊H · v / max v⌋, at least one."""
    if not (speed > 0 and fastest > 0):
        return every
    return max(1, min(every, math.floor(every * speed / fastest + 1e-9)))


def outlier(value: float, past: Sequence[float], sigmas: float = 6.0, least: int = 16) -> bool:
    """Whether a value lies over `sigmas` standard deviations above the mean of `past` (if there are enough).

    Half a percent of the mean counts as spread, so that a very even past does not make everything an outlier.
    """
    if len(past) < least:
        return False
    centre = sum(past) / len(past)
    spread = math.sqrt(sum((v - centre) ** 2 for v in past) / len(past))
    return value > centre + sigmas * max(spread, 0.005 * centre)
