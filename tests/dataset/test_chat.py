"""Continuations asked for in a chat template: the teacher's own layout, and text that stays text."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from dataset.chat import INSTRUCTION, frame
from dataset.continuation import Recipe, continue_documents
from dataset.files import DatasetError
from dataset.score import Reference
from dataset.tokenizers import make
from dataset.train_tokenizer import train

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def chatty(tmp_path_factory, corpus):
    """A byte-level tokenizer with a chat template: transformers' and ours, from one file."""
    folder = tmp_path_factory.mktemp("chat")
    train((str(corpus),), 300, folder / "bpe")
    theirs = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "bpe" / "tokenizer.json"),
        eos_token="<|endoftext|>",
        chat_template=TEMPLATE,
    )
    theirs.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    theirs.save_pretrained(folder / "saved")
    return theirs, make(str(folder / "saved"))


def test_the_frame_is_the_template(chatty):
    theirs, ours = chatty
    asked = frame(theirs)
    text = "def f(x):\n    return x"
    got = theirs.decode(asked.around(ours.encode(text)).tolist())
    message = [{"role": "user", "content": INSTRUCTION + text}]
    assert got == theirs.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    end = theirs.convert_tokens_to_ids("<|im_end|>")
    assert asked.stop == {end, theirs.eos_token_id} and end in asked.after.tolist()


def test_control_strings_in_the_text_stay_text(chatty):
    theirs, ours = chatty
    asked = frame(theirs)
    ids = asked.around(ours.encode("a<|im_end|>b"))
    controls = [i for i in ids.tolist() if i in set(theirs.all_special_ids)]
    assert controls == [i for i in [*asked.before, *asked.after] if i in set(theirs.all_special_ids)]


def test_templates_that_cannot_be_used(chatty):
    theirs, _ = chatty
    template = theirs.chat_template
    try:
        for wrong, word in ((None, "no chat template"), ("{{ messages[0]['role'] }}", "exactly once")):
            theirs.chat_template = wrong
            with pytest.raises(DatasetError, match=word):
                frame(theirs)
    finally:
        theirs.chat_template = template


def test_continuations_are_asked_in_the_template(byte_data, tmp_path, chatty):
    theirs, ours = chatty
    end, seen = theirs.convert_tokens_to_ids("<|im_end|>"), []

    def generate(tokens, max_new_tokens, temperature=0.0):
        seen.append(tokens[0].tolist())
        said = torch.from_numpy(ours.encode("an answer").astype(np.int64))[None]
        rest = torch.full((1, max_new_tokens - said.shape[1]), end)
        return torch.cat([tokens, said, rest], 1)

    teacher = Reference(lambda t: t, generate, ours, {"name": "t"}, 400, lambda: theirs)
    recipe = Recipe(prefix=40, new=30, documents=5, chat=True)
    made = continue_documents(byte_data, teacher, tmp_path / "out", recipe)
    asked = frame(theirs)
    assert len(seen) == 5 and all(len(s) + 30 <= 400 for s in seen)
    for ids in seen:
        assert ids[: len(asked.before)] == asked.before.tolist()
        assert ids[len(ids) - len(asked.after) :] == asked.after.tolist()
    for i, document in enumerate(made.splits["train"]):
        assert made.tokenizer.decode_bytes(document).endswith(b"an answer"), i
    plain = Reference(lambda t: t, generate, ours, {"name": "t"}, 400)
    with pytest.raises(DatasetError, match="--chat"):
        continue_documents(byte_data, plain, tmp_path / "b", recipe)
    short = Reference(lambda t: t, generate, ours, {"name": "t"}, 60, lambda: theirs)
    with pytest.raises(DatasetError, match="--new"):
        continue_documents(byte_data, short, tmp_path / "c", recipe)
