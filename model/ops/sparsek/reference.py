"""SparseK attention token by token: what the fast form must equal.

Shape legend: B batch  T time  H query heads  G key/value heads  V value width  M slots  W window
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from model.ops.attention.places import Places
from model.ops.dtypes import at_least_fp32
from model.ops.sparsek.gates import Sizes, SparseKState


def sparsek_reference(
    q: Tensor, k: Tensor, v: Tensor, u: Tensor, *, sizes: Sizes, at: Places, carried: Tensor,
    state: SparseKState | None = None,
) -> tuple[Tensor, SparseKState | None]:  # fmt: skip
    """See `sparsek`. Sums in fp32, or fp64 for fp64 inputs."""
    B, T, H, _ = q.shape
    G = k.shape[2]
    wide = at_least_fp32(q.dtype)
    start = SparseKState.empty(k, v, u, sizes) if state is None else state
    rows, ends = [], []
    for b in range(B):
        tokens = [_unpack(start, b, g, sizes) for g in range(G)]
        document, seen, ys = int(carried[b]), int(start.seen[b]), []
        for t in range(T):
            segment = int(at.segments[b, t])
            if segment < 0:
                ys.append(q.new_zeros(H, v.shape[-1]))
                continue
            if segment != document:
                tokens, document = [([], []) for _ in range(G)], segment
            seen, parts = int(at.positions[b, t]) + 1, []
            for g in range(G):
                far, near = tokens[g]
                near.append((k[b, t, g], v[b, t, g], u[b, t, g]))
                if len(near) > sizes.window:
                    _insert(far, near.pop(0), sizes.slots)
                heads = q[b, t, g * (H // G) : (g + 1) * (H // G)].to(wide)
                parts.append(_attend(heads, far, near, sizes.keep))
            ys.append(torch.cat(parts).to(q.dtype))
        for far, near in tokens:
            if len(near) == sizes.window:  # to the next query it is outside
                _insert(far, near.pop(0), sizes.slots)
        rows.append(torch.stack(ys) if ys else q.new_zeros(0, H, v.shape[-1]))
        ends.append((tokens, seen))
    y = torch.stack(rows)
    return y, None if state is None else _pack(start, ends)


def _insert(far: list, token: tuple[Tensor, Tensor, Tensor], slots: int) -> None:
    """Add a token; when there are too many, the lowest score goes, of equals the latest."""
    far.append(token)
    if len(far) > slots:
        worst = min(range(len(far)), key=lambda j: (float(far[j][2].detach()), -j))
        far.pop(worst)


def _attend(q: Tensor, far: list, near: list, keep: int) -> Tensor:
    """q [R, K] -> [R, V]."""
    p = projection(torch.stack([u for *_, u in far]).to(q.dtype), keep) if far else q.new_zeros(0)
    p = torch.cat([p, p.new_ones(len(near))])
    k, v = (torch.stack([x[i] for x in (*far, *near)]).to(q.dtype) for i in (0, 1))
    logits = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(p <= 0, -torch.inf)
    return (logits.softmax(-1) * p) @ v


def projection(u: Tensor, keep: int) -> Tensor:
    """clip(u - tau, 0, 1) of u [n], sum min(keep, n): a scores at one, those up to b between, by trial."""
    n = len(u)
    if n <= keep:
        return torch.ones_like(u)
    order = u.detach().argsort(descending=True, stable=True)
    s, e = u[order], [float(x) for x in u.detach()[order]]
    for a, b in itertools.combinations_with_replacement(range(n + 1), 2):
        p = torch.cat([s.new_ones(a), s.new_zeros(n - a)])
        if a == b:
            fits = a == keep and e[a - 1] - 1 >= e[a]
        else:
            tau = (s[a:b].sum() + a - keep) / (b - a)
            t = float(tau.detach())
            fits = (a == 0 or e[a - 1] - 1 >= t) and e[a] - 1 < t < e[b - 1] and (b == n or e[b] <= t)
            p = torch.cat([p[:a], s[a:b] - tau, p[b:]])
        if fits:
            return torch.zeros_like(u).index_copy(0, order, p)
    raise AssertionError(f"no threshold for {e}")  # there always is one


def _unpack(state: SparseKState, b: int, g: int, sizes: Sizes) -> tuple[list, list]:
    near = min(int(state.seen[b]), sizes.window - 1)
    far = min(int(state.seen[b]) - near, sizes.slots)
    slots = [(state.k[b, j, g], state.v[b, j, g], state.u[b, j, g]) for j in range(far)]
    first = sizes.window - 1 - near
    return slots, [
        (state.near_k[b, j, g], state.near_v[b, j, g], state.near_u[b, j, g])
        for j in range(first, sizes.window - 1)
    ]


def _pack(like: SparseKState, ends: list) -> SparseKState:
    def table(part: int, which: int, old: Tensor) -> Tensor:
        rows = []
        for tokens, _ in ends:
            groups = []
            for far, near in tokens:
                values = [x[which] for x in (near if part else far)]
                blank = [old.new_zeros(old.shape[3:])] * (old.shape[1] - len(values))
                values = [*values, *blank] if part == 0 else [*blank, *values]
                groups.append(torch.stack([x.to(old.dtype) for x in values]) if values else old[0, :, 0])
            rows.append(torch.stack(groups, 1))
        return torch.stack(rows)

    slots = [table(0, i, like[i]) for i in range(3)]
    near = [table(1, i, like[3 + i]) for i in range(3)]
    seen = torch.tensor([seen for _, seen in ends], device=like.seen.device)
    return SparseKState._make([*slots, *near, seen])
