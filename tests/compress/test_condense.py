"""Condense: shapes, gradients, equality of paths, published checkpoints."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from model.compress import wrap
from model.compress.lora import LoRA
from tests.compress.tiny import batch, tiny_decoder

SMALL = {"num_condense_tokens": 6, "lora_rank": 2, "lora_alpha": 4.0}


@pytest.mark.parametrize("length", [1, 5, 6, 7, 40])
def test_as_many_soft_tokens_as_asked(model, length):
    c = wrap(model, "condense", **SMALL)
    ids, _ = batch([length])
    assert c.compress(ids).embeds.shape == (1, 6, c.decoder.embed_width)
    assert c.compress(ids, budget=4).embeds.shape[1] == 4


def test_zero_tokens_is_the_decoder_alone(model):
    c = wrap(model, "condense", num_condense_tokens=0, lora_rank=0)
    ids, _ = batch([9, 9])
    text, _ = batch([7, 7], seed=2)
    logits, first = c.decode(c.compress(ids), text)
    assert first is None
    assert torch.allclose(logits, model(text).logits, atol=1e-5)
    assert torch.equal(
        c.generate(text, c.compress(ids), max_new_tokens=5, do_sample=False),
        model.generate(text, attention_mask=torch.ones_like(text), max_new_tokens=5, do_sample=False),
    )


def test_last_slot_predicts_the_first_token_and_pads_are_not_scored(llama):
    """-100 comes from the mask alone, whatever id the padding has."""
    c = wrap(llama, "condense", **SMALL)
    ids, _ = batch([9, 9])
    text, mask = batch([7, 4], seed=2)
    other = text.masked_fill(mask == 0, 17)
    a, b = (c(ids, t, attention_mask=mask).loss for t in (text, other))
    assert torch.allclose(a, b)
    context = c.compress(ids)
    logits, first = c.decode(context, text, mask)
    rows = [torch.cat([first[i : i + 1], logits[i, : n - 1]]) for i, n in ((0, 7), (1, 4))]
    want = torch.nn.functional.cross_entropy(torch.cat(rows), torch.cat([text[0], text[1, :4]]))
    assert torch.allclose(a, want, atol=1e-5)


def test_embeds_path_equals_cache_path(llama):
    c = wrap(llama, "condense", **SMALL)
    ids, _ = batch([9, 9])
    text, _ = batch([4, 4], seed=2)
    context = c.compress(ids)
    mine = c.generate(text, context, max_new_tokens=6, do_sample=False)
    theirs = llama.generate(**c.prompt_embeds(context, text), max_new_tokens=6, do_sample=False)
    assert torch.equal(mine[:, 4:], theirs)


def test_encoder_of_its_own(tmp_path):
    """A wider encoder of another family, which the decoder's gradient never reaches."""
    tiny_decoder("gpt2").save_pretrained(tmp_path / "encoder")
    c = wrap(tiny_decoder("opt"), "condense", encoder=str(tmp_path / "encoder"), **SMALL).train()
    ids, mask = batch([9, 5])
    text, _ = batch([4, 4], seed=2)
    c(ids, text, context_mask=mask).loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in (c.pre_condensed_tokens, c.linear.weight, c.norm.weight))
    assert c.compress(ids, mask).embeds.shape[-1] == 24
    assert all(p.grad is None for p in c.encoder.model.parameters())


def test_limits_are_named(llama):
    c = wrap(llama, "condense", max_tokens=8, **SMALL)
    ids, _ = batch([9])
    with pytest.raises(ValueError, match="max_tokens=8"):
        c.compress(ids)
    with pytest.raises(ValueError, match="num_condense_tokens=6"):
        wrap(llama, "condense", **SMALL).compress(batch([40])[0], ratio=2)
    with pytest.raises(ValueError, match="96"):
        wrap(llama, "condense", **SMALL).compress(batch([95])[0])
    with pytest.raises(TypeError, match="did you mean 'num_condense_tokens'"):
        wrap(llama, "condense", num_condence_tokens=3)


def test_spans_add_up(llama):
    """Streaming: every chunk brings its own slots, positions go on."""
    c = wrap(llama, "condense", **SMALL)
    ids, _ = batch([20])
    state = c.compress(ids[:, :10])
    state = c.compress(ids[:, 10:], state=state)
    assert state.slot_positions.tolist() == [list(range(12))]
    assert state.source_length.tolist() == [20] and state.next_position.tolist() == [12]


def test_published_checkpoint(tmp_path, llama):
    """The layout of `modules.pt` with a peft-style adapter, made here from another compressor's weights."""
    a, b = (wrap(llama, "condense", **SMALL) for _ in range(2))
    with torch.no_grad():
        for p in a.parameters():
            p.add_(torch.randn_like(p))
    modules = {
        "pre_condensed_tokens": a.pre_condensed_tokens.detach()[None],
        "linear_state_dict": a.linear.state_dict(),
        "norm_state_dict": a.norm.state_dict(),
    }
    torch.save({"modules": modules}, tmp_path / "modules.pt")
    adapter = {}
    for key, value in a.lora.state_dict().items():
        half, name = key.split(".", 1)
        letter = {"down": "A", "up": "B"}[half]
        adapter[f"base_model.model.model.layers.{name.replace('/', '.')}.lora_{letter}.weight"] = value
    save_file(adapter, tmp_path / "adapter_model.safetensors")
    b.load_published(tmp_path / "modules.pt", tmp_path)
    ids, _ = batch([9, 9])
    assert torch.equal(a.compress(ids).embeds, b.compress(ids).embeds)


def test_lora_off_is_the_base_and_conv1d_is_linear():
    """15. A transposed Conv1D with the same weights gets the same update; outside the block there is none."""
    conv = tiny_decoder("gpt2").transformer.h[0].attn.c_attn
    linear = torch.nn.Linear(32, 96)
    linear.weight.data, linear.bias.data = conv.weight.data.T.clone(), conv.bias.data.clone()
    x = torch.randn(2, 3, 32)
    loras = [LoRA({"0.m": m}, 4, 8.0) for m in (conv, linear)]
    loras[1].load_state_dict(loras[0].state_dict())
    for lora in loras:
        torch.manual_seed(5)
        lora.up["0/m"].data.normal_()
    with loras[0].on(), loras[1].on():
        on = conv(x), linear(x)
    assert torch.allclose(*on, atol=1e-4) and not torch.allclose(on[0], conv(x))
    with pytest.raises(ZeroDivisionError), loras[0].on():
        1 / 0  # noqa: B018
    assert not conv._forward_hooks
