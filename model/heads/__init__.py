"""Prediction heads: of the token itself, the next, the one after it, or several at once.

A head reads the trunk's states. Its predictions are read off the model's one table, and its loss goes through
the chunked cross-entropy, so no batch of logits is ever held.

    single    one prediction, `shift` tokens on                              model.heads.single
    parallel  shifts 1..n, each from the trunk alone                         model.heads.single
    chain     depth k reads depth k-1 and the token it has reached           model.heads.chain
    mask      a block of tokens, any subset of them masked                   model.heads.blockwise
    var       a block of tokens, coarse to fine: one code, then the tokens   model.heads.blockwise
"""

from __future__ import annotations

from collections.abc import Callable

from model.heads.base import Head, HeadCost, HeadStep, Reading, Readout, Words
from model.heads.blockwise import MaskHead, VarHead
from model.heads.chain import ChainHead
from model.heads.single import ParallelHead, SingleHead
from model.heads.targets import IGNORE, shift_targets, shift_weights
from model.schema import HeadConfig

__all__ = [
    "IGNORE", "Head", "HeadCost", "HeadStep", "Reading", "Readout", "Words", "make_head", "shift_targets",
    "shift_weights",
]  # fmt: skip

KINDS: dict[str, Callable[[int, HeadConfig, float], Head]] = {
    "single": SingleHead,
    "parallel": ParallelHead,
    "chain": ChainHead,
    "mask": MaskHead,
    "var": VarHead,
}


def make_head(dim: int, config: HeadConfig, norm_eps: float = 1e-5) -> Head:
    """The head that a configuration describes. Raises ValueError where its sizes do not fit the width."""
    return KINDS[config.kind](dim, config, norm_eps)
