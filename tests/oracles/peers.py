"""Who is compared with whom: for every operator and block, ours and the peer's, on the same leaves.

Shape legend: B batch  T time  H heads  G groups  K key width  V value width  N state width  P head width

A pair is (ours, theirs, leaves): `ours(backend)` and `theirs` are functions of the leaves that give the
output and any states, in our layout. `docs` is None (two rows with an initial state where there is one) or
one row of packed documents.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import fla.layers  # before the kernels are patched, although the adapters import them only when called
import fla.ops
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.blocks._windows import make_windows, take
from model.core import Ctx, Docs
from model.ops import linear
from model.ops.attention import Places, attend
from model.ops.conv import causal_conv
from model.ops.linear import fla as adapters
from model.ops.nsa import Grid, Pooled, nsa
from model.ops.ssd import ssd
from model.ops.ssd.fla import ssd_fla
from model.ops.ssd.mamba import ssd_mamba
from model.registry import make_block

Fn = Callable[..., tuple[Tensor, ...]]
Pair = tuple[Callable[[str], Fn], Fn, list[Tensor]]

T, H, K = 80, 2, 32
PACKED = [0, 1, 30, 31, T]
PAIRS: dict[tuple[str, str], Callable[[Docs | None], Pair]] = {}


def pair(name: str, peer: str) -> Callable[[Callable[[Docs | None], Pair]], Any]:
    def add(build: Callable[[Docs | None], Pair]) -> Any:
        PAIRS[name, peer] = build
        return build

    return add


def _leaves(docs: Docs | None, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Random leaves; a leading 0 in a shape stands for the number of rows."""
    torch.manual_seed(0)
    rows = 1 if docs is not None else 2
    return [torch.randn(rows if s[0] == 0 else s[0], *s[1:]).requires_grad_() for s in shapes]


def _log_decay(x: Tensor) -> Tensor:
    return F.logsigmoid(x + 2)


QKV, HEAD, STATE = (0, T, H, K), (0, T, H), (0, H, K, K)


@pair("gla", "fla chunk_gla")
def _gla(docs: Docs | None) -> Pair:
    def ours(backend: str) -> Fn:
        return lambda q, k, v, g, S: linear.gla(q, k, v, _log_decay(g), state=S, docs=docs, backend=backend)

    def theirs(q, k, v, g, S):
        return adapters.gla_fla(q, k, v, _log_decay(g), scale=K**-0.5, state=S, docs=docs)

    return ours, theirs, _leaves(docs, QKV, QKV, QKV, QKV, STATE)


@pair("retention, ssd", "fla chunk_simple_gla")
def _retention(docs: Docs | None) -> Pair:
    def ours(backend: str) -> Fn:
        return lambda q, k, v, g, S: ssd(
            v, _log_decay(g), k, q, state=S, docs=docs, want_state=True, backend=backend
        )

    def theirs(q, k, v, g, S):
        return ssd_fla(v, _log_decay(g), k, q, state=S, docs=docs, want_state=True)

    return ours, theirs, _leaves(docs, QKV, QKV, QKV, HEAD, STATE)


@pair("rwkv6", "fla chunk_rwkv6")
def _rwkv6(docs: Docs | None) -> Pair:
    def ours(backend: str) -> Fn:
        return lambda r, k, v, w, u, S: linear.rwkv6(
            r, k, v, _log_decay(w), u, state=S, docs=docs, backend=backend
        )

    def theirs(r, k, v, w, u, S):
        return adapters.rwkv6_fla(r, k, v, _log_decay(w), u=u, scale=1.0, state=S, docs=docs)

    return ours, theirs, _leaves(docs, QKV, QKV, QKV, QKV, (H, K), STATE)


def _delta_pair(docs: Docs | None, gate: tuple[int, ...] | None) -> Pair:
    """The ungated rule is compared with the gated kernel at g = 0: its own kernel has no fp32."""

    def unpack(q, k, v, beta, S, g=None):
        return q, F.normalize(k, dim=-1), v, beta.sigmoid(), S, None if g is None else _log_decay(g)

    def ours(backend: str) -> Fn:
        def run(*leaves):
            q, k, v, beta, S, g = unpack(*leaves)
            return linear.delta_rule(q, k, v, beta, g, state=S, docs=docs, backend=backend)

        return run

    def theirs(*leaves):
        q, k, v, beta, S, g = unpack(*leaves)
        g = torch.zeros_like(beta) if g is None else g
        return adapters.delta_fla(q, k, v, g, beta=beta, scale=K**-0.5, state=S, docs=docs)

    return ours, theirs, _leaves(docs, QKV, QKV, QKV, HEAD, STATE, *([] if gate is None else [gate]))


pair("delta rule", "fla chunk_gated_delta_rule, g = 0")(lambda docs: _delta_pair(docs, None))
pair("gated delta rule", "fla chunk_gated_delta_rule")(lambda docs: _delta_pair(docs, HEAD))
pair("kda", "fla chunk_kda")(lambda docs: _delta_pair(docs, QKV))


@pair("ssd", "mamba_ssm mamba_chunk_scan_combined")
def _mamba(docs: Docs | None) -> Pair:
    """Packed: no initial state; the peer needs seq_idx to reset at all, and cu_seqlens for the states."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    G, N = 1, 16

    def ours(backend: str) -> Fn:
        def run(x, dt, A_log, b, c, D, *S):
            dt = F.softplus(dt)
            start = S[0].mT.contiguous() if S else None
            log_a = dt * -A_log.exp()
            y, last = ssd(
                x * dt[..., None], log_a, b, c, state=start, docs=docs, want_state=True, backend=backend
            )
            return y + x * D[:, None], last

        return run

    def theirs(x, dt, A_log, b, c, D, *S):
        def scan(*args, **kwargs):
            return mamba_chunk_scan_combined(*args, chunk_size=32, D=D, dt_softplus=True, **kwargs)

        args = (x, dt, -A_log.exp(), b, c)
        if docs is None:
            y, last = scan(*args, initial_states=S[0], return_final_states=True)
            return y, last.mT
        seq = docs.segments.int()
        with torch.no_grad():  # its states of packed documents have no gradient
            _, ends = scan(*args, seq_idx=seq, cu_seqlens=docs.cu_seqlens.int(), return_varlen_states=True)
        return scan(*args, seq_idx=seq), ends[-1:].mT

    shapes = [QKV, HEAD, (H,), (0, T, G, N), (0, T, G, N), (H,)]
    leaves = _leaves(docs, *shapes, *([] if docs is not None else [(0, H, K, N)]))
    return ours, theirs, leaves


@pair("ssd, by its adapter", "mamba_ssm mamba_chunk_scan_combined")
def _mamba_adapter(docs: Docs | None) -> Pair:
    G, N = 1, 16

    def run(op: Callable[..., Any]) -> Fn:
        def call(x, dt, A_log, b, c, *S):
            dt, A = F.softplus(dt), -A_log.exp()
            state = S[0] if S else None
            y, last = op(
                x * dt[..., None], dt * A, b, c, state=state, docs=docs, want_state=bool(S), step=(x, dt, A)
            )
            return (y,) if last is None else (y, last)

        return call

    shapes = [QKV, HEAD, (H,), (0, T, G, N), (0, T, G, N)]
    leaves = _leaves(docs, *shapes, *([] if docs is not None else [(0, H, N, K)]))
    return lambda backend: run(functools.partial(ssd, backend=backend)), run(ssd_mamba), leaves


@pair("sliding window", "fla parallel_attn")
def _window(docs: Docs | None) -> Pair:
    from fla.ops.attn import parallel_attn

    def ours(backend: str) -> Fn:
        name = "cpu" if backend == "chunked" else backend
        return lambda q, k, v: (attend(q, k, v, docs=docs, window=16, backend=name),)

    def theirs(q, k, v):
        cu = None if docs is None else docs.cu_seqlens.long()
        return (parallel_attn(q, k, v, window_size=16, cu_seqlens=cu),)

    return ours, theirs, _leaves(docs, QKV, (0, T, 1, K), (0, T, 1, K))


@pair("nsa", "fla naive_nsa")
def _nsa(docs: Docs | None) -> Pair:
    """The pooled and the selected branch with a gate each; its window needs flash-attn."""
    from fla.ops.nsa import naive

    grid, heads = Grid(8, 8, 8, 4), 16 * H  # the peer takes groups of 16
    rows = 1 if docs is not None else 2

    def ours(backend: str) -> Fn:
        backend = "reference" if backend == "reference" else "auto"

        def run(q, k, v, near_gate, far_gate):
            known = docs or Docs.whole(rows, T)
            at, windows = Places.of(known), make_windows(known, None, 8, 8, rows, T, q.device)
            pooled = [take(F.pad(t, (0, 0, 0, 0, 7, 0)), windows.members).mean(2) for t in (k, v)]
            near, far = nsa(
                q, k, v, Pooled(*pooled, windows.at, windows.number), grid=grid, at=at, key_at=at,
                backend=backend,
            )  # fmt: skip
            return (near * near_gate[..., None] + far * far_gate[..., None],)

        return run

    def theirs(q, k, v, near_gate, far_gate):
        cu = None if docs is None else docs.cu_seqlens.long()
        naive.range = range  # the shim's is for kernels
        return (naive.naive_nsa(q, k, v, near_gate, far_gate, block_counts=4, block_size=8, cu_seqlens=cu),)

    gate = (0, T, heads)
    return ours, theirs, _leaves(docs, (0, T, heads, K), QKV, QKV, gate, gate)


def _conv_ours(docs: Docs | None, stateful: bool) -> Callable[[str], Fn]:
    def ours(backend: str) -> Fn:
        name = "shifts" if backend == "chunked" else backend

        def run(x, weight, bias, *S):
            y, last = causal_conv(
                x, weight, bias, activation="silu", state=S[0] if S else None, docs=docs,
                want_state=stateful, backend=name,
            )  # fmt: skip
            return (y, last) if last is not None else (y,)

        return run

    return ours


@pair("convolution", "fla causal_conv1d")
def _conv(docs: Docs | None) -> Pair:
    from fla.modules.causal_conv1d import causal_conv1d

    def theirs(x, weight, bias):
        cu = None if docs is None else docs.cu_seqlens.long()
        return (causal_conv1d(x, weight, bias, activation="silu", cu_seqlens=cu)[0],)

    return _conv_ours(docs, False), theirs, _leaves(docs, (0, T, 64), (64, 4), (64,))


@pair("convolution", "causal_conv1d causal_conv1d_ref")
def _conv_ref(docs: Docs | None) -> Pair:
    from causal_conv1d.causal_conv1d_interface import causal_conv1d_ref

    def theirs(x, weight, bias, *S):
        if docs is not None:
            cuts = docs.cu_seqlens.tolist()
            runs = [x[:, a:b].mT for a, b in itertools.pairwise(cuts)]
            return (torch.cat([causal_conv1d_ref(r, weight, bias, activation="silu") for r in runs], 2).mT,)
        y, last = causal_conv1d_ref(
            x.mT, weight, bias, initial_states=S[0], return_final_states=True, activation="silu"
        )
        return y.mT, last

    state = [] if docs is not None else [(0, 64, 3)]
    return _conv_ours(docs, not docs), theirs, _leaves(docs, (0, T, 64), (64, 4), (64,), *state)


# ----------------------------------------------------------------------------- whole layers


def _interleaved(name: str, weight: Tensor) -> Tensor:
    """YOCO turns neighbouring channels, we turn halves: the same rows of W_q and W_k in another order."""
    if name not in ("q_proj.weight", "k_proj.weight"):
        return weight
    return weight.unflatten(0, (H, 2, -1)).transpose(1, 2).flatten(0, 2)


def _as_it_is(name: str, weight: Tensor) -> Tensor:
    return weight


def _layer(
    name: str,
    peer: str,
    ours_kw: dict[str, Any],
    theirs_kw: dict[str, Any],
    convert: Callable[[str, Tensor], Tensor] = _as_it_is,
) -> None:
    """A block beside fla's layer with the same weights, loaded strictly by name; leaves: x and weights."""

    def build(docs: Docs | None) -> Pair:
        torch.manual_seed(0)
        block = make_block(name, 64, **ours_kw)
        layer = getattr(fla.layers, peer)(hidden_size=64, **theirs_kw)
        layer.load_state_dict(block.state_dict(), strict=True)
        names = list(block.state_dict())
        ctx = None if docs is None else Ctx(docs=docs)
        kwargs = {} if docs is None else {"cu_seqlens": docs.cu_seqlens.long()}

        def ours(backend: str) -> Fn:
            reference = make_block(name, 64, **ours_kw, backend=backend)

            def run(x, *weights):
                reference.to(x.dtype)
                step = torch.func.functional_call(reference, dict(zip(names, weights)), (x, None, ctx))
                return (step.y,)

            return run

        def theirs(x, *weights):
            given = {n: convert(n, w) for n, w in zip(names, weights)}
            return (torch.func.functional_call(layer, given, (x,), kwargs)[0],)

        weights = [nn.Parameter(w.detach() + 0.02 * torch.randn_like(w)) for w in block.state_dict().values()]
        return ours, theirs, [*_leaves(docs, (0, T, 64)), *weights]

    pair(f"block {name}", f"fla {peer}")(build)


_layer("gla", "GatedLinearAttention", {"heads": 2}, {"num_heads": 2})
_layer("retention", "YOCOGatedRetention", {"heads": H}, {"num_heads": H}, _interleaved)
_layer("gated_deltanet", "GatedDeltaNet", {"heads": 3}, {"num_heads": 3, "head_dim": 16, "expand_v": 2})
_layer("kda", "KimiDeltaAttention", {"heads": 2}, {"num_heads": 2, "head_dim": 32})
_layer(
    "rwkv6",
    "RWKV6Attention",
    {"heads": 2, "expand_k": 0.5, "norm_eps": 1e-5},
    {"num_heads": 2, "expand_k": 0.5},
)
