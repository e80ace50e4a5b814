"""Adapter of mamba-ssm's chunk scan for GPUs.

Shape legend: B batch  T time  H heads  P head width  G groups  N state width

`mamba_chunk_scan_combined` multiplies x by dt itself, so it serves only calls that say what their x and
log_a were made of (`step`): dividing dt out again would make a gradient of differences of huge numbers. It
resets at documents (`seq_idx`) or carries a state, not both. Written against mamba-ssm 2.3; checked against
its kernel in Triton's interpreter (`make oracles`), not run on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from model.ops.documents import Documents, zero_padding
from model.ops.select import Reason, needs_cuda

CHUNK = 256  # the kernel's own; chunks of other operators say nothing here


def refusal(
    x: Tensor,
    *,
    docs: Documents | None = None,
    state: Tensor | None = None,
    want_state: bool = False,
    step: tuple[Tensor, Tensor, Tensor] | None = None,
    **_: Any,
) -> Reason:
    """Why the kernel cannot serve, or None."""
    if x.numel() == 0:
        return "an empty input has nothing to launch"
    refused = needs_cuda(x)
    if refused is None and step is None:
        refused = "multiplies by dt itself: needs `step`, which the mamba2 block gives"
    if refused is None and docs is not None and (state is not None or want_state):
        refused = "cannot carry a state across packed or padded documents"
    return refused


def ssd_mamba(
    x: Tensor,
    log_a: Tensor,
    b: Tensor,
    c: Tensor,
    state: Tensor | None = None,
    docs: Documents | None = None,
    want_state: bool = True,
    chunk: int = 64,
    step: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """y [B, T, H, P] and the state [B, H, N, P] after the last token; arguments as in `ssd`."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    assert step is not None  # else refused
    u, dt, A = step
    u, dt, b, c = zero_padding(docs, u, dt.float(), b.to(u.dtype), c.to(u.dtype))
    seq = None if docs is None else (docs.segments + 1).int().contiguous()
    initial = None if state is None else state.mT.contiguous()
    out = mamba_chunk_scan_combined(
        u, dt, A.float(), b, c, CHUNK, initial_states=initial, seq_idx=seq, return_final_states=want_state
    )
    y, last = out if want_state else (out, None)
    if docs is not None and docs.padded:
        y = torch.where(docs.tokens[..., None, None], y, 0)
    return y.to(x.dtype), (None if last is None else last.mT.float())
