"""What every head takes and gives.

Shape legend: B batch  T time  D model width  V vocabulary  N predictions of a reading
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from model.core import NO_AUX, Aux, Cost, Ctx, State
from model.flops import linear_flops


class Readout(NamedTuple):
    """A prediction that is reported by itself: of the token `shift` places on, with its share of the loss."""

    shift: int
    weight: float


class Words(NamedTuple):
    """The tokens of a call.

    ids:     [B, T] int64.
    embed:   ids of any shape -> their rows [..., D].
    labels:  [B, T] as `LanguageModel.forward` takes them, or None: nothing is supervised.
    weights: [B, T] loss weights of tokens, or None for 1.
    """

    ids: Tensor
    embed: Callable[[Tensor], Tensor]
    labels: Tensor | None = None
    weights: Tensor | None = None


class Reading(NamedTuple):
    """Supervised predictions of a readout, which may have several of them; their nats are added.

    h:       [N, D] states whose product with the table is the logits.
    targets: [N] int64, -100: none.
    weights: [N] factor on each one's nats, or None for 1.
    at:      [N] int64, the place in the flattened B*T to which the nats belong, or None: N is B*T, in order.
    table:   [C, D] what the logits are read off, or None: the model's own.
    """

    h: Tensor
    targets: Tensor
    weights: Tensor | None = None
    at: Tensor | None = None
    table: Tensor | None = None


class HeadStep(NamedTuple):
    """y: [B, T, D] whose product with the table is the next token's logits; None of a head that cannot say.

    readings: by readout; empty where nothing is supervised.
    """

    y: Tensor | None
    state: State | None = None
    readings: dict[str, list[Reading]] = {}
    aux: Aux = NO_AUX


class HeadCost(NamedTuple):
    """Of a head over T tokens, forward: FLOPs of its Linears, the rest, FLOPs of products with the table."""

    linear: float
    rest: Cost
    table: float


class Head(nn.Module, ABC):
    """Reads the trunk's states [B, T, D]; the state law of `core.Block` holds.

    readouts: what it predicts, by suffix: "" where there is one, else ".1", ".2" ... after the shifts.
    reach:    how many tokens after the next one it can draft.
    speaks:   it makes y, from which tokens are generated.
    """

    readouts: dict[str, Readout]
    reach: int = 0
    speaks: bool = False

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def init_state(self, batch: int, like: Tensor, capacity: int | None = None) -> State | None:
        return None

    @abstractmethod
    def forward(
        self, x: Tensor, state: State | None = None, ctx: Ctx | None = None, words: Words | None = None
    ) -> HeadStep:
        """x [B, T, D]: the trunk's states at the tokens of `words`."""

    def draft(
        self, x: Tensor, state: State | None, words: Words, n: int, pick: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """[B, n] ids: a guess at the tokens after the next one.

        x [B, 1, D]: the trunk's state at the last token; state: this head's after it, consumed; words.ids
        [B, 1]: the next token, which is known; pick: states [B, m, D] -> ids [B, m].
        Raises ValueError when n is beyond the head's reach.
        """
        self.check_reach(n)
        return words.ids[:, :0]

    def check_reach(self, n: int) -> None:
        if not 0 <= n <= self.reach:
            raise ValueError(f"this head drafts at most {self.reach} tokens after the next one, not {n}")

    def cost(self, T: int, vocab: int) -> HeadCost:
        """Of one row of T tokens, as one document."""
        return HeadCost(linear_flops(self) * T, Cost(), 2.0 * vocab * self.dim * T)


def readouts_of(shifts: list[int], weight: float) -> dict[str, Readout]:
    """One prediction a shift, each with the same weight."""
    if len(shifts) == 1:
        return {"": Readout(shifts[0], weight)}
    return {f".{shift}": Readout(shift, weight) for shift in shifts}
