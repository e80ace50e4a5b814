"""Time cut into chunks, and which terms of a chunk form would cross a document start.

Shape legend: B batch  T time  H heads  D head width  C chunks  Q tokens of a chunk (T <= C Q).
Chunked tensors are [C, B, H, Q, D]: one chunk of all rows and heads is one contiguous batch of matrices.

A document that starts inside a chunk is a mask on every term that would cross its start, and restarts
the running sums of the log decays, so that not even rounding passes from one document to the next.
Padding belongs to the document before it (the first one, if none is before) and is made of zeros: zero
keys, values and strengths add nothing, a zero log decay forgets nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.ops.documents import Documents
from model.ops.dtypes import LOG2_E


def operand(dtype: torch.dtype) -> torch.dtype:
    """The dtype of matmul operands for inputs of `dtype`: fp16 has too little range for sums of decays."""
    return dtype if dtype in (torch.bfloat16, torch.float64) else torch.float32


@dataclass(frozen=True)
class Chunks:
    """How T tokens lie in C chunks of Q. The masks are None when every row is one unpadded document.

    causal: [Q, Q] bool, j <= i, or with documents [C, B, 1, Q, Q], and in the same document.
    head:   [C, B, 1, Q, 1] bool: the state before the chunk belongs to i's document.
    tail:   [C, B, 1, Q, 1] bool: the state after the chunk belongs to j's document.
    keep:   [C, B, 1, 1, 1] bool: the state before the chunk survives it.
    """

    T: int
    Q: int
    C: int
    causal: Tensor
    head: Tensor | None = None
    tail: Tensor | None = None
    keep: Tensor | None = None

    @staticmethod
    def of(T: int, chunk: int, docs: Documents | None, device: torch.device) -> Chunks:
        """The layout for T >= 1 tokens in chunks of at most `chunk`."""
        Q = min(chunk, T)
        C = -(-T // Q)
        causal = torch.ones(Q, Q, dtype=torch.bool, device=device).tril()
        if docs is None:
            return Chunks(T, Q, C, causal)
        owners = docs.segments
        first = docs.first_segment()[:, None]
        if docs.padded:
            owners = torch.where(owners < 0, first, owners).cummax(1).values
        if C * Q > T:
            owners = torch.cat([owners, owners[:, -1:].expand(-1, C * Q - T)], 1)
        ids = owners.unflatten(1, (C, Q)).transpose(0, 1)  # [C, B, Q]
        after = ids[..., -1]
        before = torch.cat([first.T, after[:-1]])
        same = ids[..., :, None] == ids[..., None, :]
        return Chunks(
            T,
            Q,
            C,
            (same & causal)[:, :, None],
            (ids == before[..., None])[:, :, None, :, None],
            (ids == after[..., None])[:, :, None, :, None],
            (before == after)[:, :, None, None, None],
        )

    def owned(self, state: Tensor) -> Tensor:
        """The state [B, ...] that comes in, 0 where the row's first token is of another document."""
        return state if self.head is None else torch.where(self.head[0, :, :, :1], state, 0)

    def split(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """[B, T, H, D] -> [C, B, H, Q, D] of that dtype."""
        if self.C * self.Q > self.T:
            x = F.pad(x, (0, 0, 0, 0, 0, self.C * self.Q - self.T))
        chunked = x.unflatten(1, (self.C, self.Q)).permute(1, 0, 3, 2, 4)
        return chunked.to(dtype, memory_format=torch.contiguous_format)

    def join(self, x: Tensor) -> Tensor:
        """[C, B, H, Q, D] -> [B, T, H, D]."""
        C, B, H, Q, D = x.shape
        return x.permute(1, 0, 3, 2, 4).reshape(B, C * Q, H, D)[:, : self.T]

    def running_sum(self, g: Tensor) -> Tensor:
        """Sums of g [C, B, H, Q, D] from the start of the chunk, or of the document in it, to each token."""
        if self.keep is None:
            return g.cumsum(3)
        return self.causal.to(g.dtype) @ g

    def running_sum_backward(self, dc: Tensor) -> Tensor:
        """The gradient of g from that of `running_sum(g)`: sums from each token to the end."""
        if self.keep is None:
            return dc.flip(3).cumsum(3).flip(3)
        return self.causal.mT.to(dc.dtype) @ dc

    def at_head(self, sums: Tensor, dtype: torch.dtype) -> Tensor:
        """exp, the decay from the state before the chunk to each token; 0 if that is another document's."""
        decay = (sums * LOG2_E).to(dtype).exp2()
        return decay if self.head is None else decay * self.head

    def to_tail(self, sums: Tensor, dtype: torch.dtype) -> Tensor:
        """exp of the log decay from each token to the end of the chunk; 0 for another document's tokens."""
        left = ((sums[..., -1:, :] - sums) * LOG2_E).to(dtype)
        return (left if self.tail is None else left.masked_fill(~self.tail, -torch.inf)).exp2()

    def across(self, sums: Tensor, dtype: torch.dtype) -> Tensor:
        """[C, B, H, D, 1], the decay of a state across the chunk; 0 where it does not survive."""
        decay = (sums[..., -1:, :].mT * LOG2_E).to(dtype).exp2()
        return decay if self.keep is None else decay * self.keep

    def lower(self, pairs: Tensor, strict: bool = False) -> Tensor:
        """[.., Q, Q] with everything that is not from an earlier token of the same document made 0."""
        mask = self.causal.tril(-1) if strict else self.causal
        return torch.where(mask, pairs, 0)
