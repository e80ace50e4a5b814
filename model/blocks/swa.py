"""Sliding-window attention: attention that reaches `window` positions back, its own included.

Query i sees [i - window + 1, i], as in Mistral, Samba and YOCO. Cost is linear in T and the state fixed.
"""

from __future__ import annotations

from typing import Literal

from model.blocks.attention import Attention
from model.registry import block


@block("swa")
class SlidingWindowAttention(Attention):
    """`attention` within a window; see there for the other parameters.

    State: the last window - 1 keys and values, right-aligned (`WindowKV`); `capacity` changes nothing.
    Raises ValueError when window < 1.
    """

    def __init__(
        self,
        dim: int,
        *,
        window: int = 512,
        head_dim: int = 64,
        group: int = 1,
        heads: int | None = None,
        position: Literal["rope", "alibi", "none"] = "rope",
        theta: float = 10_000.0,
        qk_norm: bool = False,
        conv: int = 0,
        sinks: bool = False,
        gate: bool = False,
        norm_eps: float = 1e-6,
        backend: str = "auto",
    ) -> None:
        if window < 1:
            raise ValueError(f"window={window}: a query sees at least itself, so the window must be >= 1")
        super().__init__(
            dim,
            head_dim=head_dim,
            group=group,
            heads=heads,
            position=position,
            theta=theta,
            qk_norm=qk_norm,
            conv=conv,
            sinks=sinks,
            gate=gate,
            norm_eps=norm_eps,
            backend=backend,
        )
        self.window = window
