"""The delta rule: what it means, its reductions, and the adapter of the GPU kernels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from model.core import Docs
from model.ops.linear import delta_rule, fla, gla
from model.ops.linear.reference import recurrence

from .linear_cases import OPS, assert_close, make_call, random_docs, results


def test_gates_reduce_to_one_another() -> None:
    """No decay is DeltaNet; one decay in every channel is Gated DeltaNet; beta 0 is pure decay."""
    call = make_call("gated_delta", 2, 100, docs=random_docs(2, 100, 3))
    q, k, v, beta, g = call.args
    with_ = {"state": call.state, "docs": call.docs}
    none = delta_rule(q, k, v, beta, **with_)
    assert_close(list(delta_rule(q, k, v, beta, torch.zeros_like(g), **with_)), list(none), 1e-12)
    scalar = delta_rule(q, k, v, beta, g, **with_)
    assert_close(list(delta_rule(q, k, v, beta, g[..., None].expand_as(k), **with_)), list(scalar), 1e-12)
    still = delta_rule(q, k, v, torch.zeros_like(beta), g, **with_)
    assert_close(list(still), list(gla(q, k, torch.zeros_like(v), g, **with_)), 1e-12)


def test_orthogonal_keys_make_it_linear_attention() -> None:
    K = 8
    k = torch.eye(K, dtype=torch.float64)[None, :, None]
    q, v = torch.randn(1, K, 1, K).double(), torch.randn(1, K, 1, 5).double()
    beta = torch.rand(1, K, 1).double()
    o, last = delta_rule(q, k, v, beta)
    o2, last2 = gla(q, k, v * beta[..., None], torch.zeros(1, K, 1).double())
    assert_close([o, last], [o2, last2], 1e-12)


def test_a_written_key_is_read_back_and_overwritten() -> None:
    """beta = 1 and a unit key: reading k returns the last v written under it; K orthonormal keys lossless."""
    K, V = 16, 4
    keys = torch.linalg.qr(torch.randn(K, K).double())[0]
    order = torch.randint(K, (1, 70))
    k, v = keys[order][:, :, None], torch.randn(1, 70, 1, V).double()
    _, S = delta_rule(k, k, v, torch.ones(1, 70, 1).double(), scale=1.0)
    for i in set(order[0].tolist()):
        last = (order[0] == i).nonzero().max()
        assert_close([keys[i] @ S[0, 0]], [v[0, last, 0]], 1e-10)


def test_beta_two_reflects_and_stays_bounded() -> None:
    k = F.normalize(torch.randn(1, 500, 1, 8), dim=-1)
    S0 = torch.randn(1, 1, 8, 8)
    _, S = delta_rule(k, k, torch.zeros(1, 500, 1, 8), torch.full((1, 500, 1), 2.0), state=S0)
    assert torch.allclose(S.norm(), S0.norm(), rtol=1e-4), "I - 2 k k' is a reflection"


@pytest.mark.parametrize("op", ["gla", "rwkv6", "delta", "gated_delta", "kda"])
@pytest.mark.parametrize("T", [1, 40])
@pytest.mark.parametrize("layout", ["whole", "packed", "padded"])
def test_adapter_of_fla_keeps_documents_and_states(op: str, T: int, layout: str, monkeypatch) -> None:
    """A stand-in with fla's interface (rows, or runs of cu_seqlens with one state each) in its place."""
    if layout == "packed" and T == 40:
        docs = Docs.packed([0, 7, 40, 41, 80], rows=2)
    elif layout == "padded":
        mask = torch.ones(2, T)
        mask[0, : T // 2], mask[1] = 0, 0
        docs = Docs.from_mask(mask)
    else:
        docs = None
    call = make_call(op, 2, T, docs=docs)
    called = []

    def kernel(module: str, name: str):
        called.append(name)

        def run(
            q, k, v, g=None, beta=None, *u, gk=None,
            scale, initial_state, output_final_state, cu_seqlens=None,
        ):  # fmt: skip
            assert output_final_state
            if op == "delta":
                g, beta = None, g
            bonus = beta if op == "rwkv6" else None
            beta, g = (None if op in ("gla", "rwkv6") else beta), (gk if g is None else g)
            runs = None
            if cu_seqlens is not None:
                assert q.shape[0] == 1 and (
                    initial_state is None or len(initial_state) == len(cu_seqlens) - 1
                )
                runs = list(zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:]))
            outs, ends = [], []
            for i, (row, a, b) in enumerate(
                [(0, a, b) for a, b in runs] if runs else [(r, 0, q.shape[1]) for r in range(q.shape[0])]
            ):
                cut = [None if x is None else x[row : row + 1, a:b] for x in (q, k, v, g, beta)]
                S = None if initial_state is None else initial_state[i : i + 1]
                o, S = recurrence(*cut[:4], beta=cut[4], u=bonus, scale=scale, state=S)
                outs.append(o)
                ends.append(S)
            return torch.cat(outs, 1 if runs else 0), torch.cat(ends)

        return run

    monkeypatch.setattr(fla, "_kernel", kernel)
    call, want = call.to(torch.float32), results(call, "reference")
    fn = {"gla": fla.gla_fla, "rwkv6": fla.rwkv6_fla}.get(op, fla.delta_fla)
    scale = 1.0 if op == "rwkv6" else call.args[0].shape[-1] ** -0.5

    def adapted(*args, state, docs, backend):
        if op in ("gla", "rwkv6"):
            extra = {"u": args[4]} if op == "rwkv6" else {}
            return fn(*args[:4], **extra, scale=scale, state=state, docs=docs)
        g = args[4] if len(args) > 4 else None
        return fn(*args[:3], g, beta=args[3], scale=scale, state=state, docs=docs)

    monkeypatch.setitem(OPS, op, adapted)
    assert_close(results(call), want, 1e-4)
    recurrent = T == 1 and op not in ("gated_delta", "kda")  # whose recurrent kernels have no gradient
    assert called and called[0].startswith("fused_recurrent" if recurrent else "chunk")
