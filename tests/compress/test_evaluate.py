"""The evaluator: what must come out for methods whose value is known, and the examples it is fed."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace

import pytest
import tokenizers
import tokenizers.processors
import torch

from experiments.compression.report import figure
from model.compress import Chain, load_compressor, wrap
from model.compress import evaluate as ev
from model.compress.tokens import token_ids
from tests.compress.test_contract import make
from tests.compress.tiny import batch, tiny_decoder
from train import compress_data as data
from train.errors import UserError


def rows(n=6, context=20, text=8):
    ids, _ = batch([context + text] * n)
    return data.collate([data.Example(tuple(r[:context]), tuple(r[context:])) for r in ids.tolist()])


def test_full_is_one_and_none_is_zero(model):
    """18. By definition: the full context recovers everything, no context nothing."""
    b = rows()
    full = ev.score(wrap(model, "full"), [b, b], variants=("none", "full", "compressed", "shuffled"))
    none = ev.score(wrap(model, "none"), [b], variants=("none", "full", "compressed"))
    assert full.loss("compressed") == pytest.approx(full.loss("full"), abs=1e-5)
    assert none.loss("compressed") == pytest.approx(none.loss("none"), abs=1e-5)
    assert full.kv_bytes == full.full_kv_bytes and none.kv_bytes == 0
    assert full.loss("shuffled") != pytest.approx(full.loss("full"), abs=1e-4)


def test_recovered_fraction_and_interval():
    made = ev.Score(
        {
            "none": torch.full((50,), 30.0),
            "full": torch.full((50,), 10.0),
            "compressed": 15 + torch.randn(50),
        },
        torch.full((50,), 10),
    )
    r, low, high = made.recovered()
    assert low < r < high and r == pytest.approx(0.75, abs=0.03) and high - low < 0.1
    assert made.beats("none")[1] > 0
    flat = ev.Score({k: torch.ones(4) for k in ("none", "full", "compressed")}, torch.full((4,), 10))
    assert flat.recovered() is None


def test_oracle_beats_random_slots(llama):
    """The bound really is fitted to the text it is scored on."""
    made = ev.score(wrap(llama, "oracle", steps=40, lr=0.05), [rows(3)], budget=4)
    assert made.loss("compressed") < min(made.loss("none"), made.loss("random")) - 0.05


def test_restore_and_answers(llama):
    b = rows(3)
    b.context_mask[0, 12:] = b.source_mask[0, 12:] = False
    for wrong, want in ((0, 1.0), (5, 1 - 10 / 49)):  # 11 + 19 + 19 tokens have one before them

        def recites(context, ids, mask, wrong=wrong):
            """Predicts every next token, but for the first `wrong` of rows 1 and 2; garbage on padding."""
            told = ids.roll(-1, 1).masked_fill(~mask.roll(-1, 1), 7)
            told[1:, :wrong] += 1
            return torch.nn.functional.one_hot(told, 70), None

        oracle = SimpleNamespace(compress=lambda ids, mask, **asked: None, decode=recites)
        assert ev.restore_accuracy(oracle, b) == pytest.approx(want)
    pooled = wrap(llama, "mean_pool")  # and of a real one, counted row by row
    found = right = 0
    for row, n in enumerate((12, 20, 20)):
        ids = b.context[row : row + 1, :n]
        said = pooled.decode(pooled.compress(ids, ratio=2), ids)[0][:, :-1].argmax(-1)
        right, found = right + int((said == ids[:, 1:]).sum()), found + n - 1
    assert ev.restore_accuracy(pooled, b, ratio=2) == pytest.approx(right / found)
    assert ev.exact_match("The Paris.", "paris") == 1 and ev.exact_match("Rome", "paris") == 0
    assert ev.f1("blue sky", "the blue sea") == pytest.approx(0.5)
    assert ev.cost(wrap(llama, "mean_pool"), b, new_tokens=2, rounds=1, ratio=4).compress_s > 0


def test_cost_counts_the_prefill_of_the_slots(llama, monkeypatch):
    """Embedding slots are lowered inside what is timed as compressing, not between the clocks."""
    c, clock = wrap(llama, "last"), iter(range(1000))
    lower, lowered_at = c.lower, []
    monkeypatch.setattr(c, "lower", lambda context: lowered_at.append(next(clock)) or lower(context))
    monkeypatch.setattr(ev.time, "perf_counter", lambda: next(clock))
    ev.cost(c, rows(2), new_tokens=1, rounds=1, ratio=4)
    assert lowered_at[0] == 1  # 0 began it


def test_a_cost_that_did_not_show_is_not_a_number():
    times = {"compress": [3.0], "slots_1": [2.0], "slots_n": [4.0], "full_1": [3.0], "full_n": [3.0]}
    assert ev.Cost.of(times, 8) == ev.Cost(3.0, 2.0, 3.0, 4.0, None, 3.0)
    assert ev.Cost.of(times | {"full_1": [2.0]}, 8).break_even is None
    assert figure([None, 5.04, 7.0], 1) == "7.0" and figure([None, 5.0, None], 0) == "n/a"


class Letters:
    """A tokenizer of one id per character, within the tiny vocabulary, that begins a text with id 1."""

    def encode(self, text, add_special_tokens=True):
        return [1] * add_special_tokens + [3 + ord(c) % 58 for c in text]

    def decode(self, ids, skip_special_tokens=True):
        return "".join(chr(97 + i % 26) for i in ids)


def test_passkey_table(llama):
    rng, made = random.Random(0), []
    full = wrap(llama, "full")
    said = ev.answer(full, Letters(), "a" * 8, ["k"])[0]  # what it writes after these, right by definition

    def make_record(length, depth):
        made.append((length, depth))
        right = depth == 0.0 or (depth == 0.5 and len(made) % 2)
        return {"context": "a" * length, "prompt": "k", "answer": f" {said[:4]} " if right else "#"}

    table = ev.passkey_table(full, Letters(), make_record, [8], [0.0, 0.5, 1.0], trials=2)
    assert table == {(8, 0.0): 1.0, (8, 0.5): 0.5, (8, 1.0): 0.0}
    assert made == [(8, d) for d in (0.0, 0.5, 1.0) for _ in range(2)] and len(said) == 12
    record = data.passkey(rng, lines=5, depth=1.0)
    assert record["answer"].strip() in record["context"].splitlines()[-1]


def test_chain(tmp_path, llama):
    """17. Carriers are checked when built; a chain of embeddings and eviction works and comes back."""
    auto = make(llama, "autocompressor")
    evict = wrap(auto.decoder, "sink_window", sinks=1)
    chain = Chain([auto, evict])
    b = rows(2)
    context = chain.compress(b.context, b.context_mask, budget=5)
    assert context.slot_counts.unique().tolist() == [5] and context.method == "chain"
    chain.save(tmp_path)
    again = load_compressor(tmp_path, tiny_decoder("llama"))
    assert isinstance(again, Chain)
    assert torch.equal(
        again.decode(again.compress(b.context, budget=5), b.text)[0], chain.decode(context, b.text)[0]
    )
    with pytest.raises(ValueError, match="another decoder"):
        load_compressor(tmp_path, tiny_decoder("llama", seed=1))
    with pytest.raises(ValueError, match="accepts tokens"):
        Chain([evict, wrap(auto.decoder, "mean_pool")])
    with pytest.raises(ValueError, match="same decoder"):
        Chain([auto, wrap(tiny_decoder("llama", seed=3), "sink_window")])
    embeds_after_cache = wrap(auto.decoder, "autocompressor", summary_length=2, lora_rank=0)
    with pytest.raises(ValueError, match="accepts embeds"):
        Chain([evict, embeds_after_cache])
    assert Chain([auto, embeds_after_cache]).compress(b.context).slot_counts.tolist() == [2, 2]


def test_chain_reads_with_the_adapter_that_wrote(llama):
    """Slots of an AutoCompressor are lowered and read with its LoRA, evicted or not; of two AutoCompressors,
    with that of the second."""
    auto, b = make(llama, "autocompressor"), rows(2)
    evict, own = wrap(auto.decoder, "sink_window"), auto.compress(b.context)
    want = auto.decode(own, b.text)[0]
    assert not torch.allclose(auto.decode(own, b.text, adapted=False)[0], want, atol=0.1)
    for chain in (Chain([auto]), Chain([auto, evict])):
        context = chain.compress(b.context, budget=9)
        assert torch.allclose(chain.decode(context, b.text)[0], want, atol=2e-5)
        assert torch.allclose(chain.lower(context)[1].keys, auto.lower(own)[1].keys, atol=2e-5)
    second = make(auto.decoder, "autocompressor", summary_length=2)
    twice = Chain([auto, second])
    context, slots = twice.compress(b.context), torch.tensor([2, 2])
    again = second.recompress(auto.compress(b.context), slots)
    assert torch.allclose(twice.decode(context, b.text)[0], second.decode(again, b.text)[0], atol=2e-5)


def test_chain_of_a_code(llama):
    """What quality clusters keep as a code is run into a cache before another stage selects from it."""
    c = make(llama, "clusters", mode="quality")
    chain, b = Chain([c, wrap(c.decoder, "sink_window")]), rows(2)
    kept = chain.compress(b.context, budget=20)
    assert torch.allclose(
        chain.decode(kept, b.text)[0], c.decode(c.compress(b.context), b.text)[0], atol=2e-5
    )


# ------------------------------------------------------------------ examples


def test_collate_scores_answers_alone():
    b = data.collate([data.Example((5, 6, 7), (8, 9, 10), 2), data.Example((5,), (8,), 0)])
    assert b.labels.tolist() == [[-100, -100, 10], [8, -100, -100]]
    assert b.context_mask.tolist() == [[True, True, True], [True, False, False]]


@pytest.mark.parametrize("kind", ["passkey", "recall", "arithmetic"])
def test_generated_answers_are_in_reach(kind):
    for r in data.generate(kind, 20, 0):
        answer = r["answer"].strip()
        if kind == "arithmetic":
            numbers = [int(w) for w in r["context"].replace(".", "").split() if w.isdigit()]
            assert sum(numbers) == int(answer)
        else:
            assert answer in r["context"]
    assert (
        list(data.generate(kind, 3, 1)) == list(data.generate(kind, 3, 1)) != list(data.generate(kind, 3, 2))
    )


def test_files(tmp_path):
    how = data.Reading(context=6, target=2, heldout=0.3)
    jsonl = tmp_path / "a.jsonl"
    lines = [{"context": "abc", "activation_prompt": "q", "expected_completion": str(i)} for i in range(5)]
    jsonl.write_text("\n".join(json.dumps(x) for x in lines))
    train, held, dropped = data.read(str(jsonl), Letters(), how)
    assert len(train) + len(held) == 5 and not set(train) & set(held) and not dropped
    (tmp_path / "t.txt").write_text("lorem ipsum dolor " * 10)
    assert all(
        len(e.context) == 6 and len(e.text) == 2
        for e in data.read(str(tmp_path / "t.txt"), Letters(), how)[0]
    )
    task = {"Definition": ["Say it."], "Instances": [{"input": str(i), "output": ["yes"]} for i in range(4)]}
    (tmp_path / "sni.json").write_text(json.dumps(task))
    assert sum(map(len, data.read(str(tmp_path / "sni.json"), Letters(), how)[:2])) == 4
    choice = {"context": "c", "question": "q", "answer": "B", **{f"choice_{x}": x for x in "ABCD"}}
    (tmp_path / "lb.json").write_text(json.dumps([choice] * 3))
    assert sum(map(len, data.read(str(tmp_path / "lb.json"), Letters(), how)[:2])) == 3
    wordnet = tmp_path / "wn"
    wordnet.mkdir()
    entry = "0000 03 n 01 word{} 0 001 @ 00 n 0000 | gloss number {}; an example"
    (wordnet / "data.noun").write_text("\n".join(entry.format(i, i) for i in range(9)))
    (one,) = data.generate(f"wordnet:{wordnet}", 1, 0)
    assert one["answer"].strip().startswith("word") and "gloss number" in one["prompt"]


def test_what_is_left_out_is_counted(tmp_path):
    """Texts shorter than a window and the tails of others, records that are too long or lack a part."""
    how = data.Reading(context=6, target=2, heldout=0.3, max_tokens=9)
    texts = [{"text": "x" * n} for n in (24, 10, 3)]  # with BOS 25, 11 and 4 tokens
    records = [{"context": "c" * n, "prompt": "p", "answer": a} for n, a in ((30, "a"), (5, ""), (5, "a"))]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(r) for r in texts + records))
    train, held, dropped = data.read(str(tmp_path / "a.jsonl"), Letters(), how)
    assert len(train) + len(held) == 3 + 1 + 1
    assert dropped == {data.TAIL: 1 + 3 + 4, data.LONG: 1, data.EMPTY: 1}
    assert "8 tokens behind the last whole window" in data.left_out(dropped)


def test_nobody_is_shuffled_with_himself(llama):
    from experiments.compression.arms import batches_of

    alone = rows(1)
    with pytest.raises(ValueError, match="no other row"):
        ev.losses_of(wrap(llama, "mean_pool"), alone, ("shuffled",), ratio=4)
    example = data.Example((4, 5), (6, 7))
    assert [len(b.text) for b in batches_of([example] * 33)] == [11, 11, 11]
    assert [len(b.text) for b in batches_of([example] * 32)] == [16, 16]


def test_special_tokens_stand_where_a_text_begins(tmp_path):
    """BOS before the context; none is supervised, or read between prompt and answer."""
    (tmp_path / "a.jsonl").write_text('{"context": "ab", "prompt": "cd", "answer": "e"}\n' * 2)
    (one,), _, _ = data.read(str(tmp_path / "a.jsonl"), Letters(), data.Reading(heldout=0.5))
    bare = Letters().encode("abcde", add_special_tokens=False)
    assert one == data.Example((1, *bare[:2]), tuple(bare[2:]), 2)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "<s>": 1}, unk_token="a"))
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    assert token_ids(tokenizer, "a") == [0] and token_ids(tokenizer, "a", start=True) == [1, 0]


def test_bad_sources_are_named(tmp_path):
    how = data.Reading()
    (tmp_path / "a.jsonl").write_text('{"context": "x"}\n')
    for source, word in (
        ("nowhere.bin", "not a dataset"),
        (str(tmp_path / "a.jsonl"), "a.jsonl:1"),
        ("gone.jsonl", "no such"),
    ):
        with pytest.raises(UserError, match=word):
            data.read(source, Letters(), how)


# ------------------------------------------------------------------ beside the scoreboard


def test_requests_of_the_harness(llama):
    """A likelihood is that of the tokens after the kept tail; without compression it is the decoder's own."""
    from experiments.compression.lm_eval_adapter import Requests

    full, pooled = (Requests(wrap(llama, m), Letters(), keep=2) for m in ("full", "mean_pool"))
    nats, greedy = full.score("abcdefgh", "ij")
    ids = torch.tensor([Letters().encode("abcdefghij")])  # BOS stands before the context alone
    logp = llama(ids).logits.log_softmax(-1)
    want = logp[0, 8, ids[0, 9]] + logp[0, 9, ids[0, 10]]
    assert nats == pytest.approx(want.item(), abs=1e-4) and isinstance(greedy, bool)
    assert pooled.score("abcdefgh", "ij")[0] != pytest.approx(nats, abs=1e-4)
    assert full.score("", "ab")[0] < 0
    short = Requests(wrap(llama, "mean_pool"), Letters(), keep=2, ratio=4.0)  # two tokens are no slot at 4
    assert short.score("abcd", "ij")[0] == pytest.approx(full.score("abcd", "ij")[0], abs=1e-4)
    text = full.write("abcdefgh", [], 3)
    assert len(text) == 3 and full.write("abcdefgh", [text[1]], 3) == text[: text.index(text[1])]


def test_cluster_plots(tmp_path, llama):
    from experiments.compression.cluster_plots import draw, measure

    deep, ids = tiny_decoder("llama", num_hidden_layers=4), batch([24])[0]
    how = {"layer_idx": (0, 2), "importance": False, "contrastive_weight": 0.0, "similarity_threshold": 0.2}
    for more in ({}, {"attention_weight": 0.3, "position_reach": 20.0}):  # in the mode that is asked for
        c = wrap(deep, "clusters", **how, **more)
        counts = c.compress(ids).slot_counts[[1, 3], 0].tolist()
        found = measure(c, ids)
        assert [f["layer"] for f in found] == [0, 2] and 24 > counts[0] > counts[1]
        assert [f["ratio"] for f in found] == pytest.approx([24 / n for n in counts])
        assert [len(f["member"]) for f in found] == [24, counts[0]]
    quality = measure(wrap(deep, "clusters", mode="quality", **how), ids)
    assert [len(f["tau"]) for f in quality] == [24, 24]
    draw(found, tmp_path / "c.png")
    assert (tmp_path / "c.png").stat().st_size > 1000
