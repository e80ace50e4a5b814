"""The ring token by token: what the fast form must equal.

Shape legend: B batch  T time  H heads  P head width  G groups of heads  N state width  R slots
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.ops.attention.places import Places
from model.ops.ring.state import RingState


def ring_reference(
    x: Tensor, log_a: Tensor, b: Tensor, c: Tensor, u: Tensor, *, slots: int, stride: int, at: Places,
    state: RingState | None = None,
) -> tuple[Tensor, RingState | None]:  # fmt: skip
    """See `ring_read`. Sums in fp32, or fp64 for fp64 inputs."""
    B, T, H, P = x.shape
    G, N = b.shape[2:]
    start = RingState.empty(x, B, slots, H, P, G, N) if state is None else state
    wide = start.open.dtype
    x, a, b, c, u = (t.to(wide) for t in (x, log_a.exp(), b, c, u))
    zero, no_key = x.new_zeros(H, N, P), x.new_zeros(G, N)
    ys, ends = [], []
    for row in range(B):
        seen = int(start.seen[row])
        past = list(zip(start.past[row], start.keys[row]))
        opened, key = start.open[row], start.open_key[row]
        for t in range(T):
            if int(at.segments[row, t]) < 0:
                ys.append(x.new_zeros(H, P))
                continue
            position = int(at.positions[row, t])
            if position == 0:
                past, opened, key = [(zero, no_key)] * slots, zero, no_key
            full = min(position // stride, slots)
            ys.append(_read(past[slots - full :], c[row, t], u[row, t], x.new_zeros(H, P)))
            bh = b[row, t].repeat_interleave(H // G, 0)
            opened = a[row, t, :, None, None] * opened + bh[:, :, None] * x[row, t, :, None, :]
            key, seen = key + b[row, t], position + 1
            if seen % stride == 0:
                past = [*past[1:], (opened, key / stride)]
                opened, key = zero, no_key
        ends.append((past, opened, key, seen))
    y = torch.stack(ys).view(B, T, H, P) if ys else x
    if state is None:
        return y, None
    tables = [torch.stack([torch.stack([e[i] for e in past]) for past, *_ in ends]) for i in (0, 1)]
    count = torch.tensor([e[3] for e in ends], device=start.seen.device)
    return y, RingState._make(
        [*tables, torch.stack([e[1] for e in ends]), torch.stack([e[2] for e in ends]), count]
    )


def _read(past: list[tuple[Tensor, Tensor]], c: Tensor, u: Tensor, zero: Tensor) -> Tensor:
    """c, u [G, N]; past of (W [H, N, P], m [G, N]) -> [H, P]."""
    G, N = c.shape
    y = zero
    logits = [(u * m).sum(-1) * N**-0.5 for _, m in past]
    total = 1 + sum(x.exp() for x in logits)
    for (W, _), x in zip(past, logits):
        asked = (c * (x.exp() / total)[:, None]).repeat_interleave(zero.shape[0] // G, 0)
        y = y + (asked[:, :, None] * W).sum(1)
    return y
