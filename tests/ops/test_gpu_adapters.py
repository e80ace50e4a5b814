"""Adapters of GPU packages call what the packages have: names, layouts, dtypes and values of every argument.

The packages stand behind `peer_signatures`, recorded from their sources; nothing of them need be installed.
What they compute is checked in the interpreter of Triton (`make oracles`) and on a GPU (`make test-gpu`).
"""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model.core import Docs
from model.ops.attention.flash import attend_flash, supports_flash
from model.ops.conv.causal_conv1d import conv_cuda
from model.ops.linear import fla
from model.ops.select import BackendError, choose
from model.ops.ssd import mamba, ssd
from model.ops.ssd.fla import ssd_fla
from tests.ops import peer_signatures as peers

B, T, H, K, V = 2, 12, 4, 16, 8
DOCS = {
    "whole": None,
    "packed": Docs.packed([0, 5, 12, 13, 24], rows=2),
    "padded": Docs.from_mask(torch.tensor([[0] * 3 + [1] * 9, [1] * 12])),
}
Given = dict[str, Any]


def linear_kernel(given: Given) -> tuple[Tensor, Tensor]:
    """fla: rows, or one row of runs with a state each."""
    q, v, cu, state = (given.get(n) for n in ("q", "v", "cu_seqlens", "initial_state"))
    q = given["r"] if q is None else q
    rows, length = q.shape[:2]
    assert q.shape == given["k"].shape == (rows, length, H, K) and v.shape == (rows, length, H, V)
    assert q.dtype == given["k"].dtype == v.dtype == torch.bfloat16
    for name in ("g", "gk", "w"):
        if given.get(name) is not None:
            assert given[name].shape[:3] == (rows, length, H) and given[name].dtype == torch.float32
    if given.get("beta") is not None:
        assert given["beta"].shape == (rows, length, H)
    if given.get("u") is not None:
        assert given["u"].shape == (H, K)
    runs = rows
    if cu is not None:
        runs = len(cu) - 1
        assert rows == 1 and cu.dtype == torch.int64 and (cu[0], cu[-1]) == (0, length)
    assert state is None or (state.shape == (runs, H, K, V) and state.dtype == torch.float32)
    assert given["output_final_state"] is True and isinstance(given["scale"], float)
    assert not given.get("state_v_first") and not given.get("reverse")
    return torch.zeros_like(v), torch.zeros(runs, H, K, V)


def mamba_kernel(given: Given) -> Any:
    x, b, c, seq, state = (given[n] for n in ("x", "B", "C", "seq_idx", "initial_states"))
    assert x.shape == (B, T, H, V) and b.shape == c.shape == (B, T, 2, K)
    assert x.dtype == b.dtype == c.dtype == torch.bfloat16
    assert given["dt"].shape == (B, T, H) and given["A"].shape == (H,)
    assert given["dt"].dtype == given["A"].dtype == torch.float32
    assert not given["dt_softplus"] and given["D"] is given["z"] is given["dt_bias"] is None
    assert isinstance(given["chunk_size"], int) and (seq is None or state is None)
    assert seq is None or (seq.shape == (B, T) and seq.dtype == torch.int32 and seq.is_contiguous())
    assert seq is None or int(seq.min()) >= 0
    assert state is None or (state.shape == (B, H, V, K) and state.is_contiguous())
    out = torch.zeros_like(x)
    return (out, torch.zeros(B, H, V, K)) if given["return_final_states"] else out


def conv_kernel(given: Given) -> Any:
    x, seq, state = given["x"], given["seq_idx"], given["initial_states"]
    assert x.shape == (B, 16, T) and x.stride(1) == 1 and given["weight"].shape == (16, 4)
    assert x.dtype == given["weight"].dtype == given["bias"].dtype == torch.bfloat16
    assert given["activation"] in (None, "silu", "swish") and (seq is None or state is None)
    assert seq is None or (seq.shape == (B, T) and seq.dtype == torch.int32 and seq.is_contiguous())
    assert state is None or (state.shape == (B, 16, 3) and state.stride(1) == 1)
    out = torch.zeros_like(x)
    return (out, x.new_zeros(B, 16, 3)) if given["return_final_states"] else out


def flash_kernel(given: Given) -> Tensor:
    q, k, v, cu = given["q"], given["k"], given["v"], given.get("cu_seqlens_q")
    lead = (B, T) if cu is None else (B * T,)
    assert q.shape == (*lead, H, K) and k.shape == v.shape == (*lead, 2, K)
    assert given["causal"] is True and given["window_size"] in ((-1, -1), (4, 0))
    assert given["alibi_slopes"] is None or given["alibi_slopes"].dtype == torch.float32
    assert cu is None or (cu.dtype == torch.int32 and given["max_seqlen_q"] >= int(cu.diff().max()))
    return torch.zeros_like(q)


CHECKS = {
    "fla": linear_kernel,
    "mamba_ssm": mamba_kernel,
    "causal_conv1d": conv_kernel,
    "flash_attn": flash_kernel,
}


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the packages' functions that were called, with arguments that they take."""
    calls: list[str] = []

    def stand_in(dotted: str) -> Callable[..., Any]:
        signature = peers.parameters(dotted)

        def function(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            assert not bound.arguments.get("rest"), f"{dotted} swallows {bound.arguments['rest']}"
            calls.append(dotted.split(":")[1])
            return CHECKS[dotted.split(".")[0].split(":")[0]](bound.arguments)

        return function

    for dotted in peers.RECORDED:
        module, name = dotted.split(":")
        module += ".ssd_combined" if module.startswith("mamba_ssm") else ""
        parts = module.split(".")
        for i in range(1, len(parts) + 1):
            path = ".".join(parts[:i])
            if not isinstance(sys.modules.get(path), StandIn):
                monkeypatch.setitem(sys.modules, path, StandIn(path))
        setattr(sys.modules[module], name, stand_in(dotted))
    return calls


class StandIn(types.ModuleType):
    """A package that is not there."""


def tensors(layout: str, length: int = T) -> tuple[Docs | None, Given]:
    torch.manual_seed(0)
    shapes = {"q": (H, K), "k": (H, K), "v": (H, V), "g": (H, K), "beta": (H,)}
    made = {n: torch.randn(B, length, *s).bfloat16() for n, s in shapes.items()}
    made["g"] = -made["g"].float().exp()
    return DOCS[layout], made


@pytest.mark.parametrize("layout", DOCS)
@pytest.mark.parametrize("stateful", [False, True])
def test_fla_is_called_as_it_is_written(layout: str, stateful: bool, called: list[str]) -> None:
    docs, x = tensors(layout)
    q, k, v, g, beta = (x[n] for n in ("q", "k", "v", "g", "beta"))
    kw = {"scale": 0.25, "state": torch.zeros(B, H, K, V) if stateful else None, "docs": docs}
    fla.gla_fla(q, k, v, g, **kw)
    fla.rwkv6_fla(q, k, v, g, u=torch.zeros(H, K), **kw)
    fla.delta_fla(q, k, v, None, beta=beta, **kw)
    fla.delta_fla(q, k, v, g[..., 0], beta=beta, **kw)
    fla.delta_fla(q, k, v, g, beta=beta, **kw)
    y, last = ssd_fla(v, g[..., 0], k, q, state=kw["state"], docs=docs, want_state=True)
    assert y.shape == v.shape and last is not None and last.shape == (B, H, K, V)
    rules = ["chunk_delta_rule", "chunk_gated_delta_rule", "chunk_kda"]
    assert called == ["chunk_gla", "chunk_rwkv6", *rules, "chunk_simple_gla"]
    if docs is None:
        called.clear()
        q, k, v, g, beta = (t[:, :1] for t in (q, k, v, g, beta))
        fla.gla_fla(q, k, v, g, **kw)
        fla.rwkv6_fla(q, k, v, g, u=torch.zeros(H, K), **kw)
        fla.delta_fla(q, k, v, None, beta=beta, **kw)
        fla.delta_fla(q, k, v, g[..., 0], beta=beta, **kw)
        fla.delta_fla(q, k, v, g, beta=beta, **kw)
        assert called == ["fused_recurrent_gla", "fused_recurrent_rwkv6"] + [
            name.replace("chunk", "fused_recurrent") for name in rules
        ]
        called.clear()  # the gated recurrent kernels have no gradient
        fla.delta_fla(q, k, v, g[..., 0].requires_grad_(), beta=beta, **kw)
        fla.delta_fla(q.requires_grad_(), k, v, g, beta=beta, **kw)
        with torch.no_grad():
            fla.delta_fla(q, k, v, g, beta=beta, **kw)
        assert called == [*rules[1:], "fused_recurrent_kda"]


@pytest.mark.parametrize(
    ("layout", "stateful"), [("whole", False), ("whole", True), ("packed", False), ("padded", False)]
)
def test_mamba_ssm_is_called_as_it_is_written(layout: str, stateful: bool, called: list[str]) -> None:
    docs, x = tensors(layout)
    u, b = x["v"], x["q"][:, :, :2]
    dt, A = x["beta"].float().sigmoid(), -torch.ones(H)
    state = torch.zeros(B, H, K, V) if stateful else None
    y, last = mamba.ssd_mamba(
        u * dt[..., None].bfloat16(),
        dt * A,
        b,
        b,
        state=state,
        docs=docs,
        want_state=stateful,
        step=(u, dt, A),
    )
    assert y.shape == u.shape and (last is None) == (not stateful)
    assert last is None or last.shape == (B, H, K, V)
    assert called == ["mamba_chunk_scan_combined"]


def test_mamba_ssm_says_what_it_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(B, T, H, V)
    assert "needs CUDA" in (mamba.refusal(x, step=(x, x, x)) or "")
    monkeypatch.setattr(mamba, "needs_cuda", lambda x: None)
    assert "step" in (mamba.refusal(x) or "")
    assert mamba.refusal(x, step=(x, x, x), docs=DOCS["packed"]) is None
    assert "state across" in (mamba.refusal(x, step=(x, x, x), docs=DOCS["packed"], want_state=True) or "")
    with pytest.raises(BackendError, match="mamba_ssm: "):
        ssd(x, x[..., 0], x[:, :, :2], x[:, :, :2], backend="mamba_ssm")


@pytest.mark.parametrize(
    ("layout", "stateful"), [("whole", False), ("whole", True), ("packed", False), ("padded", False)]
)
def test_causal_conv1d_is_called_as_it_is_written(layout: str, stateful: bool, called: list[str]) -> None:
    x = torch.randn(B, T, 16).bfloat16()
    state = torch.zeros(B, 16, 3) if stateful else None
    y, last = conv_cuda(
        x, torch.zeros(16, 4), torch.zeros(16), "silu", state=state, docs=DOCS[layout], want_state=stateful
    )
    assert y.shape == x.shape and (last is None or last.shape == (B, 16, 3))
    assert called == ["causal_conv1d_fn"]


@pytest.mark.parametrize("layout", DOCS)
@pytest.mark.parametrize("window", [None, 5])
def test_flash_attn_is_called_as_it_is_written(layout: str, window: int | None, called: list[str]) -> None:
    q, k = torch.randn(B, T, H, K).bfloat16(), torch.randn(B, T, 2, K).bfloat16()
    y = attend_flash(q, k, k, docs=DOCS[layout], window=window, scale=0.5, slopes=torch.ones(H))
    assert y.shape == q.shape
    assert called == ["flash_attn_func" if layout == "whole" else "flash_attn_varlen_func"]


@pytest.mark.parametrize("package", peers.VERSIONS)
def test_recorded_signatures_are_those_of_an_installed_package(package: str) -> None:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"{package} is not installed")
    found = peers.found_in(Path(spec.origin).parents[1])
    mine = {n: s for n, s in peers.RECORDED.items() if n.split(".")[0].split(":")[0] == package}
    assert {n: found.get(n) for n in mine} == mine


class OnCuda:
    """As much of a CUDA tensor as a refusal looks at."""

    is_cuda = True

    def __init__(self, x: Tensor) -> None:
        self.shape, self.dtype = x.shape, x.dtype
        self.numel, self.element_size = x.numel, x.element_size


def test_kernels_say_what_they_cannot_do() -> None:
    x: Any = OnCuda(torch.zeros(B, T, H, V).bfloat16())
    for refused in (fla.delta_refusal, fla.gated_delta_refusal):
        assert refused(x, docs=None, width=256) is None
        assert "up to 256 channels, got 320" in (refused(x, docs=None, width=320) or "")
    assert supports_flash(x, v=x) is None
    for shape in ((B, 0, H, V), (0, T, H, V)):
        empty: Any = OnCuda(torch.zeros(shape).bfloat16())
        assert "nothing to launch" in (supports_flash(empty, v=empty, docs=DOCS["packed"]) or "")


def test_auto_never_takes_a_gpu_backend_for_cpu_tensors() -> None:
    x = torch.zeros(B, T, H, V)
    assert choose("ssd", "auto", x, docs=None, state=None, want_state=False, step=(x, x, x)).name == "chunked"
