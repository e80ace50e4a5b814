"""Feed-forward blocks: SwiGLU, GELU, squared ReLU and RWKV channel-mix.

Shape legend: B batch  T time  D model width  F hidden width

Parameter names are those of transformers' Llama: gate_proj up_proj down_proj.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.blocks._gate import HeadGate, gated
from model.core import Block, Cost, Ctx, State, Step, docs_of
from model.ops.shift import last_token, token_before
from model.registry import block

MULT = {"swiglu": 8 / 3, "gelu": 4.0, "relu2": 4.0, "rwkv": 3.5}


@block("mlp")
class MLP(Block):
    """One hidden layer per token.

    act: swiglu  down(silu(gate x) * up x)                                  (Shazeer, arXiv 2002.05202)
         gelu    down(gelu(up x))
         relu2   down(relu(up x)^2)                                         (Primer, arXiv 2109.08668)
         rwkv    sigmoid(gate x_r) * down(relu(up x_k)^2), the channel-mix of RWKV-6 (arXiv 2404.05892):
                 x_k = x + (x' - x) mix_k, x_r = x + (x' - x) mix_r, with x' the token before in the document
    mult:        F / D; None is 8/3 for swiglu, 3.5 for rwkv, 4 for the others.
    multiple_of: F is rounded to the nearest multiple of it (at least one).
    gate:        this many equal groups of the hidden layer have a learned gate each, per token; 0 for none.

    State: none, but for rwkv [B, D]: the input of the last token of each row's last document.
    Raises ValueError for an unknown act, for sizes below 1, and for groups that do not divide F.
    """

    def __init__(
        self,
        dim: int,
        *,
        act: Literal["swiglu", "gelu", "relu2", "rwkv"] = "swiglu",
        mult: float | None = None,
        multiple_of: int = 1,
        gate: int = 0,
    ) -> None:
        super().__init__(dim)
        if act not in MULT:
            raise ValueError(f"act={act!r}: must be one of {', '.join(MULT)}")
        mult = MULT[act] if mult is None else mult
        if mult <= 0 or multiple_of < 1:
            raise ValueError(f"mult={mult} must be > 0 and multiple_of={multiple_of} >= 1")
        self.act = act
        self.hidden = max(1, round(mult * dim / multiple_of)) * multiple_of
        if gate < 0 or (gate and self.hidden % gate):
            raise ValueError(
                f"gate={gate} groups do not divide the hidden width {self.hidden}:"
                f" set multiple_of to a multiple of {max(gate, 1)}"
            )
        if act == "swiglu":
            self.gate_proj = nn.Linear(dim, self.hidden, bias=False)
        if act == "rwkv":
            self.gate_proj = nn.Linear(dim, dim, bias=False)
            self.mix_k = nn.Parameter(torch.full((dim,), 0.5))
            self.mix_r = nn.Parameter(torch.full((dim,), 0.5))
        self.up_proj = nn.Linear(dim, self.hidden, bias=False)
        self.down_proj = nn.Linear(self.hidden, dim, bias=False)
        self.down_proj.residual_out = True  # type: ignore[assignment]
        self.head_gate = HeadGate(dim, gate) if gate else None

    def init_state(self, batch: int, like: Tensor, capacity: int | None = None) -> State | None:
        return like.new_zeros(batch, self.dim) if self.act == "rwkv" else None

    def forward(self, x: Tensor, state: State | None = None, ctx: Ctx | None = None) -> Step:
        if self.act == "rwkv":
            return self._channel_mix(x, state, ctx)
        if self.act == "swiglu":
            hidden = F.silu(self.gate_proj(x)) * self.up_proj(x)
        else:
            hidden = self.up_proj(x)
            hidden = F.gelu(hidden) if self.act == "gelu" else F.relu(hidden).square()
        hidden, aux = gated(self.head_gate, hidden, x, ctx)
        return Step(self.down_proj(hidden), aux=aux)

    def _channel_mix(self, x: Tensor, state: State | None, ctx: Ctx | None) -> Step:
        docs = docs_of(ctx)
        step_back = token_before(x, state, docs) - x
        k = self.up_proj(x + step_back * self.mix_k.to(x.dtype))
        r = self.gate_proj(x + step_back * self.mix_r.to(x.dtype))
        hidden, aux = gated(self.head_gate, F.relu(k).square(), x, ctx)
        y = r.sigmoid() * self.down_proj(hidden)
        return Step(y, None if state is None else last_token(x, state, docs), aux)

    def cost(self, T: int) -> Cost:
        """No FLOPs beyond the Linears'; rwkv keeps one token."""
        return Cost(state_fixed=self.dim * self.up_proj.weight.element_size() if self.act == "rwkv" else 0.0)
