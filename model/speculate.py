"""Self-speculative decoding: a multi-token head drafts, the trunk verifies (Leviathan et al., 2211.17192).

Shape legend: B batch  T time  V vocabulary  n tokens of a draft

A round: the next token is known; the head guesses n more; one pass of the trunk over all n + 1 gives what the
model itself says after each of them. A guess is kept as long as it is what the model picks, so a round
brings 1 to n + 1 tokens, and the text is the one that plain decoding gives: greedily token by token, and
when sampling draw by draw. (A guess is a point mass, so to draw from the model and compare is exact
speculative sampling: a guess d is accepted with the model's probability p(d), and the draw that replaces it
is distributed as p without d.)

The pass over a draft that was not accepted whole is thrown away: a recurrent state cannot be cut. The
accepted tokens run again from the state before, so a rejected round costs two passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.core import Docs, fork

Pick = Callable[[Tensor], Tensor]


@dataclass
class Tally:
    """What speculation did. drafted, accepted: guesses, over all rows; tokens: new ones, over all rows;
    passes: of the trunk after the prompt."""

    drafted: int = 0
    accepted: int = 0
    tokens: int = 0
    passes: int = 0

    @property
    def rate(self) -> float:
        """Share of the guesses that were accepted."""
        return self.accepted / max(self.drafted, 1)

    def __str__(self) -> str:
        each = self.tokens / max(self.passes, 1)
        return (
            f"drafted {self.drafted}, accepted {self.accepted} ({self.rate:.0%});"
            f" {self.tokens} tokens in {self.passes} passes ({each:.2f} a pass)"
        )


def drafting_head(lm: Any, n: int) -> str:
    """The first head that can draft n tokens. Raises ValueError where there is none."""
    reach = {name: head.reach for name, head in lm.named_heads()}
    for name, most in reach.items():
        if most >= n:
            return name
    most = max(reach.values())
    if most == 0:
        raise ValueError(
            "speculate: no head of this model predicts several tokens; train one, like"
            " `heads: {mtp: {kind: chain, depth: 2}}`"
        )
    raise ValueError(f"speculate: {n}: this model's heads draft at most {most} tokens")


def speculate(
    lm: Any, tokens: Tensor, docs: Docs | None, n: int, pick: Pick, tally: Tally
) -> Iterator[list[Tensor]]:
    """Yield, without end, what each round adds to each row: B tensors of 1 to n + 1 ids.

    tokens [B, T], docs: the prompt; pick: logits [B, V] -> ids [B].
    """
    name = drafting_head(lm, n)
    out = lm(tokens, state=lm.init_state(len(tokens), heads=(name,)), docs=docs, last=True)
    state, hidden, known = out.state, out.hidden, pick(out.logits[:, -1])
    while True:
        guess = lm.draft(name, hidden, fork(state[f"heads.{name}"]), known[:, None], n)
        run = torch.cat([known[:, None], guess], 1)
        out = lm(run, state=fork(state))
        count, known = _judge(guess, out.logits, pick)
        tally.drafted += guess.numel()
        tally.accepted += int(count.sum()) - len(count)
        tally.tokens += int(count.sum())
        tally.passes += 1
        yield [row[: int(k)] for row, k in zip(run, count)]
        hidden = out.hidden.gather(1, (count - 1)[:, None, None].expand(-1, 1, out.hidden.shape[2]))
        state = out.state if bool((count == n + 1).all()) else _again(lm, run, count, state, tally)


def _judge(guess: Tensor, logits: Tensor, pick: Pick) -> tuple[Tensor, Tensor]:
    """([B] tokens that stand: the known one and the guesses that the model picks too, [B] the next one)."""
    B, n = guess.shape
    count = torch.ones(B, dtype=torch.int64, device=guess.device)
    going = torch.ones(B, dtype=torch.bool, device=guess.device)
    known = pick(logits[:, 0])
    for i in range(n):
        going &= known == guess[:, i]
        if not bool(going.any()):
            break
        count += going
        known = torch.where(going, pick(logits[:, i + 1]), known)
    return count, known


def _again(lm: Any, run: Tensor, count: Tensor, state: Any, tally: Tally) -> Any:
    """The state after each row's accepted tokens, from the state before the round."""
    tally.passes += 1
    most = int(count.max())
    run = run[:, :most]
    if bool((count == most).all()):
        return lm(run, state=state, last=True).state
    mask = torch.arange(most, device=run.device) < count[:, None]
    return lm(run, state=state, docs=Docs.from_mask(mask), last=True).state
