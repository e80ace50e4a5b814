"""A text inside a teacher's chat template, as ids.

The template is written by transformers around a placeholder; the text itself is tokenized apart, so that no
control string in it becomes a control id.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from dataset.files import DatasetError

PLACE = "\u2402TEXT\u2403"  # control pictures: no template and no instruction holds them
INSTRUCTION = "Continue the following text from where it stops. Answer with the continuation alone.\n\n"


@dataclass(frozen=True)
class Frame:
    """ids before and after the user's text, up to where the answer begins; `stop` ends an answer."""

    before: np.ndarray
    after: np.ndarray
    stop: frozenset[int]

    def __len__(self) -> int:
        return len(self.before) + len(self.after)

    def around(self, ids: np.ndarray) -> np.ndarray:
        return np.concatenate([self.before, ids, self.after])


def frame(tokenizer: Any, instruction: str = INSTRUCTION) -> Frame:
    """The frame that transformers' `tokenizer` puts around instruction and text.

    Raises DatasetError when it has no chat template, or one that does not repeat the user's text once.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise DatasetError("--chat: the teacher's tokenizer has no chat template. Leave --chat out")
    user = {"role": "user", "content": instruction + PLACE}

    def written(messages: list[dict[str, str]], **options: Any) -> str:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))

    def ids(text: str) -> np.ndarray:
        return np.array(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int64)

    parts = written([user], add_generation_prompt=True).split(PLACE)
    if len(parts) != 2:
        raise DatasetError("--chat: the teacher's chat template does not hold the user's text exactly once")
    answered = written([{"role": "user", "content": "a"}, {"role": "assistant", "content": PLACE}])
    end = ids(answered.split(PLACE)[-1])
    stop = {int(i) for i in end[:1]} | {tokenizer.eos_token_id}
    return Frame(ids(parts[0]), ids(parts[1]), frozenset(i for i in stop if i is not None))
