"""Clusters: causal assignment, thresholds, residual storage, identity cases of both modes, what is
trained."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.compress import CompressedContext, load_compressor, wrap
from model.compress import clustering as ops
from model.compress.cluster_layer import ClusterLayer, ClustersConfig
from tests.compress.tiny import batch, tiny_decoder

MODES = ("length", "quality")
TRAINED = dict(similarity_threshold=-1.0, use_residuals=True, adaptive_threshold=True, contrastive_margin=1.9)


def make(model, **options):
    torch.manual_seed(7)
    c = wrap(model, "clusters", **options)
    with torch.no_grad():
        for p in c.parameters():
            p.add_(0.05 * torch.randn(p.shape))
    return c


@given(T=st.integers(1, 14), seed=st.integers(0, 20), tau=st.floats(-1, 1), share=st.floats(0, 1))
def test_assignment_is_the_loop(T, seed, tau, share):
    """Greedy, left to right, against plain Python; every representative comes before its members."""
    g = torch.Generator().manual_seed(seed)
    s = torch.rand(2, T, T, generator=g) * 2 - 1
    protect = torch.rand(2, T, generator=g) < share
    mask = torch.arange(T) < torch.tensor([[T], [max(1, T - 3)]])
    member, _ = ops.assign(s, torch.full((2, T), tau), protect, mask)
    for row in range(2):
        heads, want = [], []
        for j in range(T):
            best = max(heads, key=lambda i: float(s[row, j, i]), default=None)
            if not mask[row, j]:
                want.append(j)
            elif best is not None and not protect[row, j] and float(s[row, j, best]) > torch.tensor(tau):
                want.append(best)
            else:
                want.append(j)
                heads.append(j)
        assert member[row].tolist() == want
        assert (member[row] <= torch.arange(T)).all()


@given(T=st.integers(2, 12), seed=st.integers(0, 20))
def test_prefix_statistics(T, seed):
    """Thresholds and cuts at token j use tokens up to j alone, and equal the plain formula."""
    g = torch.Generator().manual_seed(seed)
    h = torch.randn(1, T, 5, generator=g)
    mask = torch.ones(1, T, dtype=torch.bool)
    s = ops.similarity(h, None, 0.0, None)
    q = ops.prefix_quantile(s, mask, 0.95)
    tops = [float(s[0, j, :j].max()) for j in range(1, T)]
    for j in range(1, T):
        assert float(q[0, j]) == pytest.approx(float(torch.tensor(tops[:j]).quantile(0.95)), abs=1e-5)
    x = torch.rand(1, T, generator=g)
    cut = ops.prefix_cut(x, mask)
    assert float(cut[0, -1]) == pytest.approx(float(x[:, :-1].mean() + x[:, :-1].std(correction=0)), abs=1e-5)
    other = h.clone()
    other[0, -1] += 1
    again = ops.prefix_quantile(ops.similarity(other, None, 0.0, None), mask, 0.95)
    assert torch.allclose(q[:, :-1], again[:, :-1])


@pytest.mark.parametrize("mode", MODES)
def test_threshold_out_of_reach_is_the_base(model, mode):
    """1. Nothing is ever similar enough: the full context's logits."""
    c = make(model, mode=mode, similarity_threshold=2.0, use_residuals=True, adaptive_threshold=True)
    ids, _ = batch([14, 14])
    text, _ = batch([5, 5], seed=2)
    whole = model(torch.cat([ids, text], 1)).logits[:, 14:]
    assert torch.allclose(c.decode(c.compress(ids), text)[0], whole, atol=2e-5)


def test_full_residual_rebuilds_exactly(model):
    """3. g = 1, R the identity, nothing quantised: exact whatever the threshold."""
    exact = {"use_residuals": True, "residual": "identity", "gated": False, "residual_bits": 0}
    c = make(model, mode="quality", similarity_threshold=-1.0, importance=False, **exact)
    ids, _ = batch([14, 14])
    assert torch.allclose(c.through(ids).logits, model(ids).logits, atol=2e-5)
    assert float(c.through(ids).stats["ratio"]) > 1


def test_identical_tokens_are_one_cluster():
    """2. And their residual is nothing at all."""
    layer = ClusterLayer(8, ClustersConfig(similarity_threshold=0.9, importance=False, contrastive_weight=0))
    h = torch.randn(1, 1, 8).expand(2, 6, 8)
    made = layer(h, torch.ones(2, 6, dtype=torch.bool), None)
    assert made.shown.sum(1).tolist() == [1, 1]
    assert torch.allclose(made.rebuilt, h) and torch.allclose(made.centred[:, 0], h[:, 0], atol=1e-6)


def test_count_is_monotone_in_the_threshold(llama):
    """4. A higher threshold never leaves fewer clusters here, and 1 <= ratio <= T."""
    ids, _ = batch([20] * 4)
    counts = []
    for tau in (-1.0, 0.0, 0.2, 0.4, 0.6, 0.9, 2.0):
        c = make(llama, similarity_threshold=tau, importance=False, contrastive_weight=0.0)
        counts.append(c.compress(ids).slot_counts[-1].tolist())
    assert counts[0] == [1] * 4 and counts[-1] == [20] * 4
    assert all(a <= b for low, high in pairwise(counts) for a, b in zip(low, high))


def test_edits_change_nothing_earlier(model):
    """5. In quality mode a token's edit leaves all earlier logits alone."""
    c = make(model, mode="quality", **TRAINED)
    ids, _ = batch([14, 14])
    other = ids.clone()
    other[:, 9] = 4
    a, b = c.through(ids).logits, c.through(other).logits
    assert torch.allclose(a[:, :9], b[:, :9], atol=1e-5) and not torch.allclose(a[:, 9:], b[:, 9:], atol=1e-3)


def test_training_through_the_text(model):
    """6, 10. Every enabled module gets a gradient, the base none."""
    c = make(model, mode="quality", **TRAINED).train()
    ids, mask = batch([14, 10])
    out = c.through(ids, mask, labels=ids)
    assert {"lm", "contrastive", "reconstruction"} == set(out.losses)
    out.loss.backward()
    assert not [k for k, p in c.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert all(p.grad is None for p in model.parameters())


def test_base_trains_when_it_is_not_frozen():
    c = make(tiny_decoder("gpt2"), freeze_base=False, **TRAINED).train()
    ids, _ = batch([14, 14])
    c(ids, batch([5, 5], seed=2)[0]).loss.backward()
    assert c.decoder.model.transformer.h[0].mlp.c_fc.weight.grad.abs().sum() > 0


def test_quality_hooks_equal_our_own_run(model):
    """Attached, the decoder's own forward gives the same logits, with padding on either side; cached steps
    pass."""
    c = make(model, mode="quality", **TRAINED)
    for side in ("right", "left"):
        ids, mask = batch([14, 10], side)
        want = c.through(ids, mask).logits
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        with c.attached() as attached:
            got = attached(ids, attention_mask=mask, position_ids=positions).logits
        for row, n in enumerate((14, 10)):
            assert torch.allclose(got[row][mask[row].bool()], want[row, :n], atol=2e-5)
    with c.attached() as attached:
        made = attached.generate(ids[:1], attention_mask=mask[:1], max_new_tokens=3, do_sample=False)
    assert made.shape == (1, 17)


@pytest.mark.parametrize("needs", [{"protect_ids": 20}, {"attention_weight": 0.3}], ids=str)
def test_hooks_refuse_what_they_cannot_see(llama, needs):
    """Neither ids nor attention reach a layer's hook: an error, not other clusters."""
    c = make(llama, mode="quality", **{**TRAINED, **needs})
    ids, prompt = batch([14])[0], batch([4], seed=2)[0]
    with c.attached() as attached, pytest.raises(ValueError, match=next(iter(needs))):
        attached(ids)
    context = c.compress(ids)  # a compressed context is read as ever
    with c.attached() as attached:
        made = attached.generate(**c.generate_inputs(context, prompt), max_new_tokens=2, do_sample=False)
    assert torch.equal(made, c.generate(prompt, context, max_new_tokens=2, do_sample=False))


def test_quality_of_a_bf16_decoder():
    """The code keeps heads as the decoder has them, and what is rebuilt is in its dtype."""
    c = make(tiny_decoder("llama").bfloat16(), mode="quality", **TRAINED)
    ids, text = batch([14])[0], batch([5], seed=2)[0]
    context = c.compress(ids)
    assert context.extras["0.0.heads"].dtype == torch.bfloat16
    assert c.lower(context)[1].keys.dtype == torch.bfloat16
    soft = c.train().compress(ids)
    assert torch.allclose(c.eval().decode(context, text)[0], c.decode(soft, text)[0], atol=0.5)
    c.train().through(ids, labels=ids).loss.backward()


def test_contrastive_loss():
    """7. Nothing for one cluster, nothing for orthogonal ones, something for two that are close."""
    mask = torch.ones(1, 4, dtype=torch.bool)
    z = torch.eye(4)[None]
    assert ops.contrastive(z, torch.zeros(1, 4, dtype=torch.int64), mask, 0.2) == 0
    assert ops.contrastive(z, torch.arange(4)[None], mask, 0.2) == 0
    assert ops.contrastive(
        z[:, :1].expand(1, 4, 4), torch.tensor([[0, 0, 2, 2]]), mask, 0.2
    ) == pytest.approx(0.2)


@given(seed=st.integers(0, 30), C=st.integers(1, 24), sparsity=st.floats(0, 0.95))
def test_stored_residuals(seed, C, sparsity):
    """8. Error of what is kept at most half a step; 16. further levels never make it worse; 13. exact
    size."""
    z = torch.randn(2, 3, C, generator=torch.Generator().manual_seed(seed))
    code = ops.encode(z, sparsity)
    k = max(1, round(C * (1 - sparsity)))
    assert code["values"].shape == code["indices"].shape == (2, 3, 1, k)
    assert code["values"].dtype == torch.uint8 and code["indices"].dtype == torch.int16
    back = ops.decode(code, C)
    assert ((back - z).abs() * (back != 0)).amax(-1).le(code["scale"][..., 0] / 2 + 1e-6).all()
    errors = [(ops.stored(z, sparsity, 8, levels) - z).norm(dim=-1) for levels in (1, 2, 3)]
    assert (errors[1] <= errors[0] + 1e-6).all() and (errors[2] <= errors[1] + 1e-6).all()
    assert torch.equal(ops.stored(z, sparsity, 0), z)
    x = z.clone().requires_grad_()
    ops.stored(x, sparsity, 8).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.parametrize("bits", [-1, 9, 16])
def test_codes_are_at_most_a_byte(llama, bits):
    with pytest.raises(ValueError, match=f"residual_bits {bits}"):
        ops.encode(torch.randn(1, 2, 8), 0.5, bits)
    with pytest.raises(ValueError, match=f"residual_bits={bits}"):
        make(llama, use_residuals=True, residual_bits=bits)


CODED = [
    {},
    {"residual_levels": 3, "residual_sparsity": 0.3},
    {"residual": "identity", "residual_bits": 4},
    {"residual_bits": 0},
    {"use_residuals": False},
]


@pytest.mark.parametrize("options", CODED, ids=str)
def test_the_stored_code_is_what_later_layers_read(options):
    """Quality mode keeps the code of the stream and no cache behind it; read is the rebuilt stream."""
    model = tiny_decoder("llama", num_hidden_layers=4)
    c = make(model, mode="quality", layer_idx=(1, 2), **{**TRAINED, **options})
    ids, mask = batch([20, 13])
    context, text = c.compress(ids, mask), batch([5, 5], seed=2)[0]
    assert [x.keys.shape[2] for x in context.layers] == [20, 20, 0, 0]
    names = {"0.1.heads", "0.1.member", "0.2.heads", "0.2.member"}
    kept = {"exact"} if options.get("residual_bits") == 0 else {"values", "indices", "scale", "low"}
    if options.get("use_residuals", True):
        names |= {f"0.{i}.{k}" for i in (1, 2) for k in kept}
    assert set(context.extras) == names
    for row, n in enumerate((20, 13)):  # in one go, every text token reads the same rebuilt states
        whole = c.run(ids[row : row + 1, :n], mask[row : row + 1, :n].bool())[1]
        for i, layer in enumerate(c.lower(context)):
            assert torch.allclose(layer.keys[row, :, :n], whole[i].keys[0], atol=1e-4)
    trained = c.train().compress(ids, mask)
    assert not trained.extras and trained.layers[3].keys.shape[2] == 20
    c.eval()
    assert torch.allclose(c.decode(context, text)[0], c.decode(trained, text)[0], atol=1e-4)


def test_every_stored_bit_is_counted(tmp_path, llama):
    """13. The bytes of a coded context are the caches up to the layer, and every tensor of the code."""
    c = make(llama, mode="quality", use_residuals=True, similarity_threshold=0.0, importance=False)
    ids, _ = batch([40])
    context, other = c.compress(ids), wrap(c.decoder, "full").compress(ids)
    heads = context.extras["0.0.heads"].shape[1]
    assert 1 < heads < 40
    code = heads * 32 * 4 + 40 * 4 + (40 - heads) * (1 + 2 + 4 + 4)  # a tenth of 8 code channels: one
    cache, small = 2 * 2 * 40 * 8 * 4, 2 * 8 + 40  # keys and values of layer 0; two lengths and a mask
    assert context.bytes() == code + cache + small
    assert c.memory_report(context)["kv_bytes"] == c.memory_report(other)["kv_bytes"]  # while decoding
    context.save(tmp_path / "x.safetensors")
    again, text = CompressedContext.load(tmp_path / "x.safetensors"), batch([5], seed=2)[0]
    assert torch.equal(c.decode(again, text)[0], c.decode(context, text)[0])
    doubled = context.repeat(2).select(torch.tensor([1]))
    assert torch.allclose(c.decode(doubled, text)[0], c.decode(context, text)[0], atol=1e-6)
    with pytest.raises(ValueError, match="its own method clusters reads"):
        wrap(c.decoder, "full").decode(context, text)


def test_codes_are_continued(llama):
    """A later piece is run behind the cache that the earlier pieces' codes stand for, on ragged rows too."""
    c = make(llama, mode="quality", **TRAINED)
    ids, mask = batch([20, 13])
    first = c.compress(ids[:, :12], mask[:, :12])
    both = c.compress(ids[:, 12:], mask[:, 12:], state=first)
    text = batch([5, 5], seed=2)[0]
    logits = c.decode(both, text)[0]
    soft = c.train().compress(ids[:, 12:], mask[:, 12:], state=c.compress(ids[:, :12], mask[:, :12]))
    mixed = c.compress(ids[:, 12:], mask[:, 12:], state=first)  # trained on behind a stored state
    assert not mixed.extras
    for other in (soft, mixed):
        assert torch.allclose(logits, c.eval().decode(other, text)[0], atol=1e-4)
    made = c.generate(text, both, max_new_tokens=2, do_sample=False)
    assert torch.equal(made[:, 5], logits[:, -1].argmax(-1))


@pytest.mark.parametrize("budget", [1, 3, 8, 20])
def test_budget_is_kept(llama, budget):
    c = make(llama, importance=False, contrastive_weight=0.0)
    ids, mask = batch([20, 9])
    counts = c.compress(ids, mask, budget=budget).slot_counts[-1]
    assert (counts <= budget).all() and (counts >= 1).all()


def test_limits_are_named(llama):
    ids, _ = batch([20])
    with pytest.raises(ValueError, match="cannot join"):
        make(llama, importance=False, protect_ids=1000).compress(ids, budget=5)
    with pytest.raises(ValueError, match="mode length"):
        make(llama, mode="quality").compress(ids, budget=5)
    with pytest.raises(ValueError, match="after 0 to 0"):
        make(llama, layer_idx=(1,))


def test_levels_shorten_further(llama):
    """Recursion over levels: every token ends at a representative of the last level, and there are no more
    of them."""
    ids, _ = batch([24])
    counts = [
        int(
            make(llama, similarity_threshold=0.5, importance=False, levels=n, level_step=0.3)
            .compress(ids)
            .slot_counts[-1]
        )
        for n in (1, 2, 3)
    ]
    assert counts[0] > counts[1] >= counts[2] >= 1


def test_several_layers_and_attention_term():
    model = tiny_decoder("llama", num_hidden_layers=4)
    c = make(model, compression_layers=2, similarity_threshold=0.2, attention_weight=0.3, position_reach=20.0)
    assert c.config.layer_idx == (1, 2)
    ids, mask = batch([20, 12])
    counts = c.compress(ids, mask).slot_counts
    assert (
        counts[0].tolist() == [20, 12] and (counts[2] <= counts[1]).all() and (counts[3] <= counts[2]).all()
    )


def test_post_hoc_needs_no_training(llama):
    """Without residuals, importance, adaptivity and contrast there is no parameter, and the cache still
    shrinks."""
    c = make(llama, importance=False, contrastive_weight=0.0, similarity_threshold=0.1)
    assert not list(c.parameters())
    ids, _ = batch([30])
    report = c.memory_report(c.compress(ids))
    assert report["kv_bytes"] < report["full_kv_bytes"]


def test_parachute_is_saved(tmp_path, llama):
    """11. Thresholds that validation moved come back with the compressor."""
    c = make(llama, **{**TRAINED, "similarity_threshold": 0.85})
    assert c.parachute(1.0) == pytest.approx(0.85)
    assert c.parachute(2.0) == pytest.approx(0.9) and c.parachute(2.0) == pytest.approx(0.95)
    assert c.parachute(9.0) == pytest.approx(0.95) and c.parachute(0.5) == pytest.approx(0.94)
    c.save(tmp_path)
    again = load_compressor(tmp_path, llama)
    assert float(again.layers["0"].tau) == pytest.approx(0.94)
    ids, _ = batch([14])
    assert torch.equal(again.compress(ids).layers[1].keys, c.compress(ids).layers[1].keys)
