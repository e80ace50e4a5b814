"""AutoCompressors of fixed and variable length: memory, positions, truncation, stopping, published layout."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.compress import wrap
from model.compress.autocompressor_model import (
    AutoCompressorModel,
    LlamaAutoCompressorModel,
    OPTAutoCompressorModel,
)
from model.compress.bptt import backward_document, segment_plan
from model.compress.segments import random_segments
from tests.compress.tiny import batch, rows_equal, tiny_decoder

FIXED = {"summary_length": 3, "lora_rank": 2, "segment_length": 8}
VARIABLE = {"compression_max_len": 3, "lora_rank": 2, "segment_length": 8}
KINDS = {"autocompressor": FIXED, "variable_autocompressor": VARIABLE}


def make(model, method="autocompressor", **options):
    torch.manual_seed(7)
    c = wrap(model, method, **(KINDS[method] | options))
    with torch.no_grad():
        for p in c.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    return c


@pytest.mark.parametrize(
    "method,off", [("autocompressor", "summary_length"), ("variable_autocompressor", "compression_max_len")]
)
def test_no_slots_is_the_base(model, method, off):
    """1. Nothing to summarise with, one segment, no memory: the decoder's own logits."""
    c = wrap(model, method, lora_rank=0, **{off: 0})
    ids, _ = batch([12, 12])
    assert torch.allclose(c.document(ids).logits, model(ids).logits, atol=1e-5)
    text, _ = batch([5, 5], seed=2)
    assert torch.allclose(c.decode(c.compress(ids), text)[0], model(text).logits, atol=1e-5)


@pytest.mark.parametrize("method", KINDS)
@pytest.mark.parametrize("soft", [False, True])
def test_segments_equal_chained_calls(model, method, soft):
    """2. segment_lengths is the same as passing softprompts by hand; only the boundary targets differ."""
    c = make(model, method).train(soft)
    ids, mask = batch([18, 13])
    whole = c.document(ids, mask, segment_lengths=(7, 5, 6), output_softprompt=True)
    logits, memory, at = [], None, 0
    for n in (7, 5, 6):
        part = c.document(
            ids[:, at : at + n], mask[:, at : at + n], softprompt=memory, output_softprompt=True
        )
        logits.append(part.logits)
        memory, at = part.softprompt, at + n
    assert torch.allclose(torch.cat(logits, 1), whole.logits, atol=1e-5)
    assert torch.equal(memory.embeds, whole.softprompt.embeds)


@pytest.mark.parametrize("accumulate", [True, False])
def test_memory_length(model, accumulate):
    """3. Accumulated: segments times kappa; replaced: kappa."""
    c = make(model, accumulate_summary=accumulate)
    for length in (1, 7, 8, 9, 16, 17):
        n = -(-length // 8)
        held = c.compress(batch([length])[0]).slot_counts
        assert held.tolist() == [3 * n if accumulate else 3]


def test_learned_positions_do_not_move_with_memory(model):
    """4. Decoders with learned positions count text from 0 whatever the memory; rotary ones after the
    slots."""
    c = make(model)
    following = c.compress(batch([20])[0]).next_position.tolist()
    assert following == ([9] if c.decoder.rotary else [0])


@pytest.mark.parametrize("reach", [1, 2])
@pytest.mark.parametrize("accumulate", [True, False])
def test_sliding_truncation_reaches_exactly_so_far(llama, reach, accumulate):
    """5. The loss of segment j has a gradient at the input of segment j - reach and none before it."""
    c = make(
        llama,
        accumulate_summary=accumulate,
        bptt="sliding",
        truncate_bptt_segments=reach,
        segments_per_substep=4,
    ).train()
    ids, _ = batch([24, 24])
    embed, seen = c.decoder.embed, []

    def tracked(x):
        seen.append(embed(x).detach().requires_grad_())
        return seen[-1]

    from model.compress.bptt import Document, sliding

    c.decoder.embed = tracked
    document = Document(c, ids, torch.ones_like(ids, dtype=torch.bool), [6] * 4, 1.0)
    document.targets = tuple(
        t if i == 3 else torch.full_like(t, -100) for i, t in enumerate(document.targets)
    )
    sliding(document, reach)
    reached = [x.grad is not None and bool(x.grad.abs().sum() > 0) for x in seen]
    assert reached == [j >= 3 - reach for j in range(4)]


def test_sliding_over_everything_is_plain_backpropagation(llama):
    """With a reach as long as the document, sliding gives the gradient of one backward pass."""
    ids, mask = batch([24, 19])
    grads = []
    for options in ({"bptt": "sliding", "truncate_bptt_segments": 9}, {"bptt": "grouped"}):
        c = make(
            llama, "variable_autocompressor", segments_per_substep=4, compression_lambda=0.3, **options
        ).train()
        totals = backward_document(c, ids, mask)
        grads.append(({k: p.grad for k, p in c.named_parameters()}, totals))
    for k, g in grads[0][0].items():
        assert torch.allclose(g, grads[1][0][k], atol=1e-5, rtol=1e-4), k
    assert grads[0][1] == pytest.approx(grads[1][1])


def test_grouped_stops_between_substeps(llama):
    """Two substeps of two segments: the total is that of four, and each group's gradient is its own."""
    ids, _ = batch([24, 24])
    c = make(llama, training_substeps=2).train()
    assert segment_plan(c, 24) == [6] * 4
    totals = backward_document(c, ids)
    whole = c.document(ids, segment_lengths=[6] * 4, labels=ids)
    assert totals["loss"] == pytest.approx(whole.loss.item(), abs=1e-5)
    plain = make(llama, segments_per_substep=4).train()
    backward_document(plain, ids)
    assert not torch.allclose(c.embed_summary.grad, plain.embed_summary.grad)


@pytest.mark.parametrize("method", KINDS)
def test_segment_checkpointing(llama, method):
    """11. Recomputing whole segments gives the same gradients."""
    ids, mask = batch([24, 19])
    grads = []
    for again in (False, True):
        c = make(llama, method, segment_gradient_checkpointing=again).train()
        backward_document(c, ids, mask)
        grads.append({k: p.grad for k, p in c.named_parameters()})
    for k, g in grads[0].items():
        assert torch.allclose(g, grads[1][k], atol=1e-6), k


# ------------------------------------------------------------------ variable length


def stopping(model, logit, **options):
    """A variable compressor whose <eoc> log odds are `logit` at every step."""
    c = make(model, "variable_autocompressor", **options)
    c.stop_logit = lambda z: torch.full(z.shape[:1], float(logit))
    return c


def test_survival_and_its_limits(model):
    """6. p = 0: all slots, soft memory equals hard; p = 1: one slot; then soft and hard read alike."""
    ids, _ = batch([8, 8])
    text, _ = batch([5, 5], seed=2)
    for logit, slots in ((-80, 3), (80, 1)):
        c = stopping(model, logit)
        hard = c.compress(ids)
        assert hard.slot_counts.tolist() == [slots, slots]
        soft = c.train().compress(ids)
        assert float(soft.aux.stats["expected_length"]) == pytest.approx(slots)
        c.eval()
        assert torch.allclose(c.decode(soft, text)[0], c.decode(hard, text)[0], atol=1e-4)
        bias = soft.slot_bias
        assert (bias.diff(dim=1) <= 0).all()  # survival never grows


def last_states(c, ids, tail):
    """What a fixed AutoCompressor of the same decoder makes of the summary embeddings `tail` [n, E]."""
    fixed = wrap(c.decoder, "autocompressor", summary_length=len(tail), lora_rank=0)
    fixed.embed_summary.data.copy_(tail)
    return fixed.compress(ids).embeds[0].detach()


def test_gated_steps_begin_as_summary_embeddings(model):
    """With g = 0 the slots are the fixed AutoCompressor's for <sum> and the steps; g has a gradient."""
    c = stopping(model, -80, lora_rank=0)
    c.feedback_gain.data.zero_()
    ids, _ = batch([8])
    want = last_states(c, ids, torch.cat([c.embed_sum, c.embed_step]).detach())
    assert torch.allclose(c.compress(ids).embeds[0], want[1:], atol=2e-5)
    c.train()(ids, batch([5], seed=2)[0]).loss.backward()
    assert c.feedback_gain.grad.abs() > 0
    c.feedback_gain.data.fill_(0.5)
    assert not torch.allclose(c.eval().compress(ids).embeds[0], want[1:], atol=1e-3)


def test_state_feedback_is_the_published_recurrence(model):
    """z_t is the state after feeding z_{t-1} itself."""
    c = stopping(model, -80, lora_rank=0, feedback="state")
    assert not hasattr(c, "feedback_gain")
    ids, _ = batch([8])
    tail = c.embed_sum.detach()
    for _ in range(3):
        tail = torch.cat([tail, last_states(c, ids, tail)[-1:]])
    assert torch.allclose(c.compress(ids).embeds[0], last_states(c, ids, tail)[1:], atol=2e-4)


def test_mean_of_sampled_lengths_is_the_expected_length(llama):
    """6. Independent draws: the hard length's mean is the E[length] that training uses."""
    c = stopping(llama, -0.5, compression_max_len=5)
    c.sampler = torch.Generator().manual_seed(0)
    ids = batch([6])[0].expand(400, 6)
    lengths = c.compress(ids).slot_counts.float()
    expected = float(c.train().compress(ids[:1]).aux.stats["expected_length"])
    assert lengths.mean() == pytest.approx(expected, abs=4 * float(lengths.std()) / 400**0.5)
    assert lengths.min() == 1 and lengths.max() == 5


def test_threshold_stops_each_row_for_itself(llama):
    """8. Rows of a batch stop at different times, as they would alone, and a stopped row's slots are
    unseen."""
    c = make(llama, "variable_autocompressor", compression_max_len=6, compress_stop_threshold=0.6)
    table = torch.randn(32, generator=torch.Generator().manual_seed(2)) * 3
    c.stop_logit = lambda z: z @ table
    ids, mask = batch([8] * 12)
    together = c.compress(ids, mask)
    assert len(set(together.slot_counts.tolist())) > 1
    text, _ = batch([4] * 12, seed=5)
    logits = c.decode(together, text)[0]
    for row in range(12):
        alone = c.compress(ids[row : row + 1])
        assert int(alone.slot_counts[0]) == int(together.slot_counts[row])
        assert torch.allclose(c.decode(alone, text[row : row + 1])[0], logits[row : row + 1], atol=1e-5)


def test_penalty_shortens_memory(llama):
    """7. The penalty's gradient reaches <eoc>, and a larger one leaves a shorter expected memory after
    training."""
    ids, mask = batch([16, 16])
    lengths = []
    for weight in (0.0, 0.3, 40.0):
        c = wrap(
            llama, "variable_autocompressor", compression_max_len=4, lora_rank=0, compression_lambda=weight
        )
        optimizer = torch.optim.Adam(c.train().parameters(), 0.02)
        for _ in range(15):
            optimizer.zero_grad()
            totals = backward_document(c, ids, mask)
            assert c.embed_eoc.grad.abs().sum() > 0
            optimizer.step()
        lengths.append(totals["expected_length"])
    assert lengths[0] > lengths[1] + 0.05 and lengths[1] > lengths[2] + 0.05, lengths


def test_control_tokens_stay_out_of_the_vocabulary(model):
    """9. The decoder keeps its vocabulary: neither <sum> nor <eoc> has a token that could be generated."""
    before = model.get_input_embeddings().weight.shape
    c = make(model, "variable_autocompressor")
    assert model.get_input_embeddings().weight.shape == before
    ids, _ = batch([12])
    assert c.document(ids, segment_lengths=(6, 6)).logits.shape == (1, 12, before[0])  # no text token is lost


# ------------------------------------------------------------------ the model of the published code


def test_model_interface(llama):
    model = LlamaAutoCompressorModel(make(llama)).eval()
    ids, mask = batch([16, 16])
    out = model(ids[:, :8], mask[:, :8], output_softprompt=True)
    by_hand = model(ids[:, 8:], softprompt=out.softprompt).logits
    assert torch.allclose(by_hand, model(ids, segment_lengths=[8, 8]).logits[:, 8:], atol=1e-5)
    assert torch.allclose(by_hand, model(ids[:, 8:], softprompt=out.softprompt.embeds).logits, atol=1e-6)
    a = model.generate(ids[:, 8:], softprompt=out.softprompt, max_new_tokens=5, do_sample=False)
    b = model.generate(ids, segment_lengths=[8, 8], max_new_tokens=5, do_sample=False)
    assert torch.equal(a, b) and a.shape == (2, 13)
    with pytest.raises(ValueError, match="add up"):
        model(ids, segment_lengths=[8, 9])
    for lengths in ([5], [8, 5], [8, 9]):  # nothing of a prompt is dropped
        with pytest.raises(ValueError, match="add up to the 16 columns"):
            model.generate(ids, segment_lengths=lengths, max_new_tokens=2)
    with pytest.raises(ValueError, match="type opt"):
        OPTAutoCompressorModel(make(llama))


@pytest.mark.parametrize("family,cls", [("llama", LlamaAutoCompressorModel), ("opt", OPTAutoCompressorModel)])
def test_published_layout(tmp_path, monkeypatch, family, cls):
    """A synthetic checkpoint in the layout of princeton-nlp's: the decoder's file with embed_summary
    beside."""
    base = tiny_decoder(family)
    base.config.summary_length, base.config.accumulate_summary = 3, False
    kappa = torch.randn(3, base.get_input_embeddings().embedding_dim)
    base.config.save_pretrained(tmp_path)
    torch.save({**base.state_dict(), "embed_summary.weight": kappa}, tmp_path / "pytorch_model.bin")
    model = cls.from_pretrained(tmp_path)
    assert torch.equal(model.compressor.embed_summary, kappa)
    assert not model.compressor.config.accumulate_summary
    ids, _ = batch([12, 12])
    assert torch.allclose(model(ids).logits, base(ids).logits, atol=1e-5)
    memory = model(ids, output_softprompt=True).softprompt
    model.save_pretrained(tmp_path / "again")
    again = AutoCompressorModel.from_pretrained(tmp_path / "again", base)
    assert torch.equal(again(ids, output_softprompt=True).softprompt.embeds, memory.embeds)
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name: asked.append(name) or str(tmp_path))
    hub = cls.from_pretrained("princeton-nlp/AutoCompressor-2.7b-6k")
    assert asked == ["princeton-nlp/AutoCompressor-2.7b-6k"]
    assert torch.equal(hub.compressor.embed_summary, kappa)


def test_full_tuning_moves_the_base_and_is_saved(tmp_path):
    c = make(tiny_decoder("gpt2"), tune="full").train()
    ids, _ = batch([16, 16])
    backward_document(c, ids)
    assert all(p.grad is not None for p in c.decoder.model.parameters())
    torch.optim.SGD(c.parameters(), 0.1).step()
    c.eval().save(tmp_path)
    from model.compress import load_compressor

    again = load_compressor(tmp_path, tiny_decoder("gpt2"))
    want = c.document(ids, segment_lengths=(8, 8)).logits
    # `make` has shifted the base before training, so what is loaded is base file plus saved tensors
    assert torch.equal(again.document(ids, segment_lengths=(8, 8)).logits, want)


@given(total=st.integers(4, 300), n=st.integers(1, 8), longest=st.integers(2, 300), seed=st.integers(0, 99))
def test_random_segments(total, n, longest, seed):
    """12. They add up, and every length lies in [2, longest]."""
    generator = torch.Generator().manual_seed(seed)
    if n * 2 > total or n * longest < total:
        with pytest.raises(ValueError):
            random_segments(total, n, longest, generator)
        return
    lengths = random_segments(total, n, longest, generator)
    assert sum(lengths) == total and len(lengths) == n
    assert all(2 <= x <= longest for x in lengths)


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("method", KINDS)
def test_random_segments_leave_room(family, replace, method):
    """Every draw can be read, memory and summaries included; one token more could not."""
    memory = (
        {"accumulate_summary": not replace} if method == "autocompressor" else {"recompress_memory": replace}
    )
    c = make(tiny_decoder(family), method, randomize_substeps=True, segments_per_substep=4, **memory).train()
    ids, longest = batch([220])[0], c.longest_segment(4)
    for seed in range(20):
        plan = segment_plan(c, 200, torch.Generator().manual_seed(seed))
        assert max(plan) <= longest and sum(plan) == 200
    read = lambda *plan: c.document(ids[:, : sum(plan)], segment_lengths=plan).logits  # noqa: E731
    with torch.no_grad():
        assert torch.isfinite(read(10, 10, longest, longest)).all()
        with pytest.raises(ValueError, match="has 96"):
            read(10, 10, longest + 1, 10), read(10, 10, 10, longest + 1)


def test_given_lengths_yield_to_a_budget_and_hold_row_by_row(llama):
    """segment_lengths cut the rows that have so many tokens, unless a budget asks for another number."""
    c = make(llama, segment_lengths=(4, 12))
    ids, mask = batch([16, 11])
    assert c.compress(ids, mask, budget=3).slot_counts.tolist() == [3, 3]
    both = c.compress(ids, mask)
    for row, n in enumerate((16, 11)):
        assert rows_equal(both, c.compress(ids[row : row + 1, :n]), row) < 2e-5
    by_hand = c.document(ids[:1], segment_lengths=(4, 12), output_softprompt=True).softprompt
    assert torch.allclose(both.embeds[:1], by_hand.embeds, atol=2e-5)
    assert not torch.allclose(make(llama).compress(ids[:1]).embeds, by_hand.embeds, atol=1e-2)


def test_limits_are_named(llama):
    with pytest.raises(ValueError, match="gated and state"):
        make(llama, "variable_autocompressor", feedback="loop")
    c = make(llama)
    with pytest.raises(ValueError, match="one segment makes 3"):
        c.compress(batch([10])[0], budget=2)
    with pytest.raises(ValueError, match="96"):
        make(llama, segment_length=200).compress(batch([95])[0])
    assert c.compress(batch([60])[0], ratio=4).slot_counts.tolist() == [15]
