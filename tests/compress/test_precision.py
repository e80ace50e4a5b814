"""Decoders in half precision, mixed precision, and where a method's own tensors are made."""

from __future__ import annotations

import copy

import pytest
import torch

from model.compress import Decoder, load_compressor, wrap
from tests.compress.test_contract import METHODS, SETTINGS, asked, make
from tests.compress.tiny import batch, tiny_decoder


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_copy_in_half_precision_is_the_same_decoder(tmp_path, model, dtype):
    """Whichever way it is rounded; one that was trained for a step is not."""
    before = Decoder(model).fingerprint
    make(model, "condense").save(tmp_path)
    copied = copy.deepcopy(model).to(dtype)
    assert load_compressor(tmp_path, copied).decoder.fingerprint == before
    ids, trained = batch([16, 16])[0], copy.deepcopy(model).requires_grad_()
    trained(ids, labels=ids).loss.backward()
    torch.optim.SGD(trained.parameters(), 1e-2).step()
    assert Decoder(trained).fingerprint != before


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("method", METHODS)
def test_a_bf16_decoder_needs_no_autocast(method, family):
    """A decoder in half precision: compressed, read, lowered, written after, and trained in fp32."""
    c = make(tiny_decoder(family).bfloat16(), method)
    ids, mask = batch([14, 9])
    text, _ = batch([5, 5], seed=3)
    context = c.compress(ids, mask, **asked(method))
    kept = [t for k, t in context.named_tensors() if k == "embeds" or k.endswith((".keys", ".values"))]
    assert all(t.dtype == torch.bfloat16 for t in kept)
    assert torch.isfinite(c.decode(context, text)[0]).all()
    assert c.generate(text, context, max_new_tokens=2, do_sample=False).shape == (2, 7)
    loss = c.train()(ids, text, context_mask=mask, **asked(method)).loss
    own = [p for p in c.parameters() if p.requires_grad]
    if own:
        loss.backward()
    assert all(p.dtype == torch.float32 and torch.isfinite(p.grad).all() for p in own)


@pytest.mark.parametrize("method", METHODS)
def test_own_tensors_are_where_the_decoder_is(method, llama, monkeypatch):
    """Made on the decoder's device (here one that holds no numbers), not moved there afterwards;
    vectors that begin as rows of its embedding are there anyway."""
    decoder = Decoder(llama)
    monkeypatch.setattr(Decoder, "device", torch.device("meta"))
    made = wrap(decoder, method, **SETTINGS.get(method, {}))
    assert {p.device.type for k, p in made.named_parameters() if not k.startswith("embed_")} <= {"meta"}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", ["condense", "autocompressor", "pairs", "clusters"])
def test_bf16_autocast_stays_finite(method, side, model):
    """Mixed precision with padding: masked scores must not round to minus infinity."""
    c = make(model, method).train()
    ids, mask = batch([12, 5], side)
    text, text_mask = batch([6, 3], side, seed=3)
    with torch.autocast("cpu", torch.bfloat16):
        loss = c(ids, text, context_mask=mask, attention_mask=text_mask, **asked(method)).loss
    loss.backward()
    grads = [p.grad for p in c.parameters() if p.grad is not None]
    assert torch.isfinite(loss) and all(torch.isfinite(g).all() for g in grads)
