"""The mamba2 block beside its peer, and what the laws (tests/laws) do not ask."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from model.core import Ctx
from model.registry import make_block

transformers = pytest.importorskip("transformers")


def pair(groups: int, **config):
    """transformers' mixer and our block with its weights, loaded strictly."""
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    torch.manual_seed(0)
    known = transformers.Mamba2Config(
        hidden_size=64, num_heads=8, head_dim=16, state_size=16, n_groups=groups, expand=2,
        chunk_size=32, num_hidden_layers=1, **config,
    )  # fmt: skip
    theirs = Mamba2Mixer(known, 0).eval()
    with torch.no_grad():
        theirs.D.uniform_(-1, 1)
        theirs.norm.weight.uniform_(0.5, 1.5)
    ours = make_block("mamba2", 64, state=16, head_dim=16, groups=groups, bias=known.use_bias)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours.eval()


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_transformers_with_gradients(groups, bias):
    theirs, ours = pair(groups, use_bias=bias)
    x = torch.randn(2, 150, 64, requires_grad=True)
    dy = torch.randn(2, 150, 64)
    grads = []
    for module, y in ((theirs, theirs(x)), (ours, ours(x).y)):
        grads.append([y.detach(), *torch.autograd.grad(y, [x, *module.parameters()], dy)])
    names = ["y", "x", *dict(theirs.named_parameters())]
    want = dict(zip(names, grads[0]))
    got = dict(zip(["y", "x", *dict(ours.named_parameters())], grads[1]))
    for name in names:
        off = (got[name] - want[name]).norm() / want[name].norm()
        assert off <= 1e-5, f"{name}: relative error {off:.1e}"


def test_steps_equal_the_peers_whole():
    theirs, ours = pair(1)
    x = torch.randn(2, 70, 64)
    state, ys = ours.init_state(2, x), []
    for part in x.split([40, 1, 1, 20, 1, 7], dim=1):
        y, state, _ = ours(part, state)
        ys.append(y)
    torch.testing.assert_close(torch.cat(ys, 1), theirs(x), rtol=1e-4, atol=1e-5)


def test_packed_documents_equal_the_peers_separate_ones():
    theirs, ours = pair(2)
    x = torch.randn(1, 100, 64)
    ends = [0, 33, 34, 80, 100]
    want = torch.cat([theirs(x[:, a:b]) for a, b in itertools.pairwise(ends)], 1)
    got = ours(x, None, Ctx.packed(ends)).y
    assert (got - want).norm() / want.norm() <= 1e-5


def test_initial_values():
    block = make_block("mamba2", 512, head_dim=16, dt_min=0.01, dt_max=0.05)
    assert block.A_log.min() >= 0 and block.A_log.exp().max() <= 16 and block.A_log.exp().std() > 2
    dt = F.softplus(block.dt_bias)
    assert dt.min() >= 0.0099 and dt.max() <= 0.0501
    assert (block.D == 1).all() and block.no_decay == ("A_log", "dt_bias", "D")
    floored = make_block("mamba2", 64, dt_min=1e-6, dt_max=1e-6)
    torch.testing.assert_close(F.softplus(floored.dt_bias), torch.full((2,), 1e-4))


def test_dt_limit_clamps():
    free = make_block("mamba2", 32, head_dim=16, state=4)
    tight = make_block("mamba2", 32, head_dim=16, state=4, dt_limit=[0.2, 0.2001])
    tight.load_state_dict(free.state_dict())
    x = torch.randn(1, 9, 32)
    assert not torch.allclose(free(x).y, tight(x).y)
    with torch.no_grad():
        tight.dt_bias.fill_(5.0)  # beyond the limit nothing moves any more
        before = tight(x).y
        tight.dt_bias.fill_(9.0)
    torch.testing.assert_close(tight(x).y, before)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"head_dim": 48}, "head_dim=48 must divide the inner width 128 of dim=64; for example head_dim=32"),
        ({"groups": 3}, "groups=3 must divide the 2 heads"),
        ({"dt_limit": [1.0, 0.5]}, "dt_limit"),
        ({"dt_min": 0.0}, "0 < dt_min"),
        ({"state": 0}, "state=0: must be at least 1"),
    ],
)
def test_bad_parameters_are_explained(params, message):
    with pytest.raises(ValueError, match=message):
        make_block("mamba2", 64, **params)


def test_a_named_backend_that_cannot_serve_is_refused():
    from model.ops.select import BackendError

    with pytest.raises(BackendError, match="fla"):
        make_block("mamba2", 64, backend="fla")(torch.randn(1, 3, 64))


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
def test_mamba2_compiles_without_a_break(packed):
    block = make_block("mamba2", 64, state=16, head_dim=16)
    x = torch.randn(2, 100, 64, requires_grad=True)
    ctx = Ctx.packed([0, 30, 120, 200], rows=2) if packed else None
    compiled = torch.compile(block, fullgraph=True)
    for y, want in ((compiled(x, None, ctx).y, block(x, None, ctx).y),):
        torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)
        g, ref = (torch.autograd.grad(t.square().sum(), [x, *block.parameters()]) for t in (y, want))
        for a, b in zip(g, ref):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
