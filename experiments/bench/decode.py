"""Decoding one sequence: a 28M Samba-like hybrid beside transformers' Llama with as many parameters.

128 prompt tokens, then 64 greedy tokens, prompt included in every time. Both fp32 and tied over a vocabulary
of 16,384; the peer runs as its users run it (`generate` with its default cache). Rows with int8 weights need
torchao (`pip install 'latent-lab[int8]'`).
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

import model
from experiments.bench.harness import Candidate, Case
from model.decode import Decoder, to_int8
from model.lm import LanguageModel

PROMPT, NEW, VOCAB, DIM, PEER_LAYERS = 128, 64, 16_384, 384, 12
PEER = "transformers Llama, generate"
HYBRID: dict[str, Any] = {
    "dim": DIM,
    "defaults": {
        "mamba2": {"state": 64, "head_dim": 64},
        "swa": {"head_dim": 64, "group": 2, "window": 256},
        "mlp": {"mult": 8 / 3},
    },
    "stack": [{"repeat": 6, "of": ["mamba2", "mlp", "swa", "mlp"]}],
}


def hybrid() -> LanguageModel:
    torch.manual_seed(0)
    return model.build(HYBRID, vocab=VOCAB).eval()


def llama(parameters: int) -> Any:
    """transformers' Llama of the same width whose MLPs are wide enough for that many parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    attention = 2 * DIM * DIM + 2 * DIM * DIM // 2
    hidden = (parameters - VOCAB * DIM - PEER_LAYERS * attention) // (3 * DIM * PEER_LAYERS)
    shape: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": DIM,
        "intermediate_size": hidden,
        "num_hidden_layers": PEER_LAYERS,
        "num_attention_heads": DIM // 64,
        "num_key_value_heads": DIM // 128,
        "tie_word_embeddings": True,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    return LlamaForCausalLM(LlamaConfig(**shape)).eval()


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def cases() -> list[Case]:
    lm = hybrid()
    peer = llama(count(lm))
    ids = torch.randint(VOCAB, (1, PROMPT), generator=torch.Generator().manual_seed(1))
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    mask = torch.ones_like(ids)
    runs: dict[str, Callable[[], object]] = {
        PEER: lambda: peer.generate(ids, attention_mask=mask, **options),
        "ours, eager": lambda: lm.generate(ids, max_new_tokens=NEW),
        "ours, compiled step": _with(Decoder(lm), ids),
    }
    bars = {"ours, compiled step": 1.3}
    if importlib.util.find_spec("torchao") is None:
        print("int8 weights: not measured (torchao is not installed: pip install 'latent-lab[int8]')")
    else:
        small = to_int8(copy.deepcopy(lm))
        runs["ours, compiled step, int8 weights"] = _with(Decoder(small), ids)
        bars["ours, compiled step, int8 weights"] = 3.2
    title = (
        f"{NEW} greedy tokens after a prompt of {PROMPT}, fp32: hybrid of {count(lm) / 1e6:.1f}M parameters,"
        f" Llama of {count(peer) / 1e6:.1f}M"
    )
    return [Case(title, [Candidate(name, run) for name, run in runs.items()], PEER, bars)]


def _with(decoder: Decoder, ids: torch.Tensor) -> Callable[[], object]:
    return lambda: decoder.generate(ids, max_new_tokens=NEW)
