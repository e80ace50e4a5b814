"""The trainer over rows of unequal length, texts longer than the decoder, and an encoder of its own."""

from __future__ import annotations

import json

import pytest
import torch

from model.compress import evaluate as ev
from model.compress import load_compressor, load_decoder, load_tokenizer, wrap
from model.compress.tokens import translated
from tests.compress.test_train import command, letters, place
from tests.compress.tiny import VOCAB, batch, tiny_decoder
from train.compress import main
from train.compress_data import Example, Reading, collate, read
from train.compress_eval import main as score
from train.compress_eval import parser, reading_of

__all__ = ["place"]
QUALITY = ["--mode", "quality"]


@pytest.fixture
def ragged(place):
    """Records of context, prompt and answer, no two of one length."""
    text = (place / "text.txt").read_text()
    records = [
        {"context": text[i : i + 5 + i], "prompt": text[i : i + 2 + i % 3], "answer": text[i : i + 1 + i % 4]}
        for i in range(12)
    ]
    (place / "a.jsonl").write_text("\n".join(json.dumps(r) for r in records))
    return place


def losses(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def ragged_run(place, method, objective, *more):
    run = f"{method}_{objective}"
    words = command(place, method, run, "--data", str(place / "a.jsonl"), "--steps", "2", *more)
    assert main([*words, "--objective", objective]) == 0
    return next(r for r in losses(place / run) if r["kind"] == "train")


def test_objectives_over_ragged_records(ragged):
    """ae scores the context, lm prompt and answer, qa the answer alone: three losses of the same batch."""
    found = [ragged_run(ragged, "condense", objective)[objective] for objective in ("ae", "lm", "qa")]
    assert len({round(x, 4) for x in found}) == 3
    assert ragged_run(ragged, "condense", "distill")["distill"] > 0


@pytest.mark.parametrize(
    "method,objective,more", [("autocompressor", "document", []), ("clusters", "through", QUALITY)]
)
def test_texts_are_joined_before_they_are_padded(ragged, method, objective, more):
    """No padding lies between a context and its text."""
    assert ragged_run(ragged, method, objective, *more)["loss"] > 0


def test_a_document_longer_than_the_decoder(place, capsys):
    """110 tokens in segments, 96 positions: trained and scored without the full context, which is said."""
    long = ["--context", "90", "--target", "20", "--segment_length", "40", "--segments_per_substep", "4"]
    assert main(command(place, "autocompressor", "a", *long)) == 0
    assert "110 positions are needed and the decoder has 96" in capsys.readouterr().out
    records = [r for r in losses(place / "a") if r["kind"] == "eval"]
    assert len(records) == 3 and all("full" not in r for r in records)
    words = ["--decoder", str(place / "decoder"), "--data", str(place / "text.txt")]
    assert score([*words, "--compressor", str(place / "a" / "best")]) == 0
    said = capsys.readouterr()
    result = json.loads(said.out)
    assert result["full"] is None and result["R"] is None and result["compressed"] > 0
    assert "110 positions" in said.err


# ------------------------------------------------------------------ an encoder of its own


@pytest.fixture
def encoder(place):
    """Wider than the decoder, with a vocabulary twice as large in the opposite order."""
    tiny_decoder("gpt2", seed=5, vocab_size=2 * VOCAB, hidden_size=48).save_pretrained(place / "encoder")
    letters(place / "encoder", {chr(65 + i): 2 * VOCAB - 1 - i for i in range(VOCAB)})
    return str(place / "encoder")


def test_every_context_is_read_in_both_vocabularies(ragged, encoder):
    both = load_tokenizer(ragged / "decoder"), load_tokenizer(encoder)
    for source in ("a.jsonl", "text.txt"):
        rows, held, _ = read(str(ragged / source), both[0], Reading(context=16, target=6), both[1])
        for e in (*rows, *held):
            assert e.read == tuple(2 * VOCAB - 1 - i for i in e.context) != e.context
    b = collate([Example((1, 2), (3,), 0, (9, 8, 7))])
    assert b.context.tolist() == [[9, 8, 7]] and b.source.tolist() == [[1, 2]]
    _, _, dropped = read(str(ragged / "a.jsonl"), both[0], Reading(max_tokens=12), both[1])
    assert sum(dropped.values()) == 4  # 13 to 16 tokens


def test_an_encoder_of_another_vocabulary_trains_and_scores(ragged, encoder, capsys):
    """Through every objective, saving, loading, scoring, answering and the harness's adapter."""
    from experiments.compression.lm_eval_adapter import Requests

    for objective in ("lm", "ae", "distill"):
        ragged_run(ragged, "condense", objective, "--encoder", encoder)
    capsys.readouterr()
    words = ["--decoder", str(ragged / "decoder"), "--data", str(ragged / "a.jsonl")]
    best = str(ragged / "condense_ae" / "best")
    assert score([*words, "--compressor", best]) == 0
    scored = json.loads(capsys.readouterr().out)
    assert score([*words, "--mode", "FA"]) == 0
    assert json.loads(capsys.readouterr().out)["full_kv_bytes"] == scored["full_kv_bytes"]
    c, tokenizer = load_compressor(best, load_decoder(ragged / "decoder")), load_tokenizer(ragged / "decoder")
    assert len(ev.answer(c, tokenizer, "ABCDEF", ["AB"], 3)) == 1
    kept, tail = Requests(c, tokenizer, keep=2)._split([0, 1, 2, 3, 4, 5])
    read_by_encoder = torch.tensor([translated([0, 1, 2, 3], tokenizer, load_tokenizer(encoder))])
    assert tail == [4, 5] and torch.equal(kept.embeds, c.compress(read_by_encoder).embeds)


def test_the_decoder_never_reads_an_encoders_ids(place, encoder):
    c = wrap(tiny_decoder("gpt2"), "condense", encoder=encoder, num_condense_tokens=4, lora_rank=2)
    ids, text = batch([9])[0], batch([4])[0]
    for objective in ("ae", "distill"):
        with pytest.raises(ValueError, match="give source_ids"):
            c(ids + VOCAB, text, objective=objective)
        a, b = (c(x, text, objective=objective, source_ids=ids).loss for x in (ids, ids + VOCAB))
        assert torch.isfinite(a) and a != b
    ae = c(ids + VOCAB, objective="ae", source_ids=ids)
    assert ae.logits.shape == (1, 9, VOCAB)


# ------------------------------------------------------------------ what is held out


def test_scores_are_of_what_the_run_held_out(place, capsys):
    """Seed and lengths of the split come from the run; other windows of its data are refused."""
    assert main(command(place, "condense", "a", "--seed", "1", "--heldout", "0.2", "--target", "5")) == 0
    words = ["--decoder", str(place / "decoder"), "--compressor", str(place / "a" / "best"), "--data"]
    own = [*words, str(place / "text.txt")]
    how = reading_of(parser().parse_args(own))
    assert how == Reading(context=16, target=5, seed=1, heldout=0.2)
    capsys.readouterr()
    assert score([*own, "--context", "12"]) == 2
    assert "was trained on in windows of 16 + 5" in capsys.readouterr().err
    (place / "other.txt").write_text((place / "text.txt").read_text()[::-1])
    assert (
        reading_of(parser().parse_args([*words, str(place / "other.txt"), "--context", "12"])).context == 12
    )
    (place / "a" / "config.json").unlink()
    assert reading_of(parser().parse_args(own)) == Reading()
    assert "may have been trained on" in capsys.readouterr().err


def test_both_ends_are_the_untrained_decoders(place, capsys):
    """A compressor that brings a trained base is scored against the base as it is loaded."""
    tuned = ["--tune", "full", "--learning_rate", "0.1"]
    assert main(command(place, "autocompressor", "a", *tuned)) == 0
    capsys.readouterr()
    words = ["--decoder", str(place / "decoder"), "--data", str(place / "text.txt")]
    assert score([*words, "--compressor", str(place / "a" / "last")]) == 0
    ours = json.loads(capsys.readouterr().out)
    assert score([*words, "--mode", "FA", "--context", "16", "--target", "6"]) == 0
    bare = json.loads(capsys.readouterr().out)
    assert ours["none"] == bare["none"] and ours["full"] == bare["full"] != ours["compressed"]
