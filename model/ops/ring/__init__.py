"""A ring of past states beside a state-space recurrence, read by content.

Shape legend: B batch  T time  H heads  P head width  G groups of heads  N state width  R slots
"""

from __future__ import annotations

from torch import Tensor

from model.ops.attention.places import Places
from model.ops.ring.cpu import ring_cpu, ring_flops
from model.ops.ring.reference import ring_reference
from model.ops.ring.state import RingState
from model.ops.select import Backend, choose, register

__all__ = ["RingState", "ring_flops", "ring_read"]

register("ring", Backend("cpu", ring_cpu), Backend("reference", ring_reference))


def ring_read(
    x: Tensor,
    log_a: Tensor,
    b: Tensor,
    c: Tensor,
    u: Tensor,
    *,
    slots: int,
    stride: int,
    at: Places,
    state: RingState | None = None,
    backend: str = "auto",
) -> tuple[Tensor, RingState | None]:
    """r_t = sum_i rho_ti c_t . W_i -> [B, T, H, P] in fp32 (fp64 for fp64), and the state after.

    A document's segment i is its tokens [i stride, (i+1) stride). What they alone write, and their mean key:

        W_i = sum_j exp(sum_{l>j} log_a_l) b_j (x) x_j      m_i = mean_j b_j        (j, l in the segment)
        rho_ti = e^(u_t.m_i / sqrt(N)) / (1 + sum_i e^(u_t.m_i / sqrt(N)))

    over the last `slots` segments before t's own. The recurrence's own state is sum_i decay_i W_i plus what
    the open segment wrote: here the same segment states are read undecayed.

    x [B, T, H, P], log_a [B, T, H], b, c, u [B, T, G, N]: as in `model.ops.ssd`; u asks.
    at: Places of the tokens; the positions of a document that a state belongs to go on.
    state: None is empty, and none comes back. A document that starts meets an empty one.
    Raises BackendError when the named backend does not exist.
    """
    chosen = choose("ring", backend, x)
    return chosen.fn(x, log_a, b, c, u, slots=slots, stride=stride, at=at, state=state)
