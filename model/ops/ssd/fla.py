"""Adapter of flash-linear-attention's scalar-gate kernel for the state-space dual on GPUs.

Shape legend: B batch  T time  H heads  P head width  G groups  N state width  S runs of `cu_seqlens`.

`chunk_simple_gla` with q = c, k = b, v = x, g = log_a and scale 1 is this operator. mamba-ssm's
`mamba_chunk_scan_combined` is not used: it multiplies x by dt itself, so an x that already holds dt would
have to be divided by it, whose gradient is a difference of huge numbers for small dt; and its `cu_seqlens`
alone resets nothing (it needs `seq_idx` too). Written against fla 0.6; the bookkeeping is tested against a
stand-in kernel, the kernel itself has not been run on a GPU here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from model.ops.documents import Documents
from model.ops.select import Reason, needs_cuda


def refusal(x: Tensor, **features: Any) -> Reason:
    """Why the kernel cannot serve, or None."""
    return "an empty input has nothing to launch" if x.numel() == 0 else needs_cuda(x, **features)


def ssd_fla(
    x: Tensor,
    log_a: Tensor,
    b: Tensor,
    c: Tensor,
    state: Tensor | None = None,
    docs: Documents | None = None,
    want_state: bool = True,
    chunk: int = 64,
) -> tuple[Tensor, Tensor | None]:
    """y [B, T, H, P] and the state [B, H, N, P] after the last token; arguments as in `ssd`."""
    from fla.ops.simple_gla import chunk_simple_gla

    R = x.shape[2] // b.shape[2]
    b, c = (t.to(x.dtype).repeat_interleave(R, dim=2) for t in (b, c))
    log_a = log_a.float()
    if docs is None:
        y, last = chunk_simple_gla(
            c, b, x, g=log_a, scale=1.0, initial_state=state, output_final_state=want_state
        )
        return y.to(x.dtype), last
    if docs.padded:
        here = (docs.segments >= 0)[:, :, None]
        log_a = torch.where(here, log_a, 0)
        x, b, c = (torch.where(here[..., None], t, 0) for t in (x, b, c))
    cu = docs.cu_seqlens.long()
    run_segment = docs.segments.flatten()[cu[:-1]]  # [S], -1 for padding
    runs, rows = _edge_runs(docs, run_segment, first=True)
    initial = None
    if state is not None:
        initial = state.new_zeros(len(run_segment), *state.shape[1:]).index_copy(0, runs, state[rows])
    flat = (t.flatten(0, 1)[None] for t in (c, b, x, log_a))
    y, ends = chunk_simple_gla(
        *flat, scale=1.0, initial_state=initial, output_final_state=want_state, cu_seqlens=cu
    )
    last = None
    if want_state:
        last = ends.new_zeros(x.shape[0], *ends.shape[1:]) if state is None else state.to(ends.dtype)
        runs, rows = _edge_runs(docs, run_segment, first=False)
        last = last.index_copy(0, rows, ends[runs])
    return y.view(x.shape).to(x.dtype), last


def _edge_runs(docs: Documents, run_segment: Tensor, first: bool) -> tuple[Tensor, Tensor]:
    """Runs that hold each row's first (or last) document, and those rows; rows of padding have none."""
    edge = docs.first_segment() if first else docs.last_segment()
    match = edge[:, None] == run_segment[None, :]  # a document is one run: padding cannot split it
    rows, runs = match.nonzero(as_tuple=True)
    return runs, rows
