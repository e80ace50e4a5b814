"""Pairs: formula, selection, interleaving against a loop, identity cases of both modes, the published
names."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.compress import wrap
from model.compress.pairs import (
    TokenCompressor,
    WindowAttentionScore,
    interleave_selected_pure_tensor,
    select_tokens,
    split_rows,
)
from model.compress.pairs_model import CompressedDecoderLayer, ModelWrapperPretrained, WindowedLossSFTTrainer
from model.ops import pairs as ops
from tests.compress.tiny import batch, tiny_decoder

MODES = ("kv", "stream")


def make(model, **options):
    torch.manual_seed(7)
    c = wrap(model, "pairs", **({"T_w": 3, "hidden_dim": 16, "r": 0.25} | options))
    with torch.no_grad():
        for p in c.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    return c


@given(
    T=st.integers(1, 40),
    T_w=st.integers(0, 45),
    r=st.floats(0, 1),
    M=st.integers(0, 50),
    seed=st.integers(0, 9),
)
def test_interleave_is_the_loop(T, T_w, r, M, seed):
    """3. Against a plain loop, for unsorted selections that differ by row; length by the formula, window
    exact."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(2, T, 4, generator=g)
    xc = TokenCompressor(4, 8)(x, T_w=T_w)
    P = T - xc.shape[1]
    scores = torch.rand(2, P, generator=g)
    chosen = select_tokens(x, scores, T_w, r, M)
    shuffled = chosen[:, torch.randperm(chosen.shape[1], generator=g)]
    out = interleave_selected_pure_tensor(x, xc, shuffled)
    for row in range(2):
        want = []
        for p in range(P):
            want += [x[row, 2 * p], x[row, 2 * p + 1]] if p in chosen[row].tolist() else [xc[row, p]]
        want += list(x[row, 2 * P :])
        assert torch.equal(out[row], torch.stack(want))
    n = chosen.shape[1]
    assert out.shape[1] == P + n + T - 2 * P
    if r == 1 or 2 * P <= M:
        assert torch.equal(out, x)
    assert (T if T_w >= T else T_w + (T - T_w) % 2) == T - 2 * P


@given(P=st.integers(0, 60), M=st.integers(0, 130), r=st.floats(0, 1), s=st.floats(0, 1))
def test_count_is_monotone_and_bounded(P, M, r, s):
    """2. n grows with r and with M, never exceeds P, and M = L gives every pair despite rounding."""
    one = torch.tensor([P])
    n = int(ops.selected_count(one, r, M)[0])
    low, high = sorted((r, s))
    assert 0 <= n <= P
    if M <= 2 * P:  # beyond, every pair comes back whatever r
        assert ops.selected_count(one, low, M)[0] <= ops.selected_count(one, high, M)[0]
    assert n <= ops.selected_count(one, r, M + 2)[0]
    assert int(ops.selected_count(one, r, 2 * P)[0]) == P


def test_example_of_the_description():
    x = torch.randn(2, 61, 512)
    compressor, attention = (
        TokenCompressor(dim=512, hidden_dim=64),
        WindowAttentionScore(dim=512, num_heads=8),
    )
    compressed = compressor(x, T_w=10)
    scores = attention.ImportanceScore(x, T_w=10)
    chosen = select_tokens(x, scores, T_w=10, r=0.7)
    out = interleave_selected_pure_tensor(x, compressed, chosen)
    assert compressed.shape == (2, 25 + 11, 512) and scores.shape == (2, 25)
    assert chosen.shape == (2, 17) and out.shape == (2, 25 + 17 + 11, 512)
    assert torch.allclose(scores.sum(1), torch.full((2,), 11.0), atol=1e-4)  # every query gives one in all
    out.sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in compressor.parameters())
    assert attention.ImportanceScore(x[:, :8], T_w=10).shape == (2, 0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("length", [2, 11, 12, 21, 22])
@pytest.mark.parametrize("how", [{"T_w": 50}, {"r": 1.0}, {"r": 0.3, "M": 50}])
def test_identity_cases(model, mode, length, how):
    """1. Short contexts, r = 1 and M >= memory give the full context's logits, odd or even."""
    c = make(model, mode=mode, **how)
    ids, _ = batch([length, length])
    text, _ = batch([5, 5], seed=2)
    whole = model(torch.cat([ids, text], 1)).logits[:, length:]
    assert torch.allclose(c.decode(c.compress(ids), text)[0], whole, atol=2e-5)
    if mode == "stream":
        wrapped = ModelWrapperPretrained(
            model, [0], how.get("T_w", 3), how.get("r", 0.5), how.get("M"), hidden_dim=8
        )
        assert torch.allclose(wrapped(ids).logits, model(ids).logits, atol=2e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("length", [1, 3, 4, 5, 12, 13])
def test_slot_counts(llama, mode, length):
    """8. Formula at and around its edges; budgets hold; what cannot be met names the limit."""
    c = make(llama, mode=mode, r=0.25)
    ids, _ = batch([length])
    window = length if length <= 3 else 3 + (length - 3) % 2
    P = (length - window) // 2
    want = P + int(0.25 * P) + window
    assert c.compress(ids).slot_counts.unique().tolist() == [want]
    if P:
        assert c.compress(ids, budget=P + window).slot_counts.unique().tolist() == [P + window]
        with pytest.raises(ValueError, match=f"at least {P + window} slots"):
            c.compress(ids, budget=P + window - 1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sinks", [1, 2, 9])
def test_sinks_come_back(llama, mode, sinks):
    """The first pairs are whole whatever their score, within the count that r gives where that is larger."""
    ids, _ = batch([13])  # a window of 3, five pairs
    plain, kept = make(llama, mode=mode, r=0.0), make(llama, mode=mode, r=0.0, sinks=sinks)
    n = min(sinks, 5)
    context, whole = kept.compress(ids), llama(ids, use_cache=True).past_key_values.layers[0]
    assert context.slot_counts.unique().tolist() == [5 + n + 3]
    assert plain.compress(ids).slot_counts.unique().tolist() == [8]
    assert torch.allclose(context.layers[0].keys[:, :, : 2 * n], whole.keys[:, :, : 2 * n], atol=1e-5)
    assert kept.slots_wanted(torch.tensor([13]), None, None).tolist() == [8 + n]
    with pytest.raises(ValueError, match=f"at least {8 + n} slots"):
        kept.compress(ids, budget=7 + n)
    most = make(llama, mode=mode, r=0.8, sinks=1)
    assert most.compress(ids).slot_counts.unique().tolist() == [5 + 4 + 3]


def test_layers_may_differ(model):
    """Only the chosen layer is shortened; generate masks each layer for its own slots."""
    c = make(model, layer_idx=(1,), r=0.0)
    ids, mask = batch([17, 10])
    context = c.compress(ids, mask)
    assert context.slot_counts.tolist() == [[17, 10], [10, 7]] and not context.uniform
    text, _ = batch([4, 4], seed=2)
    made = c.generate(text, context, max_new_tokens=4, do_sample=False, num_beams=2)
    one = c.generate(
        text[1:], context.select(torch.tensor([1])), max_new_tokens=4, do_sample=False, num_beams=2
    )
    assert torch.equal(made[1:], one)


def test_stream_at_two_layers(model):
    c = make(model, mode="stream", layer_idx=(0, 1), r=0.0)
    context = c.compress(batch([19])[0])
    assert context.slot_counts.flatten().tolist() == [11, 7]  # 19 = 16 + 3 -> 8 + 3 = 11 = 8 + 3 -> 4 + 3
    assert context.next_position.tolist() == [19]
    compact = make(model, mode="stream", layer_idx=(0, 1), r=0.0, positions="compact").compress(
        batch([19])[0]
    )
    assert compact.next_position.tolist() == [7]


def test_the_cache_really_is_smaller(llama):
    """13. Reported bytes are those of the tensors, and at r = 0 about half the full cache."""
    c = make(llama, r=0.0)
    report = c.memory_report(c.compress(batch([63])[0]))
    assert report["kv_bytes"] == 2 * 2 * 2 * 8 * 4 * (30 + 3)
    assert report["ratio"] == pytest.approx(63 / 33)


def test_gradient_reaches_only_the_merged(llama):
    """5. With every pair selected nothing reaches the MLP; straight-through adds the way through the
    scores."""
    ids, _ = batch([16])
    text, _ = batch([5], seed=2)
    for options, alive in (({"r": 1.0}, False), ({"r": 0.5}, True)):
        c = make(llama, **options).train()
        loss = c(ids, text).loss
        if loss.requires_grad:
            loss.backward()
        grads = [p.grad for p in c.parameters()]
        assert all((g is not None and bool(g.abs().sum() > 0)) == alive for g in grads)
    plain, learned = (make(llama, r=0.5, straight_through=s).train() for s in (False, True))
    losses = [c(ids, text).loss for c in (plain, learned)]
    assert torch.allclose(*losses)  # same values
    for loss in losses:
        loss.backward()
    assert not torch.allclose(
        plain.layers["0"].token_compressor.down.weight.grad,
        learned.layers["0"].token_compressor.down.weight.grad,
    )


def test_straight_through_learns_what_matters():
    """The gate is the hard selection in value, and pushes the score of a useful pair up."""
    scores = torch.tensor([[0.1, 0.4, 0.3, 0.2]], requires_grad=True)
    there = torch.ones(1, 4, dtype=torch.bool)
    selected = ops.select(scores, torch.tensor([2]), there)
    gate = ops.straight_through(scores, selected, there)
    assert gate.tolist() == [[0.0, 1.0, 1.0, 0.0]]
    gate[0, 3].backward()
    assert scores.grad[0, 3] > 0 and scores.grad[0, 0] == 0


def test_wrapper_scores_the_window(llama):
    """The loss is that of the last T_w tokens of every row, whatever the padding."""
    model = ModelWrapperPretrained(llama, [1], T_w=4, r=0.0, hidden_dim=8)
    ids, mask = batch([16, 13])
    left, left_mask = batch([16, 13], "left")
    right = model(ids, mask, labels=ids)
    assert torch.allclose(right.loss, model(left, left_mask, labels=left).loss, atol=1e-5)
    alone = [model(ids[i : i + 1, :n]).logits[0, -5:-1] for i, n in ((0, 16), (1, 13))]
    want = torch.nn.functional.cross_entropy(torch.cat(alone), torch.cat([ids[0, 12:], ids[1, 9:13]]))
    assert torch.allclose(right.loss, want, atol=1e-5)


def test_short_rows_are_scored_as_alone(llama):
    """A row no longer than the window has no token before its first: that one is scored in no batch."""
    model = ModelWrapperPretrained(llama, [1], T_w=8, r=0.0, hidden_dim=8)
    ids, mask = batch([16, 6, 8])
    model.requires_grad_(False)
    together = model(ids, mask, labels=ids).loss
    rows = [model(ids[i : i + 1, :n], labels=ids[i : i + 1, :n]).loss for i, n in enumerate((16, 6, 8))]
    assert together.item() == pytest.approx(float(8 * rows[0] + 5 * rows[1] + 7 * rows[2]) / 20, abs=1e-5)
    fewer = model(ids, mask, labels=ids, T_w=4).loss
    alone = [model(ids[i : i + 1, :n]).logits[0, -5:-1] for i, n in enumerate((16, 6, 8))]
    last = torch.cat([ids[i, n - 4 : n] for i, n in enumerate((16, 6, 8))])
    assert torch.allclose(fewer, torch.nn.functional.cross_entropy(torch.cat(alone), last), atol=1e-5)
    with pytest.raises(ValueError, match="T_w=9"):
        model(ids, mask, labels=ids, T_w=9)


def test_window_edits_leave_earlier_logits(llama):
    """7. With every pair merged whatever the scores, a later window token changes nothing before it."""
    model = ModelWrapperPretrained(llama, [0], T_w=6, r=0.0, hidden_dim=8)
    ids, _ = batch([16])
    other = ids.clone()
    other[0, 14] = 5
    a, b = model(ids).logits, model(other).logits
    assert torch.allclose(a[:, :-2], b[:, :-2], atol=1e-5) and not torch.allclose(
        a[:, -2:], b[:, -2:], atol=1e-3
    )


def test_trainer_of_the_description(capsys, tmp_path):
    model = ModelWrapperPretrained(
        original_model=tiny_decoder("qwen3"), layer_idx=[1], T_w=6, r=0.2, M=0, hidden_dim=16
    )
    before = {k: v.clone() for k, v in model.compressor.decoder.model.state_dict().items()}
    rows = [{"input_ids": (list(range(3, 13)) * 4)[i : i + 24]} for i in range(8)]
    trainer = WindowedLossSFTTrainer(
        model=model, tokenizer=None, train_dataset=rows, T_w=6, steps=12, accumulate=1
    )
    losses = trainer.train()
    assert losses[-1] < losses[0]
    assert "% of all" in capsys.readouterr().out
    assert all(torch.equal(before[k], v) for k, v in model.compressor.decoder.model.state_dict().items())
    model.save_pretrained(tmp_path)
    assert '"compressed_layer_indices"' in (tmp_path / "compression_config.json").read_text()
    made = model.generate(torch.tensor([rows[0]["input_ids"]]), max_new_tokens=3, do_sample=False)
    assert made.shape == (1, 27)
    with pytest.raises(ValueError, match="max_length"):
        WindowedLossSFTTrainer(model, None, [[3] * 600], T_w=6)


def test_wrapper_and_trainer_of_a_bf16_decoder():
    """The description's case: a decoder in half precision, pair MLPs in fp32, no autocast."""
    model = ModelWrapperPretrained(
        tiny_decoder("qwen3").bfloat16(), layer_idx=[1], T_w=6, r=0.2, hidden_dim=8
    )
    rows = [list(range(3, 23))] * 4
    losses = WindowedLossSFTTrainer(model, None, rows, T_w=6, steps=2, accumulate=1, batch_size=2).train()
    assert all(x == x for x in losses)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_trainer_puts_rows_where_the_decoder_is(llama):
    """Batches are made on the decoder's device; the stand-in for it has none but `meta`."""

    class Elsewhere(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(()))
            self.T_w, own = 4, SimpleNamespace(device=torch.device("meta"))
            self.compressor = SimpleNamespace(decoder=own, trainable_share=lambda: 1.0)

        def forward(self, ids, mask, labels, T_w):
            assert {t.device.type for t in (ids, mask, labels)} == {"meta"}
            return SimpleNamespace(loss=self.weight * 2)

    trainer = WindowedLossSFTTrainer(Elsewhere(), None, [[3, 4, 5]], T_w=4, steps=1, accumulate=1)
    assert trainer.train() == [2.0]


def test_layer_of_its_own(llama):
    """A compressed layer is the decoder's layer on the shortened stream."""
    c = make(llama, mode="stream", layer_idx=(0,), r=0.0)
    layer = CompressedDecoderLayer(c, 0)
    h, mask = torch.randn(2, 11, 32), torch.ones(2, 11, dtype=torch.bool)
    positions = torch.arange(11).expand(2, 11)
    out, kept, ids = layer(h, mask, positions, torch.zeros(2, dtype=torch.int64))
    assert out.shape == (2, 7, 32) and kept.all()
    assert ids.tolist()[0] == [0, 2, 4, 6, 8, 9, 10]


def test_attention_part_is_callable(llama):
    """CompressedAttention(decoder, layer, config)(h, mask, positions): by r and M where n is not given, and
    the same as its public parts in a row."""
    part = make(llama, mode="stream", layer_idx=(0,), r=0.5).layers["0"]
    h, mask = torch.randn(2, 11, 32), torch.ones(2, 11, dtype=torch.bool)
    out, kept, _ = part(h, mask, torch.arange(11).expand(2, 11))
    assert out.shape == (2, 4 + 2 + 3, 32) and kept.all()
    merged, selected, _ = part.choose(h, split_rows(mask, 3), torch.tensor([2, 2]))
    whole, chosen = torch.cat([merged, h[:, 8:]], 1), selected.nonzero()[:, 1].view(2, 2)
    assert torch.equal(out, interleave_selected_pure_tensor(h, whole, chosen))


def test_bad_settings(llama):
    for options, word in (
        ({"mode": "x"}, "kv and stream"),
        ({"r": 1.5}, "between 0 and 1"),
        ({"layer_idx": (7,)}, "0 to 1"),
        ({"sinks": -1}, "0 or more"),
    ):
        with pytest.raises(ValueError, match=word):
            make(llama, **options)
