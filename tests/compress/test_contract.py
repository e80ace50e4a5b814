"""What every method must keep, on every decoder family: the shared invariants of the interface."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.compress import CompressedContext, load_compressor, method_names, wrap
from tests.compress.tiny import FAMILIES, VOCAB, batch, rows_equal, tiny_decoder

# Settings that make a method small; a method that is not named runs on its defaults.
SETTINGS: dict[str, dict] = {
    "condense": {"num_condense_tokens": 6, "lora_rank": 2, "lora_alpha": 4},
    "autocompressor": {"summary_length": 3, "lora_rank": 2, "segment_length": 8},
    "variable_autocompressor": {"compression_max_len": 3, "lora_rank": 2, "segment_length": 8},
    "pairs": {"T_w": 3, "r": 0.25, "hidden_dim": 16},
    "clusters": {
        "similarity_threshold": -1.0,
        "use_residuals": True,
        "adaptive_threshold": True,
        "contrastive_margin": 1.9,
    },
    "oracle": {"steps": 3},
    "snapkv": {"window": 4, "kernel": 3},
    "sink_window": {"sinks": 2},
}
# How each method is asked for its context where the shared tests need one.
ASK: dict[str, dict] = {
    "full": {}, "none": {}, "pairs": {}, "clusters": {}, "autocompressor": {}, "variable_autocompressor": {},
}  # fmt: skip
METHODS = method_names()


def make(model, method, **options):
    torch.manual_seed(7)
    made = wrap(model, method, **(SETTINGS.get(method, {}) | options))
    for p in made.parameters():  # away from zero-initialised identities
        with torch.no_grad():
            p.add_(0.05 * torch.randn(p.shape))
    return made


def asked(method):
    return ASK.get(method, {"budget": 5})


def frozen_bytes(model):
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


@pytest.mark.parametrize("method", METHODS)
def test_embeds_equal_cache_equal_generate(model, method):
    """4. One forward over the carrier, the lowered cache, and greedy `generate` agree; 12. in any order,
    twice."""
    c = make(model, method)
    ids, mask = batch([17, 11])
    prompt, prompt_mask = batch([4, 2], "left", seed=2)
    context = c.compress(ids, mask, **asked(method))
    lowered = CompressedContext(
        context.method, context.fingerprint, context.source_length, context.next_position,
        layers=c.lower(context),
    )  # fmt: skip
    a, _ = c.decode(context, prompt, prompt_mask)
    b, _ = c.decode(lowered, prompt, prompt_mask)
    assert torch.allclose(a[prompt_mask.bool()], b[prompt_mask.bool()], atol=2e-5)

    made = c.generate(prompt, context, prompt_mask, max_new_tokens=4, do_sample=False)
    assert torch.equal(made, c.generate(prompt, context, prompt_mask, max_new_tokens=4, do_sample=False))
    step, step_mask = prompt, prompt_mask
    for _ in range(4):  # uncached greedy decoding through our own runner
        logits, _ = c.decode(context, step, step_mask)
        step = torch.cat([step, logits[:, -1:].argmax(-1)], 1)
        step_mask = torch.cat([step_mask, torch.ones_like(step_mask[:, :1])], 1)
    assert torch.equal(made, step)


@pytest.mark.parametrize("method", METHODS)
def test_padding_and_batching(model, method):
    """5. Left, right and no padding agree; a batch equals its rows; what pads hold is irrelevant."""
    c = make(model, method)
    lengths = [13, 9, 1]
    right, right_mask = batch(lengths)
    left, left_mask = batch(lengths, "left", width=16)
    left = left.masked_fill(left_mask == 0, 5)
    one = c.compress(right, right_mask, **asked(method))
    two = c.compress(left, left_mask, **asked(method))
    for row, n in enumerate(lengths):
        alone = c.compress(right[row : row + 1, :n], **asked(method))
        assert rows_equal(one, alone, row) < 2e-5
        assert rows_equal(two, alone, row) < 2e-5
        assert int(one.next_position[row]) == int(alone.next_position[0]) == int(two.next_position[row])


@pytest.mark.parametrize("method", METHODS)
def test_training_touches_only_its_own(model, method):
    """1. Base bytes unchanged, gradients on declared parameters alone. 9. and on every one of them."""
    before = frozen_bytes(model)
    c = make(model, method).train()
    ids, mask = batch([16, 12])
    text, text_mask = batch([8, 6], seed=3)
    out = c(ids, text, context_mask=mask, attention_mask=text_mask, **asked(method))
    params = dict(c.named_parameters())
    if params:
        out.loss.backward()
        dead = [
            k for k, p in params.items() if p.requires_grad and (p.grad is None or not p.grad.abs().sum() > 0)
        ]
        assert not dead, f"no gradient reaches {dead}"
        torch.optim.SGD(c.parameters(), 0.1).step()
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("method", [m for m in METHODS if m != "none"])
def test_context_is_seen(model, method):
    """9. Swapping the context changes the logits."""
    c = make(model, method)
    ids, mask = batch([16, 16])
    text, _ = batch([6, 6], seed=3)
    context = c.compress(ids, mask, **asked(method))
    a, _ = c.decode(context, text)
    b, _ = c.decode(context.select(torch.tensor([1, 0])), text)
    assert (a - b).abs().max() > 1e-4


@pytest.mark.parametrize("method", METHODS)
def test_later_text_changes_nothing_earlier(model, method):
    """6. Token t of the text never changes earlier outputs."""
    c = make(model, method)
    ids, _ = batch([16])
    text, _ = batch([8], seed=3)
    context = c.compress(ids, **asked(method))
    a, _ = c.decode(context, text)
    changed = text.clone()
    changed[0, 5] = (changed[0, 5] + 1) % VOCAB
    b, _ = c.decode(context, changed)
    assert torch.allclose(a[:, :5], b[:, :5], atol=1e-5)
    assert not torch.allclose(a[:, 5:], b[:, 5:], atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_save_and_load(tmp_path, method):
    """11. Bit-identical after a round trip; keys are the trained tensors; another base or an extra key
    raises."""
    model = tiny_decoder("llama")
    c = make(model, method)
    ids, mask = batch([15, 10])
    text, _ = batch([5, 5], seed=3)
    c.save(tmp_path / "c")
    again = load_compressor(tmp_path / "c", tiny_decoder("llama"))
    a, _ = c.decode(c.compress(ids, mask, **asked(method)), text)
    b, _ = again.decode(again.compress(ids, mask, **asked(method)), text)
    assert torch.equal(a, b)
    assert set(load_file(tmp_path / "c" / "adapter_model.safetensors")) == set(c.state_dict())
    assert set(dict(c.named_parameters())) <= set(c.state_dict())
    assert not any(f.suffix in (".bin", ".pt", ".pkl") for f in (tmp_path / "c").iterdir())
    with pytest.raises(ValueError, match="another decoder"):
        load_compressor(tmp_path / "c", tiny_decoder("llama", seed=1))
    save_file({**c.state_dict(), "extra": torch.ones(1)}, tmp_path / "c" / "adapter_model.safetensors")
    with pytest.raises(RuntimeError, match="extra"):
        load_compressor(tmp_path / "c", model)


@pytest.mark.parametrize("method", METHODS)
def test_context_round_trip_and_bytes(tmp_path, method, model):
    """11, 12, 13. A stored context is the same context; its reported bytes are the storage of its tensors."""
    c = make(model, method)
    ids, mask = batch([15, 10])
    text, _ = batch([5, 5], seed=3)
    context = c.compress(ids, mask, **asked(method))
    context.save(tmp_path / "x.safetensors")
    again = CompressedContext.load(tmp_path / "x.safetensors")
    assert torch.equal(c.decode(context, text)[0], c.decode(again, text)[0])
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for _, t in context.named_tensors()
    }
    assert context.bytes() == sum(storages.values())
    # nothing kept is a view that holds a larger tensor alive
    assert all(
        t.untyped_storage().nbytes() == t.numel() * t.element_size() for _, t in context.named_tensors()
    )
    picked = context.select(torch.tensor([1, 0, 1]))
    a, b = c.decode(context, text)[0], c.decode(picked, text[[1, 0, 1]])[0]
    assert torch.allclose(a[[1, 0, 1]], b, atol=1e-5)


@pytest.mark.parametrize("cache", ["dynamic", "static", "quantized"])
@pytest.mark.parametrize("method", METHODS)
def test_generate_table(method, cache, llama):
    """Greedy, sampling and beams through every kind of cache; no prompt token is dropped."""
    c = make(llama, method)
    ids, mask = batch([15, 10])
    prompt, prompt_mask = batch([9, 6], "left", seed=2)
    context = c.compress(ids, mask, **asked(method))
    run = lambda **k: c.generate(prompt, context, prompt_mask, cache=cache, max_new_tokens=3, **k)  # noqa: E731
    greedy = run(do_sample=False)
    assert greedy.shape == (2, 12) and torch.equal(greedy[:, :9], prompt)
    if cache != "quantized":  # 8-bit keys may move a greedy choice
        assert torch.equal(
            greedy, c.generate(prompt, context, prompt_mask, max_new_tokens=3, do_sample=False)
        )
    torch.manual_seed(3)
    assert run(do_sample=True, num_return_sequences=2).shape == (4, 12)
    assert run(num_beams=3, do_sample=False).shape == (2, 12)
    # every prompt token was read: the logits of generate's first step are those after the whole prompt
    how = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    first, want = run(**how).logits[0], c.decode(context, prompt, prompt_mask)[0][:, -1]
    short = c.decode(context, prompt[:, 5:], prompt_mask[:, 5:])[0][:, -1]
    assert (first - want).abs().max() < (first - short).abs().max() / 2
    assert cache == "quantized" or torch.allclose(first, want, atol=1e-3)


@pytest.mark.parametrize("cache", ["static", "quantized"])
@pytest.mark.parametrize("method,options", [("condense", {}), ("pairs", {"layer_idx": (1,), "r": 0.0})])
def test_caches_of_every_family(method, options, cache, model):
    """Embeddings, and layers with different numbers of slots: what other caches give is what the dynamic
    gives."""
    c = make(model, method, **options)
    ids, mask = batch([15, 10])
    prompt, prompt_mask = batch([9, 6], "left", seed=2)
    context = c.compress(ids, mask)
    for how in ({"do_sample": False}, {"do_sample": False, "num_beams": 2}):
        run = lambda kind: c.generate(prompt, context, prompt_mask, cache=kind, max_new_tokens=3, **how)  # noqa: B023, E731
        made, want = run(cache), run("dynamic")
        assert made.shape == want.shape and torch.equal(made[:, :9], prompt)
        assert cache == "quantized" or torch.equal(made, want)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("method", METHODS)
def test_own_generate_of_the_decoder(method, cache, llama):
    """`decoder.generate(**c.generate_inputs(...))` inside `attached` is `c.generate`, draws included."""
    c = make(llama, method)
    ids, mask = batch([15, 10])
    prompt, prompt_mask = batch([9, 6], "left", seed=2)
    context = c.compress(ids, mask, **asked(method))
    for how in ({"do_sample": False}, {"do_sample": True, "top_k": 5}):
        inputs = c.generate_inputs(context, prompt, prompt_mask, cache=cache, max_new_tokens=3)
        torch.manual_seed(3)
        with c.attached() as attached:
            theirs = attached.generate(**inputs, max_new_tokens=3, **how)
        torch.manual_seed(3)
        assert torch.equal(theirs, c.generate(prompt, context, prompt_mask, max_new_tokens=3, **how))


@pytest.mark.parametrize("method", METHODS)
def test_beams_follow_each_row(method, llama):
    """7. Beams over a prefilled cache: each row of a batch gives what it gives alone."""
    c = make(llama, method)
    ids, mask = batch([15, 10])
    prompt, _ = batch([4, 4], seed=2)
    context = c.compress(ids, mask, **asked(method))
    both = c.generate(prompt, context, num_beams=3, do_sample=False, max_new_tokens=4)
    for row in range(2):
        one = context.select(torch.tensor([row]))
        alone = c.generate(prompt[row : row + 1], one, num_beams=3, do_sample=False, max_new_tokens=4)
        assert torch.equal(both[row : row + 1], alone)


@pytest.mark.parametrize("method", METHODS)
def test_bad_input(method, llama):
    """10. Masks that are short or broken, missing where there is padding, and inputs too long: errors, no
    truncation."""
    c = make(llama, method)
    ids, mask = batch([15, 10])
    for wrong in (mask[:, :-1], torch.cat([mask, mask[:, :1]], 1)):
        with pytest.raises(ValueError, match="mask has shape"):
            c.compress(ids, wrong)
    holes = mask.clone()
    holes[0, 4] = 0
    with pytest.raises(ValueError, match="unbroken"):
        c.compress(ids, holes)
    with pytest.raises(ValueError, match="no attention mask"):
        c.compress(ids)
    with pytest.raises(ValueError, match="not both"):
        c.compress(ids, mask, ratio=2, budget=3)
    with pytest.raises(ValueError, match="at least 1"):
        c.compress(ids, mask, ratio=0.5)
    text, _ = batch([120, 120])
    with pytest.raises(ValueError, match="positions"):
        c.decode(c.compress(ids, mask, **asked(method)), text)
    with pytest.raises(ValueError, match="rows"):
        c.decode(c.compress(ids, mask, **asked(method)), text[:1, :4])


@pytest.mark.parametrize("method", METHODS)
def test_attached_is_undone(method, model):
    """2. Hooks are gone after an exception, nested attachment raises, the detached decoder is the base, and
    attaching one decoder leaves another alone."""
    ids, _ = batch([12])
    another = tiny_decoder(model.config.model_type, seed=5)
    expect = [m(ids).logits for m in (model, another)]
    c, other = make(model, method), make(another, method)
    with pytest.raises(ZeroDivisionError), c.attached():
        1 / 0  # noqa: B018
    with c.attached():
        assert torch.equal(another(ids).logits, expect[1])
        with other.attached(), pytest.raises(RuntimeError, match="already attached"), c.attached():
            pass
    assert torch.equal(model(ids).logits, expect[0])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("method", METHODS)
def test_checkpointing_gives_the_same_gradients(model, method):
    """14. Recomputation changes nothing."""
    ids, mask = batch([16, 12])
    text, _ = batch([6, 6], seed=3)
    grads = []
    for checkpointing in (False, True):
        c = make(copy.deepcopy(model), method, gradient_checkpointing=checkpointing).train()
        if not list(c.parameters()):
            return
        torch.manual_seed(11)
        c(ids, text, context_mask=mask, **asked(method)).loss.backward()
        grads.append({k: p.grad for k, p in c.named_parameters()})
    for k in grads[0]:
        assert torch.allclose(grads[0][k], grads[1][k], atol=1e-5, rtol=1e-4), k


@pytest.mark.parametrize("objective", ["lm", "ae", "qa", "distill"])
@pytest.mark.parametrize("method", METHODS)
def test_objectives(method, objective, llama):
    c = make(llama, method)
    ids, mask = batch([12, 9])
    text, text_mask = batch([6, 5], seed=3)
    labels = text.masked_fill(text_mask == 0, -100)
    labels[:, :3] = -100
    options = {"labels": labels} if objective == "qa" else {}
    out = c(
        ids,
        text,
        objective=objective,
        context_mask=mask,
        attention_mask=text_mask,
        **options,
        **asked(method),
    )
    assert torch.isfinite(out.loss) and (out.loss > 0 or method == "full")
    if objective == "distill" and method == "full":
        assert out.loss < 1e-5
    if objective == "qa":
        with pytest.raises(ValueError, match="labels"):
            c(ids, text, objective="qa", context_mask=mask)


@pytest.mark.parametrize("family", FAMILIES)
def test_empty_context(family):
    """A row with no tokens keeps no slots and reads like no context."""
    c = make(tiny_decoder(family), "mean_pool")
    ids, mask = batch([8, 0])
    text, _ = batch([5, 5], seed=3)
    got, _ = c.decode(c.compress(ids, mask, budget=3), text)
    alone, _ = c.decode(None, text)
    assert torch.allclose(got[1], alone[1], atol=1e-5)
