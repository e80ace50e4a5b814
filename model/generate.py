"""Sampling: prefill the prompt once, then one token a step over the same forward, or several by speculation.

Shape legend: B batch  T time  V vocabulary  n new tokens
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from model.core import Docs
from model.speculate import Tally
from model.speculate import speculate as rounds


def pick(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One token a row, [B], from logits [B, V].

    temperature 0 is greedy. top_k keeps the k likeliest tokens; top_p keeps the smallest set of likeliest
    tokens whose probability reaches p (nucleus sampling, arXiv 1904.09751). Both may be given.
    Raises ValueError for values out of range.
    """
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be >= 0 and finite, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be >= 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        floor = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < floor, float("-inf"))
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        probs = ordered.softmax(-1)
        beyond = probs.cumsum(-1) - probs >= top_p  # the token that crosses p is kept
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), float("-inf"))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)


@torch.no_grad()
def stream(
    lm: Any,
    tokens: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop: int | None = None,
    mask: Tensor | None = None,
    speculate: int = 0,
    tally: Tally | None = None,
) -> Iterator[Tensor]:
    """Yield new tokens [B], one step at a time, from a prompt [B, T] with T >= 1.

    seed:      makes sampling repeatable.
    stop:      end once every row has produced this id.
    mask:      [B, T], nonzero where there is a token: prompts of different lengths, padded left or right.
    speculate: guess so many tokens a pass with a multi-token head (`model.speculate`). The text is the same
               where passes over one and over several tokens round alike; sampled, row by row the same
               distribution, and for one row the same draws.
    tally:     counts what speculation did.
    Raises ValueError for a prompt without tokens, and where no head can draft as many.
    """
    docs = _prompt_docs(tokens, mask)
    generator = None
    if seed is not None:
        generator = torch.Generator(device=tokens.device).manual_seed(seed)

    def draw(logits: Tensor) -> Tensor:
        return pick(logits, temperature, top_k, top_p, generator)

    steps = _steps(lm, tokens, docs, draw)
    if speculate:
        steps = _merged(rounds(lm, tokens, docs, speculate, draw, tally or Tally()), len(tokens))
    ended = torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)
    for _, new in zip(range(max_new_tokens), steps):
        yield new
        if stop is not None:
            ended |= new == stop
            if bool(ended.all()):
                return


def _prompt_docs(tokens: Tensor, mask: Tensor | None) -> Docs | None:
    if tokens.dim() != 2 or tokens.shape[1] < 1:
        raise ValueError(f"the prompt must be [B, T] with at least one token, got {list(tokens.shape)}")
    if mask is None:
        return None
    if mask.shape != tokens.shape or not bool(mask.any(1).all()):
        raise ValueError(
            f"mask must be [B, T] = {list(tokens.shape)} with a token in every row, got {list(mask.shape)}"
        )
    return None if bool(mask.all()) else Docs.from_mask(mask)


def _steps(lm: Any, tokens: Tensor, docs: Docs | None, draw: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
    """New tokens [B], one pass each, without end."""
    state = lm.init_state(tokens.shape[0], heads=())
    while True:
        out = lm(tokens, state=state, docs=docs, last=True)
        state, docs = out.state, None
        new = draw(out.logits[:, -1])
        yield new
        tokens = new[:, None]


def _merged(found: Iterator[list[Tensor]], batch: int) -> Iterator[Tensor]:
    """New tokens [B], from rounds that bring each row another number of them."""
    rows: list[list[Tensor]] = [[] for _ in range(batch)]
    for parts in found:
        for row, part in zip(rows, parts, strict=True):
            row.extend(part.unbind())
        for _ in range(min(map(len, rows))):
            yield torch.stack([row.pop(0) for row in rows])


@torch.no_grad()
def generate(lm: Any, tokens: Tensor, max_new_tokens: int = 50, **options: Any) -> Tensor:
    """Prompt (padding and all) and new tokens, [B, T + n]; options as in `stream`. The mode is restored."""
    was_training = lm.training
    lm.eval()
    try:
        new = list(stream(lm, tokens, max_new_tokens, **options))
    finally:
        lm.train(was_training)
    return torch.cat([tokens, torch.stack(new, 1)], 1) if new else tokens
