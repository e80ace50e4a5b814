"""The linear mixers as blocks: reductions to one another, initial values, streaming, bf16, errors."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import model
from model.core import Ctx
from model.ops.linear import delta_rule, gla
from model.ops.rope import rope, rope_tables
from model.ops.ssd import ssd

MIXERS = {
    "gla": {"heads": 2},
    "retention": {"heads": 2},
    "deltanet": {"heads": 2},
    "gated_deltanet": {"heads": 2},
    "kda": {"heads": 2},
    "rwkv6": {"heads": 2},
}
every_mixer = pytest.mark.parametrize("name", MIXERS)


def build(name: str, dim: int = 32, **more) -> model.core.Block:
    torch.manual_seed(0)
    return model.make_block(name, dim=dim, **{**MIXERS[name], **more}).double()


def close(a: torch.Tensor, b: torch.Tensor, tol: float = 1e-11) -> None:
    assert (a - b).abs().max() <= tol * (1 + b.abs().max())


# ----------------------------------------------------------------------------- reductions


def test_gated_deltanet_without_decay_is_deltanet() -> None:
    shape = {"heads": 2, "expand_k": 0.5, "expand_v": 1.0}
    gated = model.make_block("gated_deltanet", 32, **shape).double()
    plain = model.make_block("deltanet", 32, **shape, use_gate=True).double()
    plain.load_state_dict({k: v for k, v in gated.state_dict().items() if k in plain.state_dict()})
    with torch.no_grad():
        gated.A_log.fill_(-math.inf)
    x = torch.randn(2, 70, 32).double()
    close(gated(x).y, plain(x).y)


def test_kda_with_the_same_decay_in_every_channel_is_gated_deltanet() -> None:
    kda, x = build("kda"), torch.randn(2, 40, 32).double()
    with torch.no_grad():
        kda.f_proj[1].weight.copy_(kda.f_proj[1].weight[:1].expand_as(kda.f_proj[1].weight))
        kda.dt_bias.fill_(-1.0)
    g = kda.decay(x)
    assert g.shape == (2, 40, 2, 16) and torch.equal(g.amin(-1), g.amax(-1))
    q, k, v, _ = kda.qkv(x, None, None)
    beta = kda.b_proj(x).sigmoid()
    o, _ = delta_rule(q, k, v, beta, g)
    o2, _ = delta_rule(q, k, v, beta, g[..., 0])
    close(o, o2)


def test_gla_with_one_gate_a_head_is_ssd() -> None:
    """q = C, k = B, v = dt x, g = dt A, scale 1, D = 0."""
    x, b, c = (torch.randn(2, 70, 2, n).double() for n in (6, 5, 5))
    dt, A = torch.rand(2, 70, 2).double(), -torch.rand(2).double()
    y, last = ssd(x * dt[..., None], dt * A, b, c, want_state=True)
    o, S = gla(c, b, x * dt[..., None], (dt * A)[..., None].expand_as(b), scale=1.0)
    close(o, y)
    close(S, last)


def test_retention_forgets_nothing_when_its_gate_is_open() -> None:
    """g = 0: unnormalised causal attention of turned q and k."""
    block, x = build("retention", gate_normalizer=1e30), torch.randn(1, 70, 32).double()
    q, k, v, _ = block.qkv(x, None, None)
    cos, sin = rope_tables(torch.arange(70)[None], 16, block.theta, torch.float64)
    scores = torch.einsum("bthk,bshk->bhts", rope(q, cos, sin), rope(k, cos, sin)).tril() * 16**-0.5
    o = torch.einsum("bhts,bshv->bthv", scores, v)
    want = block.o_proj(block.o_norm(o, F.silu(block.g_proj(x))))
    close(block(x).y, want, 1e-9)


# ----------------------------------------------------------------------------- initial values


def test_initial_decays_are_the_published_ones() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 50, 256)
    gated = model.make_block("gated_deltanet", 256)
    assert (gated.heads, gated.key_width, gated.value_width) == (6, 32, 64)
    A = gated.A_log.exp()
    dt = F.softplus(gated.dt_bias)
    assert A.min() > 0 and A.max() <= 16 and dt.min() >= 1e-4 and dt.max() <= 0.1 + 1e-6
    kda = model.make_block("kda", 256)
    assert (kda.heads, kda.key_width) == (2, 128) and kda.dt_bias.shape == (256,)
    wide = model.make_block("gla", 256)
    assert (wide.heads, wide.key_width, wide.value_width) == (4, 32, 64)
    g = F.logsigmoid(wide.gk_proj(x)) / 16
    assert g.min() > -0.2 and g.max() < 0
    rwkv = model.make_block("rwkv6", 256)
    assert rwkv.heads == 4 and rwkv.key_width == 64
    bias = rwkv.w_proj.linear.lora[2].bias
    assert bias[0] == -6 and math.isclose(bias[-1].item(), -1, abs_tol=1e-5) and (bias.diff() > 0).all()
    first, last = (model.make_block("rwkv6", 256, depth=d) for d in (0.0, 1.0))
    assert first.bonus.abs().max() <= 0.1 + 1e-6 and last.bonus.max() > 0.9


@every_mixer
def test_decay_parameters_take_no_weight_decay_and_the_output_is_marked(name: str) -> None:
    block = build(name)
    assert block.o_proj.residual_out
    for own in ("A_log", "dt_bias", "bonus"):
        if hasattr(block, own):
            assert own in block.no_decay


# ----------------------------------------------------------------------------- use


@every_mixer
def test_decoding_equals_the_whole_pass_in_fp32(name: str) -> None:
    block = build(name).float()
    x = torch.randn(2, 75, 32)
    want = block(x).y
    with torch.no_grad():
        step = block(x[:, :66], block.init_state(2, x))
        ys = [step.y]
        for t in range(66, 75):
            step = block(x[:, t : t + 1], step.state)
            ys.append(step.y)
    assert (torch.cat(ys, 1) - want).abs().max() < 2e-5 * want.abs().max()


@every_mixer
def test_state_does_not_grow(name: str) -> None:
    block = build(name).float()
    x = torch.randn(1, 1, 32)
    state = block.init_state(1, x)
    size = model.core.state_bytes(state)
    with torch.no_grad():
        for _ in range(50):
            state = block(x, state).state
    assert model.core.state_bytes(state) == size == block.cost(1).state_fixed


@every_mixer
def test_bf16_autocast_learns_like_fp32(name: str) -> None:
    """A few steps on one batch: the loss falls, and falls alike."""
    losses = {}
    for precision in ("fp32", "bf16"):
        block = build(name).float()
        optimizer = torch.optim.AdamW(block.parameters(), lr=3e-3)
        x = torch.randn(2, 70, 32, generator=torch.Generator().manual_seed(1))
        target = x.roll(3, 1)
        for _ in range(8):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                loss = F.mse_loss(block(x).y.float(), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.setdefault(precision, []).append(loss.item())
    assert losses["fp32"][-1] < losses["fp32"][0] - 0.02
    assert abs(losses["bf16"][-1] - losses["fp32"][-1]) < 0.02


@every_mixer
def test_packed_documents_at_chunk_edges(name: str) -> None:
    """Documents that start just before, at and after the edges of chunks of 32 and 64."""
    block = build(name)
    cuts = [0, 31, 32, 33, 63, 64, 65, 127, 130]
    x = torch.randn(1, 130, 32).double()
    together = block(x, None, Ctx.packed(cuts)).y
    alone = torch.cat([block(x[:, a:b]).y for a, b in itertools.pairwise(cuts)], 1)
    close(together, alone)


def test_gate_floor_promises_the_fast_form() -> None:
    """With a floor the decays are clamped, and nothing else changes while none reaches it."""
    x = torch.randn(2, 70, 32).double()
    free, floored = build("gla"), build("gla", gate_floor=-0.9)
    floored.load_state_dict(free.state_dict())
    close(free(x).y, floored(x).y)
    tight = build("gla", gate_floor=-1e-6)
    tight.load_state_dict(free.state_dict())
    assert (tight(x).y - free(x).y).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("gla", {"heads": 3}, "expand_k=0.5 of dim=32 is 16, which 3 heads do not share"),
        ("gla", {"heads": 2, "head_dim": 16}, "give heads=2 or head_dim=16, not both"),
        ("gla", {"head_dim": 12}, "head_dim=12 must divide the value width 32"),
        ("deltanet", {"conv": -1}, "conv=-1: must be a width, or 0"),
        ("retention", {"heads": 32}, "RoPE turns pairs of channels"),
        ("retention", {"theta": 0.0}, "theta=0.0: .* above 0"),
        ("retention", {"gate_normalizer": -1.0}, "gate_normalizer=-1.0: must be above 0"),
        ("gla", {"gate_normalizer": 0.0}, "gate_normalizer=0.0: must be above 0"),
        ("gla", {"gate_floor": 0.5}, "gate_floor=0.5 at most 0"),
        ("gla", {"gate_rank": 0}, "gate_rank=0 must be at least 1"),
        (
            "gla",
            {"conv_backend": "shift"},
            "no backend of conv is called 'shift': must be one of auto, .*shifts",
        ),
        ("kda", {"backend": "chunk"}, "no backend of gated_delta_rule is called 'chunk'"),
        ("rwkv6", {"heads": 5}, "5 heads do not share"),
        ("rwkv6", {"depth": 2.0}, "depth=2.0 lies between 0 and 1"),
        ("rwkv6", {"shift_rank": 0}, "shift_rank=0"),
    ],
)
def test_wrong_parameters_say_what_is_wrong(name: str, params: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.make_block(name, dim=32, **params)


def test_head_dim_gives_the_heads() -> None:
    block = model.make_block("gla", dim=576, head_dim=64)
    assert (block.heads, block.key_width, block.value_width) == (9, 32, 64)
