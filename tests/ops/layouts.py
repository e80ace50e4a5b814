"""Random documents for the tests of recurrent operators: packed, and padded on either side."""

from __future__ import annotations

import random

import torch

from model.core import Docs


def random_docs(B: int, T: int, seed: int) -> Docs:
    """Each row: left padding, a few documents, right padding, any of them absent; maybe padding alone."""
    rng, count = random.Random(seed), 0
    segments = torch.full((B, T), -1)
    padded = rng.random() < 0.6
    for row in range(B):
        start = rng.randint(0, T // 2) if padded and rng.random() < 0.5 else 0
        end = rng.randint(start, T) if padded and rng.random() < 0.5 else T
        while start < end:
            stop = rng.randint(start + 1, end)
            segments[row, start:stop] = count
            start, count = stop, count + 1
    positions = torch.zeros_like(segments)
    for row in range(B):
        for t in range(1, T):
            if segments[row, t] >= 0 and segments[row, t] == segments[row, t - 1]:
                positions[row, t] = positions[row, t - 1] + 1
    return Docs.from_segments(segments, positions)
