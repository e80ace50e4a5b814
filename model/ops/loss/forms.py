"""The loss of one token: cross-entropy, and what may stand in its place.

With ce the cross-entropy of a token in nats, H the entropy of the predicted distribution, lse the
log-sum-exp of the logits:

    ce                                                          z > 0 adds  z lse²  to any of them
    mile   (1 + H)^gamma ce, the factor without gradient        Su et al. 2024, arXiv 2310.19531
    alpha  (e^((alpha-1) ce) - 1) / (alpha (alpha-1))           Amari's alpha-divergence from the one-hot
                                                                target to the prediction; ce at alpha = 1

Shape legend: R rows of a chunk  V vocabulary
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

KINDS = ("ce", "mile", "alpha")


class TokenLoss(NamedTuple):
    """See the module. Raises nothing: the configuration checks ranges."""

    kind: str = "ce"
    z: float = 0.0
    gamma: float = 1.0
    alpha: float = 1.5

    @property
    def settled(self) -> TokenLoss:
        """The same loss, called ce where its parameter makes it that: it is computed as that, bit for bit."""
        neutral = {"ce": True, "mile": self.gamma == 0, "alpha": self.alpha == 1}[self.kind]
        return TokenLoss("ce", self.z) if neutral else self

    @property
    def plain(self) -> bool:
        """Cross-entropy and nothing else."""
        return self.settled == TokenLoss()

    def of(self, ce: Tensor, logits: Tensor, lse: Tensor) -> tuple[Tensor, Tensor | None]:
        """(loss [R] without its z term, d loss / d ce [R] or None for 1). ce, lse [R], logits [R, V]."""
        if self.kind == "mile":
            factor = (1 + entropy(logits, lse)).pow(self.gamma)
            return factor * ce, factor
        if self.kind == "alpha":
            power = torch.exp((self.alpha - 1) * ce)
            return (power - 1) / (self.alpha * (self.alpha - 1)), power / self.alpha
        return ce, None


def entropy(logits: Tensor, lse: Tensor) -> Tensor:
    """[R] entropy in nats of softmax(logits [R, V])."""
    return lse - (logits - lse[:, None]).exp_().mul_(logits).sum(-1)
