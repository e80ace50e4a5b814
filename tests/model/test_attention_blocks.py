"""Attention, MLP and Samba blocks: transformers' own layers with the same weights, and refusals."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from model.blocks.attention import alibi_slopes
from model.core import Ctx, Docs
from model.ops.attention import attend
from model.ops.norm import RMSNorm
from model.ops.rope import rope_tables
from model.registry import make_block


def relative(got: Tensor, want: Tensor) -> float:
    return float(((got - want).norm() / want.norm()).detach())


def hf_attention(kind: str, **config) -> tuple[nn.Module, nn.Module]:
    """(attention layer, rotary embedding) of a small transformers model with eager attention."""
    import transformers as hf
    from transformers.models.llama import modeling_llama as llama
    from transformers.models.mistral import modeling_mistral as mistral
    from transformers.models.qwen3 import modeling_qwen3 as qwen3

    base = {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16}
    classes = {
        "llama": (hf.LlamaConfig, llama.LlamaAttention, llama.LlamaRotaryEmbedding),
        "mistral": (hf.MistralConfig, mistral.MistralAttention, mistral.MistralRotaryEmbedding),
        "qwen3": (hf.Qwen3Config, qwen3.Qwen3Attention, qwen3.Qwen3RotaryEmbedding),
    }
    config_class, attention, rotary = classes[kind]
    cfg = config_class(**base, **config, attn_implementation="eager")
    return attention(cfg, 0), rotary(cfg)


def run_hf(peer: tuple[nn.Module, nn.Module], x: Tensor, window: int | None) -> Tensor:
    attention, rotary = peer
    T = x.shape[1]
    index = torch.arange(T)
    hidden = index[None, :] > index[:, None]
    if window is not None:
        hidden |= index[:, None] - index[None, :] >= window
    mask = torch.zeros(1, 1, T, T).masked_fill(hidden, torch.finfo(torch.float32).min)
    return attention(x, rotary(x, index[None]), mask)[0]


@pytest.mark.parametrize(
    "kind, name, params",
    [
        ("llama", "attention", {}),
        ("mistral", "swa", {"window": 24}),
        ("mistral", "swa", {"window": 80}),
        ("qwen3", "attention", {"qk_norm": True}),
    ],
)
def test_equals_transformers(kind, name, params):
    """The same state_dict, strictly; outputs, gradients, and decoding one token at a time."""
    peer = hf_attention(kind)
    block = make_block(name, 96, head_dim=16, group=3, **params)
    block.load_state_dict(peer[0].state_dict(), strict=True)
    x = torch.randn(2, 150, 96, requires_grad=True)
    want = run_hf(peer, x, params.get("window"))
    got = block(x).y
    assert relative(got, want) < 1e-5
    direction = torch.randn_like(want)
    want_grads = torch.autograd.grad((want * direction).sum(), [x, *peer[0].parameters()])
    grads = torch.autograd.grad((got * direction).sum(), [x, *block.parameters()])
    for a, b in zip(grads, want_grads):
        assert relative(a, b) < 1e-5
    with torch.no_grad():
        state, ys = block.init_state(2, x, capacity=150), []
        for t in range(150):
            step = block(x[:, t : t + 1], state)
            state = step.state
            ys.append(step.y)
    assert relative(torch.cat(ys, dim=1), want) < 1e-5


@pytest.mark.parametrize("window", [None, 9])
def test_learned_sinks_equal_gpt_oss(window):
    from types import SimpleNamespace

    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

    q, k, v = torch.randn(2, 30, 6, 16), torch.randn(2, 30, 2, 16), torch.randn(2, 30, 2, 16)
    sinks = torch.randn(6)
    index = torch.arange(30)
    distance = index[:, None] - index
    hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
    mask = torch.zeros(1, 1, 30, 30).masked_fill(hidden, torch.finfo(torch.float32).min)
    module = SimpleNamespace(num_key_value_groups=3, sinks=sinks, training=False)
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    want = eager_attention_forward(module, *heads_first, mask, scaling=16**-0.5)[0]
    assert relative(attend(q, k, v, window=window, sinks=sinks), want) < 1e-6


def test_alibi_slopes_of_the_paper():
    cpu = torch.device("cpu")
    assert alibi_slopes(8, cpu).tolist() == [2.0**-h for h in range(1, 9)]
    twelve = [2.0**-h for h in range(1, 9)] + [2 ** -(h - 0.5) for h in range(1, 5)]
    torch.testing.assert_close(alibi_slopes(12, cpu), torch.tensor(twelve))


def test_primer_convolutions_start_as_the_identity():
    plain = make_block("attention", 32, head_dim=8, group=2)
    primer = make_block("attention", 32, head_dim=8, group=2, conv=3)
    missing, unexpected = primer.load_state_dict(plain.state_dict(), strict=False)
    assert missing == ["conv_weight"] and not unexpected
    x = torch.randn(2, 12, 32)
    torch.testing.assert_close(primer(x).y, plain(x).y)
    with torch.no_grad():
        primer.conv_weight[:, 0] += 1
    assert not torch.allclose(primer(x).y[:, 2:], plain(x).y[:, 2:])
    torch.testing.assert_close(primer(x).y[:, :1], plain(x).y[:, :1])


def test_packed_swa_equals_transformers_on_separate_documents():
    peer = hf_attention("mistral")
    block = make_block("swa", 96, head_dim=16, group=3, window=24)
    block.load_state_dict(peer[0].state_dict())
    x = torch.randn(1, 200, 96)
    bounds = [0, 70, 71, 130, 200]
    got = block(x, ctx=Ctx.packed(bounds)).y
    for a, b in pairwise(bounds):
        assert relative(got[:, a:b], run_hf(peer, x[:, a:b], 24)) < 1e-5


def test_swiglu_equals_transformers_mlp():
    import transformers as hf
    from transformers.models.llama.modeling_llama import LlamaMLP

    peer = LlamaMLP(hf.LlamaConfig(hidden_size=64, intermediate_size=171))
    block = make_block("mlp", 64)
    block.load_state_dict(peer.state_dict(), strict=True)
    x = torch.randn(2, 9, 64)
    assert relative(block(x).y, peer(x)) < 1e-6


def test_rwkv_channel_mix_is_its_recurrence():
    block = make_block("mlp", 8, act="rwkv").double()
    with torch.no_grad():
        block.mix_k.uniform_()
        block.mix_r.uniform_()
    x = torch.randn(2, 12, 8, dtype=torch.float64)
    docs = Docs.packed([0, 5, 6, 12, 24], rows=2)
    got = block(x, ctx=Ctx(docs)).y
    for row, starts in ((0, {0, 5, 6}), (1, {0})):
        before = torch.zeros(8, dtype=torch.float64)
        for t in range(12):
            before = before * (t not in starts)
            now = x[row, t]
            k = torch.relu(block.up_proj(now + (before - now) * block.mix_k)) ** 2
            gate = torch.sigmoid(block.gate_proj(now + (before - now) * block.mix_r))
            torch.testing.assert_close(got[row, t], gate * block.down_proj(k))
            before = now


@pytest.mark.parametrize("mult, multiple_of, hidden", [(None, 1, 171), (2.67, 64, 192), (4.0, 256, 256)])
def test_hidden_width_is_the_nearest_multiple(mult, multiple_of, hidden):
    assert make_block("mlp", 64, mult=mult, multiple_of=multiple_of).hidden == hidden


def test_residual_outputs_are_marked():
    samba = make_block("samba", 64)
    marked = {n for n, m in samba.named_modules() if getattr(m, "residual_out", False)}
    assert {"parts.1.down_proj", "parts.2.o_proj", "parts.3.down_proj"} <= marked


def test_samba_is_four_residual_parts():
    params = {"mamba2": {"state": 16, "head_dim": 16}, "swa": {"head_dim": 16, "window": 7}}
    samba = make_block("samba", 32, **params, mlp={"act": "relu2"})
    x = torch.randn(2, 20, 32)
    want = x
    for name, part, norm in zip(("mamba2", "mlp", "swa", "mlp"), samba.parts, samba.norms):
        assert part.registered_name == name
        want = want + part(norm(want)).y
    assert samba.bare and torch.equal(samba(x).y, want)
    assert samba.parts[2].window == 7 and samba.parts[3].act == "relu2"


@pytest.mark.parametrize("T", [40, 600])
@pytest.mark.parametrize("name", ["attention", "swa"])
@pytest.mark.parametrize("more", [{}, {"sinks": True}, {"position": "alibi", "conv": 3}], ids=str)
def test_cost_is_the_flop_counter_beyond_linears(name, T, more):
    block = make_block(name, 64, head_dim=16, group=2, **more)
    linears = sum(2 * T * m.weight.numel() for m in block.modules() if isinstance(m, nn.Linear))
    with FlopCounterMode(display=False) as counter:
        block(torch.randn(1, T, 64))
    assert counter.get_total_flops() - linears == block.cost(T).flops


@pytest.mark.parametrize(
    "name, params, words",
    [
        ("attention", {"head_dim": 48}, "dim=64 is not a multiple of head_dim=48"),
        ("attention", {"head_dim": 16, "group": 3}, "group=3 must divide the 4 query heads"),
        ("attention", {"head_dim": 1}, "must be even, got 1"),
        ("attention", {"head_dim": 0}, "head_dim=0, heads=None: must be at least 1"),
        ("attention", {"head_dim": -16}, "head_dim=-16"),
        ("attention", {"heads": 0}, "heads=0: must be at least 1"),
        ("attention", {"theta": 0.0}, "theta=0.0: .* above 0"),
        ("attention", {"backend": "flash"}, "no backend of attention is called 'flash': .*flash_attn"),
        ("xattn", {"heads": 0}, "heads=0: must be at least 1"),
        ("pair_attn", {"hidden": 0}, "hidden=0"),
        ("mamba2", {"backend": "triton"}, "no backend of ssd is called 'triton'"),
        *(
            (name, {"backend": "gpu"}, f"no backend of {op} is called 'gpu'")
            for name, op in (("compressed_attn", "nsa"), ("sparsek", "sparsek"), ("xattn", "attention"))
        ),
        ("attention", {"position": "absolute"}, "must be"),
        ("attention", {"head_dim": 16, "conv": -1}, "conv=-1"),
        ("swa", {"window": 0}, "window=0"),
        ("mlp", {"act": "relu"}, "must be one of swiglu"),
        ("mlp", {"mult": -1.0}, "must be > 0"),
        ("samba", {"swa": {"windows": 3}}, "unknown parameter 'windows'; did you mean 'window'"),
    ],
)
def test_bad_parameters_are_refused(name, params, words):
    with pytest.raises((ValueError, TypeError), match=words):
        make_block(name, 64, **params)


def test_rms_norm_keeps_dtype_and_statistics():
    norm = RMSNorm(64)
    x = 1000 * torch.randn(5, 64, dtype=torch.float64)
    want = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    for dtype, tol in ((torch.float64, 1e-7), (torch.float32, 1e-6), (torch.bfloat16, 8e-3)):
        got = norm(x.to(dtype))
        assert got.dtype == dtype and relative(got.double(), want) < tol


def test_rope_tables_are_exact_far_out():
    """Neither bf16 inputs nor large positions cost precision: tables are fp32 at least."""
    positions = torch.tensor([[0, 1, 257, 100_000]])
    exact = rope_tables(positions, 8, 10_000.0, torch.float64)
    low = rope_tables(positions, 8, 10_000.0, torch.bfloat16)
    assert low[0].dtype == torch.float32
    for a, b in zip(low, exact):
        torch.testing.assert_close(a.double(), b, atol=1e-2, rtol=0)
        torch.testing.assert_close(a.double()[:, :3], b[:, :3], atol=2e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, params",
    [("attention", {"head_dim": 8}), ("swa", {"head_dim": 8, "window": 64}), ("mlp", {"act": "rwkv"})],
)
def test_attention_area_compiles_without_a_break(name, params):
    """No graph break, and nothing compiles again for another T, other documents or the next token."""
    block = make_block(name, 32, **params)
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, dynamic=True, fullgraph=True, backend=graphs)
    for pair in ((None, None), ([0, 50, 300, 400], [0, 10, 20, 30, 200, 320])):
        counts = []
        for T, cuts in zip((200, 160), pair):
            x = torch.randn(2, T, 32)
            ctx = None if cuts is None else Ctx.packed(cuts, rows=2)
            assert relative(compiled(x, None, ctx).y, block(x, None, ctx).y) < 1e-5
            counts.append(graphs.frame_count)
        assert counts[0] == counts[1]
    step = torch.compile(block, fullgraph=True, backend=graphs)
    x = torch.randn(2, 21, 32)
    with torch.no_grad():
        first = block(x[:, :10], block.init_state(2, x, capacity=20))
        state, ys, counts = first.state, [first.y], []
        for t in range(10, 20):
            y, state, _ = step(x[:, t : t + 1].clone(memory_format=torch.contiguous_format), state)
            ys.append(y)
            counts.append(graphs.frame_count)
        assert relative(torch.cat(ys, dim=1), block(x[:, :20]).y) < 1e-5
        assert counts[0] == counts[-1]
        if name == "attention":
            with pytest.raises(RuntimeError, match="capacity 20 is full"):
                step(x[:, 20:].clone(memory_format=torch.contiguous_format), state)
