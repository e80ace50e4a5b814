"""SparseK attention (Lou et al., arXiv 2406.16747): a window, and the tokens before it that score best.

Shape legend: B batch  T time  H query heads  G key/value heads  K key width  V value width  M slots  W window
"""

from __future__ import annotations

from torch import Tensor

from model.ops.attention.places import Places
from model.ops.select import Backend, choose, register
from model.ops.sparsek.cpu import sparsek_cpu, sparsek_flops
from model.ops.sparsek.gates import Sizes, SparseKState
from model.ops.sparsek.reference import sparsek_reference

__all__ = ["Sizes", "SparseKState", "sparsek", "sparsek_flops"]

register("sparsek", Backend("cpu", sparsek_cpu), Backend("reference", sparsek_reference))


def sparsek(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    *,
    sizes: Sizes,
    at: Places,
    carried: Tensor,
    state: SparseKState | None = None,
    backend: str = "auto",
) -> tuple[Tensor, SparseKState | None]:
    """y_t = sum_j softmax_j(q_t k_j / sqrt(K)) p_tj v_j  -> [B, T, H, V] in q's dtype, and the state after.

    q [B, T, H, K], k [B, T, G, K], v [B, T, G, V], u [B, T, G] scores; head h reads group h // (H / G).

    j runs over the last W tokens of t's document, with p_tj = 1, and over the tokens before them that the
    operator keeps. It sees the M best scores of those (of equals the earlier):

        p = clip(u - tau, 0, 1),  sum p = keep        (all ones for no more than `keep` tokens)

    which keeps those with p > 0. Along a document tau never falls, and what has left the M best never comes
    back, so that M slots are all that needs to be stored. The paper's operator over the whole prefix is the
    case in which no more than M tokens have p > 0. p has the gradient of the projection, and so u has one.

    at: Places of the tokens.   carried [B]: the document that the state belongs to.
    state: None is empty, and none comes back. A document that starts meets an empty one.
    Raises BackendError when the named backend does not exist.
    """
    chosen = choose("sparsek", backend, q)
    return chosen.fn(q, k, v, u, sizes=sizes, at=at, carried=carried, state=state)
