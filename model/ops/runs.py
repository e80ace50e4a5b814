"""Kernels that pack documents as one row of runs (`cu_seqlens`, a state a run), called with rows and states.

Shape legend: B batch  T time  S runs of `cu_seqlens`

Here a state belongs to a row: the one that comes in to the row's first document, the one that goes out to its
last.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from model.ops.documents import Documents, zero_padding


def call_with_runs(
    kernel: Callable[..., tuple[Tensor, Any]],
    inputs: tuple[Tensor, ...],
    state: Tensor | None,
    docs: Documents | None,
    want_state: bool = True,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """(output [B, T, ...], state [B, ...] or None) of a kernel with fla's interface.

    inputs: [B, T, ...] each, given in order.  state: [B, ...] or None.  options: the kernel's own.
    """
    options |= {"output_final_state": want_state}
    if docs is None:
        o, last = kernel(*inputs, initial_state=state, **options)
        return o, (last if want_state else None)
    cu = docs.cu_seqlens.long()
    owners = docs.segments.flatten()[cu[:-1]]  # [S] the document of each run; -1: padding
    initial = None
    if state is not None:
        rows, runs = _owned(docs.first_segment(), owners)
        initial = state.new_zeros(len(owners), *state.shape[1:]).index_copy(0, runs, state[rows])
    flat = (x.flatten(0, 1)[None] for x in zero_padding(docs, *inputs))
    o, ends = kernel(*flat, initial_state=initial, cu_seqlens=cu, **options)
    o = o.view(*docs.segments.shape, *o.shape[2:])
    if not want_state:
        return o, None
    last = ends.new_zeros(len(docs.segments), *ends.shape[1:]) if state is None else state.to(ends.dtype)
    rows, runs = _owned(docs.last_segment(), owners)
    return o, last.index_copy(0, rows, ends[runs])


def _owned(edge: Tensor, owners: Tensor) -> tuple[Tensor, Tensor]:
    """Rows, and the runs that hold their `edge` document; a row of padding has none."""
    rows, runs = (edge[:, None] == owners[None, :]).nonzero(as_tuple=True)
    return rows, runs
