"""Reference losses: every token once, exact sums across tokenizers, restartable; continuations."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dataset
from dataset import score as scoring
from dataset.continuation import Recipe, continue_documents, unwanted
from dataset.exchange import import_corpus
from dataset.files import DatasetError
from dataset.plan import Request
from dataset.prepare import prepare
from dataset.score import Reference, align, load_reference, score, score_ids, windows
from dataset.sidecar import Sidecar, SidecarWriter, give_alias, sidecar_faults
from dataset.tokenizers import make
from dataset.train_tokenizer import train


@given(st.integers(1, 500), st.integers(2, 64))
def test_windows_score_every_id_but_the_first_once_with_half_a_window_before(n, context):
    seen = []
    for start, stop, first in windows(n, context):
        assert 0 <= start < first <= stop <= n and stop - start <= context
        assert start == 0 or first - start >= context // 2
        seen += range(first, stop)
    assert seen == list(range(1, n))


def bigram(vocab: int, tokenizer, context: int = 32, seed: int = 0) -> Reference:
    """A model whose nats depend on the id before: any window gives the same values."""
    table = torch.log_softmax(torch.randn(vocab, vocab, generator=torch.Generator().manual_seed(seed)), -1)

    def nats(tokens):
        return -table[tokens[:, :-1], tokens[:, 1:]]

    def generate(tokens, max_new_tokens, temperature=0.0):
        made = [tokens]
        for k in range(max_new_tokens):
            made.append(torch.full((tokens.shape[0], 1), 97 + (k * 7) % 26))
        return torch.cat(made, 1)

    reference = Reference(nats, generate, tokenizer, {"name": f"bigram{seed}", "weights": str(seed)}, context)
    reference.table = table
    return reference


def test_scores_do_not_depend_on_windows_or_batches():
    reference = bigram(50, make("bytes"))
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 50, n) for n in (1, 2, 31, 32, 33, 200)]
    for batch_tokens in (1, 64, 10_000):
        for ids, got in zip(documents, score_ids(reference, documents, batch_tokens, "cpu")):
            wanted = -reference.table[ids[:-1], ids[1:]].numpy()
            assert got[0] == 0 and np.allclose(got[1:], wanted)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_alignment_keeps_sums_between_shared_boundaries(data):
    total = data.draw(st.integers(1, 40))

    def sizes():
        cuts = sorted(data.draw(st.sets(st.integers(1, total - 1), max_size=10))) if total > 1 else []
        return np.diff([0, *cuts, total])

    own, theirs = np.append(sizes(), 0), np.append(sizes(), 0)
    nats = np.array(data.draw(st.lists(st.floats(0, 20), min_size=len(theirs), max_size=len(theirs))))
    got = align(own, theirs, nats)
    assert len(got) == len(own) and got[-1] == np.float32(nats[-1])
    mine, other = np.cumsum(own[:-1]), np.cumsum(theirs[:-1])
    for edge in np.intersect1d(mine, other):
        assert got[:-1][mine <= edge].sum() == pytest.approx(
            nats[:-1][other <= edge].sum(), rel=1e-5, abs=1e-4
        )
    if np.array_equal(own, theirs):
        assert np.allclose(got, nats)


def test_alignment_of_other_text_is_refused():
    with pytest.raises(ValueError, match="same text"):
        align(np.array([3, 0]), np.array([4, 0]), np.array([1.0, 1.0]))


def test_score_writes_the_sidecar_and_batches_carry_it(byte_data):
    reference = bigram(260, make("bytes"))
    name, left = score(byte_data, reference, batch_tokens=500)
    assert left == 0
    view = byte_data.view(context=64, sidecar=name)
    batch = view.batch(0, 8)
    cu = batch.cu_seqlens.tolist()
    tokens, side = batch.tokens.flatten().numpy(), batch.sidecar.flatten().numpy()
    wanted = -reference.table[tokens[:-1], tokens[1:]].numpy()
    inner = np.setdiff1d(np.arange(1, len(tokens)), cu)
    assert np.allclose(side[inner], wanted[inner - 1], atol=0.01)
    assert batch.weights is None and view.id != byte_data.view(context=64).id


def test_scoring_goes_on_where_it_stopped_and_splits_into_tasks(byte_data):
    reference = bigram(260, make("bytes"), seed=1)
    calls = []
    real = reference.nats
    reference.nats = lambda tokens: (calls.append(1), real(tokens))[1]
    name, left = score(byte_data, reference, task=(0, 2))
    assert left == len(byte_data.splits["train"].shards) // 2
    with pytest.raises(DatasetError, match="no finished sidecar"):
        byte_data.view(context=64, sidecar=name)
    assert score(byte_data, reference, task=(1, 2)) == (name, 0)
    calls.clear()
    assert score(byte_data, reference) == (name, 0) and not calls
    assert name != score(byte_data, bigram(260, make("bytes"), seed=2))[0]


def test_a_reference_with_another_tokenizer_gives_the_same_sums(byte_data, corpus, tmp_path):
    bpe = train((str(corpus),), 500, tmp_path / "bpe")
    reference = bigram(bpe.vocab, bpe, context=10_000)
    name, _ = score(byte_data, reference)
    side = dataset.open(byte_data.path).view(context=64, sidecar=name).source.sidecar
    shard = byte_data.splits["train"].shards[0]
    values = side.values(shard).astype(np.float64)
    for i in range(5):
        stop = int(shard.end[i])
        text = byte_data.tokenizer.decode(shard.document(i))
        ids = np.append(bpe.encode(text), bpe.eos_id)
        total = float(-reference.table[ids[:-1], ids[1:]].sum())
        assert values[stop - int(shard.len[i]) : stop].sum() == pytest.approx(total, rel=2e-3)


def test_rows_and_mark_do_not_make_another_tokenizer(byte_data, corpus, tmp_path):
    """A run keeps the tokenizer.json alone: what cut the data's, and its document mark, it cannot know."""
    train((str(corpus),), 400, tmp_path / "bpe")
    request = Request((str(corpus),), str(tmp_path / "bpe"), merges=50, eos="<|bos|>", heldout=0.0)
    data = prepare(request, tmp_path / "data").dataset
    run = make(str(tmp_path / "data" / "tokenizer" / "tokenizer.json"))
    assert run.identity != data.tokenizer_identity and run.eos_id != data.eos_id
    reference = bigram(data.vocab, run)
    (values,) = scoring.Scorer(data, reference, 1000, "cpu").score([data.splits["train"].document(0)])
    ids = data.splits["train"].document(0)
    assert values[-1] == pytest.approx(-float(reference.table[int(ids[-2]), data.eos_id]), rel=1e-4)


def test_imported_documents_without_text_or_of_cut_letters(corpus, tmp_path):
    bpe = train((str(corpus),), 400, tmp_path / "bpe")
    for name, ids, ends in (("a", [257, 256, 72, 256], [2, 4]), ("b", [0xC3, 256], [2])):
        np.array(ids, "<u2").tofile(tmp_path / f"{name}.ds")
        np.array(ends, "<u8").tofile(tmp_path / f"{name}.ds.index")
    made = [
        import_corpus("datatrove", [tmp_path / f"{n}.ds"], make("bytes"), tmp_path / n) for n in ("a", "b")
    ]
    assert score(made[0], bigram(bpe.vocab, bpe))[1] == 0
    with pytest.raises(DatasetError, match="no UTF-8"):
        score(made[1], bigram(bpe.vocab, bpe))


def test_a_sidecar_has_a_name_besides_its_hash(byte_data):
    """--as: given again it is the same; a name that another has is refused."""
    writers = [SidecarWriter(byte_data, {"by": n}) for n in range(2)]
    for w in writers:
        for split in byte_data.splits.values():
            for shard in split.shards:
                w.write(shard, np.ones(shard.tokens))
            w.finish(split.shards)
    assert give_alias(byte_data, writers[0].name, "mine") == give_alias(byte_data, writers[0].name, "mine")
    assert Sidecar(byte_data, "mine").id == Sidecar(byte_data, writers[0].name).id
    for name in ("mine", writers[0].name):
        with pytest.raises(DatasetError, match="is another sidecar's name"):
            give_alias(byte_data, writers[1].name, name)
    with pytest.raises(DatasetError, match="want letters"):
        give_alias(byte_data, writers[1].name, "../x")
    assert not sidecar_faults(byte_data)


def test_a_half_scored_split_is_not_described(byte_data):
    reference = bigram(260, make("bytes"), seed=7)
    name, _ = score(byte_data, reference)
    whole = scoring.describe(byte_data, name)
    assert "train" in whole and "heldout" not in whole
    reference = bigram(260, make("bytes"), seed=8)
    assert score(byte_data, reference, task=(0, 2))[1] > 0
    name, left = score(byte_data, reference, split="heldout")
    assert left == 0 and set(scoring.describe(byte_data, name)) == {
        "reference",
        "heldout",
        "heldout bits per byte",
    }


def test_transformers_folder_as_reference(byte_data, corpus, tmp_path):
    transformers = pytest.importorskip("transformers")
    bpe = train((str(corpus),), 400, tmp_path / "bpe")
    config = transformers.LlamaConfig(
        vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    lm = transformers.LlamaForCausalLM(config).eval()
    lm.save_pretrained(tmp_path / "lm")
    (tmp_path / "lm" / "tokenizer.json").write_bytes(bpe.source)
    reference = load_reference(str(tmp_path / "lm"))
    assert reference.context == 64
    ids = bpe.encode("def return class über " * 10)
    (got,) = score_ids(reference, [ids], 1000, "cpu")
    logits = lm(torch.from_numpy(ids)[None, :64]).logits[0]
    wanted = torch.nn.functional.cross_entropy(logits[:-1], torch.from_numpy(ids[1:64]), reduction="none")
    assert np.allclose(got[1:64], wanted.detach().numpy(), atol=1e-4)
    assert (got[1:] > 0).all()
    with pytest.raises(DatasetError, match="no such folder"):
        load_reference(str(tmp_path / "nothing"))


def test_our_own_run_as_reference(byte_data, tmp_path):
    from safetensors.torch import save_file

    import model
    from model import config

    lm = model.build({"dim": 32, "vocab": 260, "stack": ["mamba2", "mlp"]})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(config.dumps(lm.config))
    save_file(lm.state_dict(), tmp_path / "run" / "model.safetensors")
    (tmp_path / "run" / "tokenizer.json").write_bytes(make("bytes").source)
    reference = load_reference(str(tmp_path / "run"), context=48)
    assert reference.tokenizer.identity == byte_data.tokenizer_identity
    ids = byte_data.splits["train"].document(0)[:40].astype(np.int64)
    (got,) = score_ids(reference, [ids], 1000, "cpu")
    logits = lm.eval()(torch.from_numpy(ids)[None]).logits[0]
    wanted = torch.nn.functional.cross_entropy(logits[:-1], torch.from_numpy(ids[1:]), reduction="none")
    assert np.allclose(got[1:], wanted.detach().numpy(), atol=1e-3)


# ----------------------------------------------------------------------------- continuations


def test_continuations_mask_the_prefix_and_use_training_text_only(byte_data, tmp_path):
    teacher = bigram(260, make("bytes"), context=512)
    recipe = Recipe(prefix=50, new=20, documents=70)
    made = continue_documents(byte_data, teacher, tmp_path / "out", recipe)
    split = made.splits["train"]
    assert split.documents == 70 and made.view(context=64).rows
    starts = [byte_data.tokenizer.decode_bytes(d[:50]) for d in byte_data.splits["train"] if len(d) > 50]
    for shard in split.shards:
        for i in range(shard.documents):
            stop = int(shard.end[i])
            ids, mask = shard.document(i), shard.msk[stop - int(shard.len[i]) : stop]
            assert mask.sum() == 21 and (np.diff(mask.astype(int)) >= 0).all() and ids[-1] == made.eos_id
            prefix = bytes(ids[mask == 0].astype(np.uint8))
            assert any(s.startswith(prefix) for s in starts)
    batch = made.view(context=64).batch(0, 4)
    assert 0 < batch.weights.mean() < 1


def test_continuations_go_on_and_refuse_other_settings(byte_data, tmp_path, monkeypatch):
    teacher = bigram(260, make("bytes"), context=512)
    recipe = Recipe(prefix=30, new=10, documents=130)
    wanted = continue_documents(byte_data, teacher, tmp_path / "a", recipe).id
    seen = []

    def stop(done, total):
        seen.append(done)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        continue_documents(byte_data, teacher, tmp_path / "b", recipe, progress=stop)
    with pytest.raises(DatasetError):
        dataset.open(tmp_path / "b")
    with pytest.raises(DatasetError, match="other settings"):
        continue_documents(byte_data, teacher, tmp_path / "b", Recipe(prefix=31, new=10, documents=130))
    (tmp_path / "b" / "shards" / "train-000001-000.tok.host.999999999.tmp").write_bytes(b"half")
    assert continue_documents(byte_data, teacher, tmp_path / "b", recipe).id == wanted
    assert not list((tmp_path / "b").rglob("*.tmp"))
    with pytest.raises(DatasetError, match="longer than --prefix"):
        continue_documents(byte_data, teacher, tmp_path / "c", Recipe(prefix=10**6))


def test_a_teacher_needs_room_for_the_text(byte_data, tmp_path):
    for context in (20, 19):
        with pytest.raises(DatasetError, match="--new 20: the teacher reads"):
            teacher = bigram(260, make("bytes"), context=context)
            continue_documents(byte_data, teacher, tmp_path / "out", Recipe(prefix=50, new=20, documents=2))
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DatasetError, match="not empty"):
        teacher = bigram(260, make("bytes"), context=64)
        continue_documents(byte_data, teacher, tmp_path / "file", Recipe(prefix=50, new=20, documents=2))


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("", "empty"),
        (" \n", "empty"),
        ("I'm sorry, but I can't help with that.", "refusals"),
        ("As an AI language model", "refusals"),
        ("x\n" * 10, "repetitions"),
        ("def f(x):\n    return x\n\n\ndef g():\n    pass\n", None),
    ],
)
def test_unwanted_answers(answer, reason):
    assert unwanted(answer) == reason


def test_identity_names_weights_not_places(tmp_path):
    for folder, weights in (("here", b"weights"), ("there", b"weights"), ("other", b"weighty")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a").write_bytes(weights)
    here, there, other = (scoring._hash_files([tmp_path / f / "a"]) for f in ("here", "there", "other"))
    assert here == there != other
    assert "/" not in json.dumps(bigram(4, make("bytes")).identity)
