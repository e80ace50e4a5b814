"""Text to ids: special tokens stand where a text begins, and nowhere inside an example."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def token_ids(tokenizer: Any, text: str, *, start: bool = False) -> list[int]:
    """Ids of a text, by a tokenizer of transformers or of tokenizers.

    start: nothing stands before the text, so the tokenizer's own special tokens (BOS of OPT, Llama and
    Mistral) belong to it. A prompt, an answer or a continuation has none: they would be read, and scored, in
    the middle of a text.
    """
    encoded = tokenizer.encode(text, add_special_tokens=start)
    return list(getattr(encoded, "ids", encoded))


def translated(ids: Sequence[int], tokenizer: Any, reader: Any) -> list[int]:
    """The ids by which `reader`, another tokenizer, knows a context that `tokenizer` made; the same ids where
    the two are one."""
    if reader is tokenizer:
        return list(ids)
    return token_ids(reader, tokenizer.decode(list(ids), skip_special_tokens=True), start=True)
