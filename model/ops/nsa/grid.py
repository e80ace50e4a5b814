"""Sizes of native sparse attention's blocks, in tokens."""

from __future__ import annotations

from typing import NamedTuple


class Grid(NamedTuple):
    """pool: tokens of a pooled key. stride: between the starts of two. block: tokens of a selected block.
    reads: n, blocks that a query reads."""

    pool: int
    stride: int
    block: int
    reads: int

    def check(self) -> None:
        """Raises ValueError when the sizes do not fit each other."""
        pool, stride, block, reads = self
        if stride < 1 or pool < stride or pool % stride:
            raise ValueError(f"pool={pool} must be a multiple of stride={stride}")
        if block < stride or block % stride:
            raise ValueError(f"block={block} must be a multiple of stride={stride}")
        if reads < 3:
            raise ValueError(
                f"count={reads}: the first, the last and its own block are always read; at least 3"
            )
