"""Per-channel decays inside a chunk: pair scores and their gradients, in a range that cannot overflow.

Shape legend: [C, B, H, Q, K] chunked queries, keys and running log decays (see `chunks`).

    scores_ij = sum_d q_id k_jd exp(cq_id - ck_jd)          j <= i

is a matmul only when the decay is factored, exp(cq + m) exp(-ck - m), and the second factor grows with
the chunk. Two forms, both equal to the recurrence to rounding:

- narrow: chunks of 64, operands in the inputs' precision. Right only while no log decay sums below -60
  over a chunk: e^60 leaves fp32 room for the values and for the gradients.
- exact: chunks of 32, factors in fp64, where exponents reach +-700. Log decays below -40 a token are
  taken for -40: what they leave, e^-40 = 4e-18, is under the rounding even of fp64 beside the token's
  own contribution. 32 tokens then span at most 1280, centred +-640.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.ops.dtypes import at_least_fp32
from model.ops.linear.chunks import Chunks

NARROW_CHUNK, NARROW_LIMIT = 64, -60.0
EXACT_CHUNK, EXACT_FLOOR = 32, -40.0


def is_narrow(g: Tensor, floor: float | None = None) -> bool:
    """Whether no log decay of g [B, T, H, K] can sum below the limit over a chunk of 64.

    floor: a bound on g that the caller guarantees; one that is high enough decides without looking. Otherwise
    the values are looked at, on the CPU; elsewhere that would wait for the device, and under a compiler break
    the graph.
    """
    if floor is not None and floor * min(NARROW_CHUNK, g.shape[1]) >= NARROW_LIMIT:
        return True
    if g.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    whole = g.shape[1] - g.shape[1] % NARROW_CHUNK
    chunks = g.detach()[:, :whole].unflatten(1, (-1, NARROW_CHUNK)).sum(2, dtype=at_least_fp32(g.dtype))
    rest = g.detach()[:, whole:].sum(1, dtype=at_least_fp32(g.dtype))
    return all(part.numel() == 0 or part.amin().item() >= NARROW_LIMIT for part in (chunks, rest))


def running_sum(g: Tensor, layout: Chunks, exact: bool) -> tuple[Tensor, Tensor]:
    """The log decays to use, [C, B, H, Q, K], and their running sums; fp64 and clamped when exact."""
    if exact:
        g = g.double().clamp_min(EXACT_FLOOR)
    return g, layout.running_sum(g)


def factors(cq: Tensor, ck: Tensor, exact: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """exp(cq + m) and exp(-ck - m), whose products are the decays from j to i; fp64 when exact."""
    if exact:
        m = -0.5 * EXACT_CHUNK * EXACT_FLOOR
        return (cq + m).exp_(), (-m - ck).exp_()
    return cq.exp().to(dtype), (-ck).exp_().to(dtype)
