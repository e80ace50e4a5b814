"""A training step of a 25M-parameter Llama-shaped stack against transformers' Llama, bf16 autocast.

d512 L6 ff1408 V8192 tied, B8 T512: forward, backward, optimizer. The peer runs as its users run it
(SDPA, torch's default AdamW, which is foreach), eager and compiled; one more row gives it the fused
optimizer, since that alone is worth a few per cent. MFU is model FLOPs per second over the best bf16
2048^3 matmul of the same run.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

import model
from experiments.bench.harness import Candidate, Case, Result, measure
from model.schema import BlockNode, Config, Node, RepeatNode
from train import optim

B, T, D, L, F, V = 8, 512, 512, 6, 1408, 8192
PEER = "transformers, eager"


def ours(compiled: bool) -> Callable[[], object]:
    """Our stack with the lab's own optimizer groups."""
    torch.manual_seed(0)
    layer: list[Node] = [BlockNode("attention", {"head_dim": 64}), BlockNode("mlp", {"mult": F / D})]
    config = Config(dim=D, stack=[RepeatNode(L, layer)], name="llama-25m")
    lm = model.build(config, vocab=V).train()
    if compiled:
        lm.compile_blocks()
    optimizer = optim.build(lm, config.optim, lm.no_decay(), {})
    tokens = torch.randint(V, (B, T))

    def run() -> object:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = lm(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return run


def peer(compiled: bool, fused: bool) -> Callable[[], object]:
    """transformers' LlamaForCausalLM."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "vocab_size": V,
        "hidden_size": D,
        "intermediate_size": F,
        "num_hidden_layers": L,
        "num_attention_heads": D // 64,
        "num_key_value_heads": D // 64,
        "max_position_embeddings": T,
        "tie_word_embeddings": True,
        "attn_implementation": "sdpa",
    }
    lm: Any = LlamaForCausalLM(LlamaConfig(**shape)).train()
    optimizer = torch.optim.AdamW(lm.parameters(), lr=1e-3, fused=fused or None)
    step = torch.compile(lm) if compiled else lm
    tokens = torch.randint(V, (B, T))

    def run() -> object:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = step(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return run


def flops_per_step() -> float:
    """6 (non-embedding parameters + V D) + 6 L T D per token: attention counted causally."""
    layer = 4 * D * D + 3 * D * F
    return B * T * (6 * (L * layer + V * D) + 6 * L * T * D)


def best_matmul(seconds: float = 3.0) -> float:
    """FLOP/s of the best bf16 2048^3 product seen in a few seconds."""
    n, best, end = 2048, 0.0, time.perf_counter() + seconds
    a, b = (torch.randn(n, n, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    while time.perf_counter() < end:
        began = time.perf_counter()
        torch.mm(a, b, out=out)
        best = max(best, 2 * n**3 / (time.perf_counter() - began))
    return best


def run(rounds: int) -> list[Result]:
    before = best_matmul()
    candidates = [
        Candidate(PEER, peer(compiled=False, fused=False)),
        Candidate("transformers, compiled", peer(compiled=True, fused=False)),
        Candidate("transformers, compiled, fused AdamW", peer(compiled=True, fused=True)),
        Candidate("ours, eager", ours(compiled=False)),
        Candidate("ours, compiled", ours(compiled=True)),
    ]
    result = measure(Case("", candidates, PEER, {"ours, compiled": 1.2}), rounds)
    peak = max(before, best_matmul())
    rows = {r.name: r for r in result.rows}
    best = rows["ours, compiled"]
    mfu = flops_per_step() / best.median / peak
    gain = rows["transformers, compiled"].median / best.median
    title = (
        f"Training step, Llama shape, 25M parameters, B{B} T{T}, bf16 autocast; ours compiled: MFU {mfu:.3f}"
        f" of {peak / 1e9:.0f} GFLOP/s (bar 0.26), {gain:.2f}x the compiled peer (bar 1.05)"
    )
    return [Result(title, result.base, result.rounds, result.rows)]
