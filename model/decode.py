"""Fast decoding: one compiled graph for a single token, and weights in 8 bits.

A token of a small model on a CPU costs reading its weights once, and the calls into torch. Compiling the step
takes most of the calls away; `to_int8` takes three quarters of the bytes.

Shape legend: B batch  T time  V vocabulary  D model width
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn

from model.core import Docs
from model.generate import generate
from model.lm import LanguageModel, Output
from model.run import States


class Decoder:
    """A model for `model.generate`: prompts run as they are, single tokens through one compiled graph.

    capacity: tokens (prompt and new) that attention caches have room for; one graph then serves every
              length. None is for models whose state does not grow; others would compile again and again.
    compiler: of torch.compile; `eager` only traces, for tests.

    The first single token compiles, which takes a minute or so. Results equal the model's own up to rounding.
    """

    def __init__(self, lm: LanguageModel, capacity: int | None = None, *, compiler: str = "inductor") -> None:
        self.lm, self.capacity = lm.eval(), capacity
        self._step = torch.compile(self._one, dynamic=False, backend=compiler)

    def _one(self, tokens: Tensor, state: States) -> tuple[Tensor, States]:
        out = self.lm(tokens, state=state, last=True)
        assert out.logits is not None and out.state is not None
        return out.logits, out.state

    @torch.no_grad()
    def __call__(self, tokens: Tensor, state: States, docs: Docs | None = None, last: bool = True) -> Output:
        """As `LanguageModel.forward` with a state; one token a row is taken for its last."""
        if tokens.shape[1] != 1 or docs is not None:
            return self.lm(tokens, state=state, docs=docs, last=last)
        logits, state = self._step(tokens, state)
        return Output(logits=logits, state=state)

    def init_state(self, batch: int, capacity: int | None = None, **options: Any) -> States:
        """As `LanguageModel.init_state`, with room for the decoder's own capacity unless told otherwise."""
        return self.lm.init_state(batch, self.capacity if capacity is None else capacity, **options)

    def generate(self, tokens: Tensor, max_new_tokens: int = 50, **options: Any) -> Tensor:
        """Prompt [B, T] + new tokens [B, T + n]; options as in `model.generate.generate`.
        Raises ValueError for `speculate`, whose passes are over several tokens."""
        if options.get("speculate"):
            raise ValueError(
                "speculate: a Decoder compiles the step of one token; use its model's `generate`"
            )
        return generate(self, tokens, max_new_tokens, **options)

    @property
    def training(self) -> bool:
        return False

    def eval(self) -> Decoder:
        return self

    def train(self, mode: bool = True) -> Decoder:
        if mode:
            raise ValueError("a Decoder is for generation; train its model")
        return self


def to_int8(lm: LanguageModel) -> LanguageModel:
    """Round the weights of the Linears and of the unembedding to 8 bits with a scale a row, in place.

    Inputs and sums stay as they are (torchao's weight-only form), and so does a Linear that its block marks
    `as_matrix`, because it reads the weight itself. The token table, which is read a row at a
    time, stays too; where logits are tied to it, they get a rounded copy. The model can then no longer be
    trained or saved.
    Raises ImportError with the command that installs torchao.
    """
    if importlib.util.find_spec("torchao") is None:
        raise ImportError("int8 weights need torchao: pip install 'latent-lab[int8]'")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(
        lm, Int8WeightOnlyConfig(), lambda m, _: isinstance(m, nn.Linear) and not hasattr(m, "as_matrix")
    )
    with torch.no_grad():
        table = lm.embed.output_table(lm.embed.table()) * lm.logit_scale
        head = nn.Linear(table.shape[1], table.shape[0], bias=False)
        head.weight = nn.Parameter(table.detach().clone(), requires_grad=False)
        quantize_(nn.ModuleList([head]), Int8WeightOnlyConfig())
    lm.embed.unembed = nn.Parameter(head.weight, requires_grad=False)
    lm.logit_scale = 1.0  # it is in the copy
    return lm.requires_grad_(False).eval()
