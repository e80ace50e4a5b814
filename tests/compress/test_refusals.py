"""What cannot be met is refused with the limit in the message; nothing is ever cut short in silence."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, GPTNeoXConfig

from model.compress import method_names, wrap
from tests.compress.test_contract import SETTINGS, asked, make
from tests.compress.tiny import VOCAB, batch, tiny_decoder

METHODS = method_names()
# 96 positions: these read a longer context in segments, keep its end, or drop it; the others need it whole.
ANY_LENGTH = {"none", "last", "autocompressor", "variable_autocompressor"}


@pytest.mark.parametrize("method", METHODS)
def test_context_longer_than_the_positions(model, method):
    c = make(model, method)
    ids, mask = batch([120, 40])
    text, _ = batch([4, 4], seed=2)
    if method in ANY_LENGTH:
        kept = c.compress(ids, mask, **asked(method))
        assert kept.source_length.tolist() == [120, 40]
        assert torch.isfinite(c.decode(kept, text)[0]).all()
        return
    with pytest.raises(ValueError, match=r"(1[0-9]{2}) positions are needed and the decoder has 96"):
        c.decode(c.compress(ids, mask, **asked(method)), text)


@pytest.mark.parametrize("method", METHODS)
def test_generation_past_the_positions(llama, method):
    c = make(llama, method)
    context, (prompt, _) = c.compress(batch([20])[0], **asked(method)), batch([4], seed=2)
    with pytest.raises(ValueError, match="the decoder has 96"):
        c.generate(prompt, context, max_new_tokens=95, do_sample=False)


HOWS = {
    "max_new_tokens": lambda model, n: {"max_new_tokens": n},
    "max_length": lambda model, n: {"max_length": 4 + n},
    "generation_config": lambda model, n: {"generation_config": GenerationConfig(max_new_tokens=n)},
    "its max_length": lambda model, n: {"generation_config": GenerationConfig(max_length=4 + n)},
    "model": lambda model, n: setattr(model.generation_config, "max_new_tokens", n) or {},
}


@pytest.mark.parametrize("how", HOWS)
def test_every_way_to_ask_for_tokens_is_checked(llama, how):
    """The last position may be used and none beyond it, with a context and without."""
    c = make(llama, "mean_pool")
    context, (prompt, _) = c.compress(batch([80])[0], budget=5), batch([4], seed=2)
    for given, room in ((context, 96 - 80 - 4), (None, 96 - 4)):
        with pytest.raises(ValueError, match="97 positions are needed and the decoder has 96"):
            c.generate(prompt, given, do_sample=False, **HOWS[how](llama, room + 1))
    padded, mask = batch([4], "left", seed=2, width=9)  # columns that nobody uses are no prompt
    made = c.generate(padded, context, mask, do_sample=False, **HOWS[how](llama, 12))
    assert made.shape == (1, 16)


def test_beams_of_a_generation_config(llama):
    c = make(llama, "mean_pool")
    context, (prompt, _) = c.compress(batch([20, 20])[0], budget=5), batch([4, 4], seed=2)
    config = GenerationConfig(num_beams=3, num_return_sequences=2, do_sample=False, max_new_tokens=3)
    made = c.generate(prompt, context, generation_config=config)
    plain = {"num_beams": 3, "num_return_sequences": 2, "do_sample": False, "max_new_tokens": 3}
    assert torch.equal(made, c.generate(prompt, context, **plain)) and made.shape == (4, 7)


@pytest.mark.parametrize("method", METHODS)
def test_ratio_beyond_the_context(llama, method):
    """One slot is the fewest a context can become: a higher ratio is an error, not a ratio of its own."""
    c = make(llama, method)
    with pytest.raises(ValueError, match="ratio 21: the longest context has 20 tokens"):
        c.compress(batch([20, 3])[0], batch([20, 3])[1], ratio=21)
    with pytest.raises(ValueError, match="at least 0"):
        c.compress(batch([20])[0], budget=-1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ratio", [1.0, 2.0, 5.0])
def test_the_ratio_of_the_config_is_that_of_a_call(llama, method, ratio):
    """Every method keeps as many slots, or refuses in the same words."""

    def outcome(options, call):
        try:
            return wrap(llama, method, **options).compress(batch([20])[0], **call).slot_counts.tolist()
        except ValueError as error:
            return str(error)

    options = {k: v for k, v in SETTINGS.get(method, {}).items() if k != "ratio"}
    assert outcome(options | {"ratio": ratio}, {}) == outcome(options, {"ratio": ratio})
    with pytest.raises(ValueError, match="at least 1"):
        wrap(llama, method, ratio=0.5, **options)


def test_methods_that_cannot_meet_a_ratio_say_what_they_can(llama):
    ids = batch([20])[0]
    for method, options, word in (
        ("full", {"ratio": 4}, "ratio of 1"),
        ("full", {"budget": 5}, "ratio of 1"),
        ("pairs", {"ratio": 4}, "at least 12 slots"),
        ("condense", {"ratio": 2}, "num_condense_tokens=6"),
        ("autocompressor", {"ratio": 10}, "one segment makes 3"),
        ("variable_autocompressor", {"ratio": 10}, "one segment makes 3"),
    ):
        with pytest.raises(ValueError, match=word):
            make(llama, method).compress(ids, **options)


def test_a_state_of_another_carrier(llama):
    c = make(llama, "autocompressor")
    pooled = wrap(c.decoder, "mean_pool").compress(batch([12])[0], budget=3)
    with pytest.raises(ValueError, match="cannot continue a cache state"):
        c.compress(batch([12])[0], state=pooled)
    with pytest.raises(ValueError, match="cannot continue a cache state"):
        wrap(c.decoder, "last").compress(batch([12])[0], budget=3, state=pooled)
    other = wrap(tiny_decoder("llama", seed=3), "mean_pool")
    with pytest.raises(ValueError, match="another decoder"):
        other.compress(batch([12])[0], budget=3, state=pooled)


def test_decoders_that_are_not_known():
    small = GPTNeoXConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
                          intermediate_size=40)  # fmt: skip
    with pytest.raises(ValueError, match="'gpt_neox'; there is one for llama, mistral, qwen3, opt, gpt2"):
        wrap(AutoModelForCausalLM.from_config(small), "condense")


def test_settings_of_a_decoder_that_would_lose_slots():
    flex = tiny_decoder("llama")
    flex.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="'flex_attention' takes no per-layer mask"):
        wrap(flex, "mean_pool")
    own = tiny_decoder("llama")
    own.activation_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient_checkpointing_disable"):
        wrap(own, "mean_pool")


def test_a_sliding_window_that_slots_would_fall_out_of():
    c = wrap(tiny_decoder("mistral", sliding_window=16), "mean_pool")
    with pytest.raises(ValueError, match="20 keys are needed and the decoder attends to the last 16"):
        c.compress(batch([20])[0], ratio=4)
    context = c.compress(batch([12])[0], ratio=4)
    with pytest.raises(ValueError, match="attends to the last 16"):
        c.decode(context, batch([14], seed=2)[0])
    assert c.decode(context, batch([13], seed=2)[0])[0].shape == (1, 13, VOCAB)


def test_kinds_of_cache(llama):
    c = make(llama, "mean_pool")
    context, (prompt, _) = c.compress(batch([12])[0], budget=3), batch([4], seed=2)
    with pytest.raises(ValueError, match="dynamic, static and quantized"):
        c.generate(prompt, context, cache="paged", max_new_tokens=2)
    assert c.generate(prompt, context, cache="static", do_sample=False).shape == (1, 24)  # 20 unless said
    with pytest.raises(ValueError, match="at least one token"):
        c.generate(prompt[:, :0], context, max_new_tokens=2)
