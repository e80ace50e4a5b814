"""lm-evaluation-harness over a compressed decoder: only a context's last tokens stay as they are.

    from experiments.compression.lm_eval_adapter import harness_model
    lm_eval.simple_evaluate(model=harness_model(compressor, tokenizer, keep=32, ratio=4.0), tasks=[...])

`Requests` does the work and knows nothing of the harness; the class that it sees is of `train.harness`.
"""

from __future__ import annotations

from typing import Any

import torch

from model.compress.base import ContextCompressor
from model.compress.rows import token_losses
from model.compress.tokens import token_ids, translated
from train import harness


class Requests:
    """keep: tokens before a continuation that are never compressed (1 or more).  asked: ratio or budget."""

    def __init__(self, compressor: ContextCompressor, tokenizer: Any, keep: int = 32, **asked: Any) -> None:
        if keep < 1:
            raise ValueError(f"keep={keep}: at least the last token before a continuation must stay")
        self.c, self.tokenizer, self.keep, self.asked = compressor.eval(), tokenizer, keep, asked
        self.reader = compressor.context_tokenizer(tokenizer)

    def _split(self, ids: list[int]) -> tuple[Any, list[int]]:
        """The compressed head of a context and its tail; None and all of it where the head would be too short
        to be one slot at the ratio that is asked."""
        head, tail = ids[: -self.keep], ids[-self.keep :]
        read = translated(head, self.tokenizer, self.reader) if head else []
        if len(read) < max(1.0, self.asked.get("ratio") or 1.0):
            return None, ids
        return self.c.compress(torch.tensor([read]), **self.asked), tail

    @torch.no_grad()
    def score(self, context: str, continuation: str) -> tuple[float, bool]:
        """Log-likelihood of the continuation in nats, and whether it is what greedy decoding would write."""
        before = token_ids(self.tokenizer, context, start=True) if context else []
        wanted = token_ids(self.tokenizer, continuation)
        if not before:
            before = [self.c.decoder.config.bos_token_id or self.c.decoder.config.eos_token_id or 0]
        kept, tail = self._split(before)
        ids = torch.tensor([tail + wanted])
        logits, _ = self.c.decode(kept, ids)
        labels = ids.clone()
        labels[:, : len(tail)] = -100
        nll = token_losses(logits, labels)
        greedy = logits[0, len(tail) - 1 : -1].argmax(-1).tolist() == wanted
        return -float(nll.sum()), greedy

    @torch.no_grad()
    def write(self, context: str, until: list[str], max_new_tokens: int) -> str:
        """Greedy continuation, cut before the first of `until`."""
        kept, tail = self._split(token_ids(self.tokenizer, context, start=True))
        made = self.c.generate(
            torch.tensor([tail]), kept, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=0
        )
        text = self.tokenizer.decode(made[0, len(tail) :].tolist(), skip_special_tokens=True)
        return harness.cut_before(text, until)


def harness_model(compressor: ContextCompressor, tokenizer: Any, keep: int = 32, **asked: Any) -> Any:
    """An `lm_eval.api.model.LM`. Raises UserError, naming the extra, where lm-eval is not installed."""
    return harness.harness_model(Requests(compressor, tokenizer, keep, **asked))
