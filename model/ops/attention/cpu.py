"""Attention through torch's SDPA, which is the fastest attention on a CPU and runs on any device.

Shape legend: B batch  T queries  S keys  H query heads  G key/value heads  K key width  V value width
              n blocks of b queries, each with L = (m + 1) b keys

Three forms, the cheapest that serves:
  causal   whole rows: SDPA's own causal mask, which skips the upper half.
  blocked  no query reaches further back than `span` keys: every block of b queries meets its own keys and
           those of the m blocks before, all blocks in one batched SDPA. Linear in T.
  dense    everything else (a cache, one long document among short ones): an explicit [T, S] mask.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

from model.ops.attention import backward
from model.ops.attention.places import Places, resolve, visible
from model.ops.documents import Documents
from model.ops.dtypes import at_least_fp32

MIN_BLOCK = 64  # below this the matmuls are too small to pay for the batch dimension


def attend_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    docs: Documents | None = None,
    at: Places | None = None,
    key_at: Places | None = None,
    window: int | None = None,
    span: int | None = None,
    scale: float | None = None,
    slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    lifetime: Tensor | None = None,
    block: int | None = None,
) -> Tensor:
    """See `attend`. block: queries of a block in the blocked form; None chooses."""
    T, S = q.shape[1], k.shape[1]
    plain = docs is None and at is None and lifetime is None
    if plain and slopes is None and T == S and (window is None or window >= T):
        return _sdpa(q, k, v, scale, None, sinks)
    reach = _reach(docs, plain, window, span) if lifetime is None else None
    b = block or (block_size(reach) if reach is not None else T)
    if reach is not None and b < T:
        places = None if plain else resolve(q, k, docs, at, key_at)
        return _blocked(q, k, v, places, window, reach, b, scale, slopes, sinks)
    at, key_at = resolve(q, k, docs, at, key_at)
    if plain:
        at, key_at = (Places(p.positions[:1], p.segments[:1]) for p in (at, key_at))
    return _sdpa(q, k, v, scale, _mask(at, key_at, window, slopes, q.dtype, lifetime), sinks)


def block_size(reach: int) -> int:
    """Queries of a block for a reach of that many keys: the reach itself up to 256, half of it above.

    Measured at T 4096 (experiments/bench/swa.py): larger blocks waste masked products, smaller ones copy
    every key more often.
    """
    return max(MIN_BLOCK, reach if reach <= 256 else -(-reach // 2))


def _reach(docs: Documents | None, plain: bool, window: int | None, span: int | None) -> int | None:
    """How many keys back, its own included, any query can see by index; None when that is unknown."""
    if docs is not None:
        longest = max(docs.max_len, 1)
        return longest if window is None else min(window, longest)
    return window if plain else span


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, mask: Tensor | None, sinks: Tensor | None
) -> Tensor:
    """SDPA over [B, T, H, K]; no mask means causal. Rows that see nothing give 0."""
    if sinks is not None:
        return _sdpa_with_sinks(q, k, v, scale, mask, sinks)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if backward.serves(q, k, mask):
        return backward.attention(q, k, v, mask, scale).transpose(1, 2)
    gqa = q.shape[1] != k.shape[1]
    y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=gqa)
    return y.transpose(1, 2)


def _sdpa_with_sinks(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, mask: Tensor | None, sinks: Tensor
) -> Tensor:
    """A learned logit per head as one more key, in front: SDPA's mask takes no gradient, its keys do.

    Queries get extra channels that hold sink / scale, the sink key is 1 there and 0 elsewhere, its value 0.
    Under the causal mask an extra first query keeps the diagonal in place.
    """
    K, V = q.shape[-1], v.shape[-1]
    scale = K**-0.5 if scale is None else scale
    more = 8 - K % 8  # the kernel wants aligned, equal widths
    front = int(mask is None)
    extra = F.pad((sinks / scale).to(q.dtype)[:, None], (0, more - 1)).expand(*q.shape[:-1], more)
    q = F.pad(torch.cat([q, extra], dim=-1), (0, 0, 0, 0, front, 0))
    sink_key = F.one_hot(torch.tensor(K, device=k.device), K + more).to(k.dtype)
    k = torch.cat([sink_key.expand(k.shape[0], 1, k.shape[2], -1), F.pad(k, (0, more))], dim=1)
    v = F.pad(v, (0, K + more - V, 0, 0, 1, 0))
    if mask is not None:
        mask = F.pad(mask, (1, 0), value=True if mask.dtype == torch.bool else 0.0)
    return _sdpa(q, k, v, scale, mask, None)[:, front:, :, :V]


def _mask(
    at: Places,
    key_at: Places,
    window: int | None,
    slopes: Tensor | None,
    dtype: torch.dtype,
    lifetime: Tensor | None = None,
) -> Tensor:
    """[B, 1, T, S] bool, or with ALiBi slopes [B, H, T, S] added to the logits."""
    seen = visible(at, key_at, window, lifetime)[:, None]
    if slopes is None:
        return seen
    distance = at.positions[:, None, :, None] - key_at.positions[:, None, None, :]
    bias = -slopes.to(_bias_dtype(dtype))[:, None, None] * distance
    return bias.masked_fill(~seen, float("-inf"))


def _blocked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    places: tuple[Places, Places] | None,
    window: int | None,
    reach: int,
    b: int,
    scale: float | None,
    slopes: Tensor | None,
    sinks: Tensor | None,
) -> Tensor:
    """All blocks in one SDPA: n*B rows of b queries and L keys."""
    B, T, P = q.shape[0], q.shape[1], k.shape[1] - q.shape[1]
    n, m = -(-T // b), -(-(reach - 1) // b)
    if m >= n and P == 0:
        m = n - 1
    left, right = m * b - P, n * b - T  # a longer past than m*b keys is out of reach, so it is cut off

    def blocks(x: Tensor, fill: int = 0) -> Tensor:
        """[B, P+T, ...] -> [B, n, L, ...]: each block behind the m blocks before it."""
        x = x[:, -left:] if left < 0 else x
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (max(left, 0), right), value=fill)
        x = x.unflatten(1, (n + m, b))
        return torch.cat([x[:, j : j + n] for j in range(m + 1)], dim=2)

    if places is None:
        mask = _index_mask(n, b, m, left, window, slopes, q)
        mask = mask.expand(B, *mask.shape).flatten(0, 1)
    else:
        at, key_at = places
        queries = Places(*(F.pad(p, (0, right), value=f).unflatten(1, (n, b)) for p, f in zip(at, (0, -1))))
        keys = Places(blocks(key_at.positions), blocks(key_at.segments, fill=-1))
        queries, keys = (Places(*(p.flatten(0, 1) for p in x)) for x in (queries, keys))
        mask = _mask(queries, keys, window, slopes, q.dtype)
    q = F.pad(q, (0, 0, 0, 0, 0, right)) if right else q
    q, k, v = (x.flatten(0, 1) for x in (q.unflatten(1, (n, b)), blocks(k), blocks(v)))
    y = _sdpa(q, k, v, scale, mask, sinks)
    return y.unflatten(0, (B, n)).flatten(1, 2)[:, :T]


def _index_mask(
    n: int, b: int, m: int, left: int, window: int | None, slopes: Tensor | None, like: Tensor
) -> Tensor:
    """The mask of whole rows, [n, 1, b, L] (or [n, H, b, L] with slopes): distances are index distances."""
    key = torch.arange((m + 1) * b, device=like.device) - m * b
    distance = torch.arange(b, device=like.device)[:, None] - key
    seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    real = torch.arange(n, device=like.device)[:, None] * b + key >= left - m * b
    mask = seen & real[:, None, None, :]
    if slopes is None:
        return mask
    bias = -slopes.to(_bias_dtype(like.dtype))[:, None, None] * distance
    return bias.expand(n, *bias.shape).masked_fill(~mask, float("-inf"))


def _bias_dtype(dtype: torch.dtype) -> torch.dtype:
    """Distances beyond 256 do not survive bf16; SDPA takes an fp32 bias with any queries."""
    return at_least_fp32(dtype)


def attention_flops(
    T: int, heads: int, width: int, window: int | None = None, *, sinks: bool = False, slopes: bool = False
) -> int:
    """FLOPs of a forward over one row of T tokens in one document: every product made, masked or not.

    width: K = V. The kernel of a learned sink works on one more key and wider heads.
    """
    more = int(sinks)
    width += more * (8 - width % 8)
    causal = not slopes and (window is None or window >= T)
    b = T if causal or window is None else min(T, block_size(window))
    if b == T or window is None:
        return 4 * heads * width * (T + more * causal) * (T + more)
    n = -(-T // b)
    m = min(-(-(window - 1) // b), n - 1)
    return 4 * heads * width * n * b * ((m + 1) * b + more)


def _teach_flop_counter() -> None:
    """torch's FlopCounterMode has formulas for the CUDA kernels of SDPA and none for the CPU kernel."""

    def forward(q: tuple, k: tuple, v: tuple, *_: object, out_shape: object = None, **__: object) -> int:
        B, H, T, K = q
        return 2 * B * H * T * k[2] * (K + v[3])

    def backward(grad: tuple, q: tuple, k: tuple, v: tuple, *_: object, **__: object) -> int:
        B, H, T, K = q
        return 2 * B * H * T * k[2] * (3 * K + 2 * v[3])  # scores again, dp, dv, dq, dk

    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    if op not in flop_registry:
        register_flop_formula(op)(forward)
        register_flop_formula(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward)(backward)


_teach_flop_counter()
