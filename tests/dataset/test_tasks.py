"""Synthetic tasks: right by construction, the same for a seed, and ordinary datasets."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset.files import DatasetError
from dataset.tasks import MQAR, Copy, Passkey, encode, parse, write
from dataset.tokenizers import make
from dataset.verify import verify


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 38), st.integers(0, 30), st.integers(0, 2**31), st.integers(0, 1000))
def test_every_answer_is_in_the_context(pairs, noise, seed, number) -> None:
    sample = MQAR((pairs,), (noise,)).sample(seed, "train", number)
    told = sample.pieces[0].text
    table = dict(zip(told[0 : 2 * pairs : 2], told[1 : 2 * pairs : 2]))
    assert len(table) == pairs and not told[2 * pairs :].strip() and len(told) == 2 * pairs + noise
    asked, said = sample.pieces[1::2], sample.pieces[2::2]
    assert sorted(p.text for p in asked) == sorted(table)
    assert [p.text for p in said] == [table[p.text] for p in asked]
    assert all(p.answer for p in said) and not any(p.answer for p in asked)


@settings(max_examples=25, deadline=None)
@given(st.integers(140, 2000), st.floats(0, 1), st.integers(0, 2**31))
def test_the_passkey_is_told_where_it_should_be(length, depth, seed) -> None:
    sample = Passkey((length,), (depth,)).sample(seed, "heldout", 0)
    text, key = sample.pieces[0].text, sample.pieces[1].text
    assert text.count(key) == 2 and len(key) == 5
    assert length - 25 < len(text) + len(key) <= length
    hay = len(text) - len(Passkey._told(key)) - len(Passkey.question)
    assert abs(text.index("The pass key is " + key) - depth * hay) <= 30


def test_samples_depend_on_seed_split_and_number_alone() -> None:
    task = Copy((4, 8))
    assert task.sample(0, "train", 7) == Copy((4, 8)).sample(0, "train", 7)
    others = [task.sample(1, "train", 7), task.sample(0, "heldout", 7), task.sample(0, "train", 9)]
    assert all(o.pieces != task.sample(0, "train", 7).pieces for o in others)
    assert [task.sample(0, "train", n).cell for n in range(3)] == ["length=4", "length=8", "length=4"]


def test_answers_are_marked_id_by_id() -> None:
    ids, answers = encode(MQAR((2,)).sample(3, "train", 0), make("bytes"))
    assert len(ids) == 8 and answers.tolist() == [0, 0, 0, 0, 0, 1, 0, 2]


SPECS = {
    "mqqar": "allowed are copy, mqar, passkey",
    "mqar:pear=3": "no option 'pear'",
    "mqar:pairs=two": "want ints",
    "mqar:pairs=64": "from 1 to 38",
    "passkey:depths=2": "from 0 to 1",
    "passkey:digits=3/4": "want one int",
    "passkey:lengths=20": "from",
}


@pytest.mark.parametrize("spec", SPECS)
def test_a_wrong_spec_says_what_is_allowed(spec) -> None:
    with pytest.raises(DatasetError, match=SPECS[spec]):
        parse(spec)


def test_a_dataset_of_tasks(tmp_path) -> None:
    specs = ["mqar:pairs=4", "copy:lengths=6"]
    data = write(specs, make("bytes"), tmp_path / "d", samples=10, heldout=4)
    assert {n: s.documents for n, s in data.splits.items()} == {"train": 10, "heldout": 4}
    document = data.splits["train"].document(1)
    text = data.tokenizer.decode(document[:-1])
    assert text[:6] == text[7:] and text[6] == "|" and document[-1] == data.eos_id
    batch = data.view(64, packing="documents", shuffle=False).batch(0, 2)
    want = encode(parse(specs[0]).sample(0, "train", 0), data.tokenizer)[1] > 0
    assert np.array_equal(batch.weights[0, : len(want)].numpy() > 0, want)
    assert float(batch.weights[0].sum()) == want.sum() + 1  # and the end of the document
    assert write(specs, make("bytes"), tmp_path / "d", samples=10, heldout=4).id == data.id
    assert verify(tmp_path / "d") == []
    with pytest.raises(DatasetError, match="--seed at least 0"):
        write(["copy"], make("bytes"), tmp_path / "e", samples=10, heldout=4, seed=-1)
    with pytest.raises(DatasetError, match="not empty"):
        write(["copy"], make("bytes"), tmp_path / "d", samples=10, heldout=4)
    assert not list(tmp_path.glob("*.tmp"))
