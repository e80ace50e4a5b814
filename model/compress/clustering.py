"""Causal clustering of a stream: who joins whom, by similarity, with thresholds from prefix statistics alone.

Token j may join an earlier representative i, never a later one, so nothing a token becomes depends on what
comes after it. Rows never mix, padding never takes part.

Shape legend: B batch  T time  D width  C code width  k values kept of it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def similarity(h: Tensor, attention: Tensor | None, w_a: float, reach: float | None) -> Tensor:
    """S [B, T, T] = ((1 - w_a) cos(h_i, h_j) + w_a (A A^T)_ij) * exp(-|i - j| / reach).

    h [B, T, D]; attention [B, T, T] (rows attend), used where w_a > 0; reach in tokens, None: no decay.
    """
    unit = torch.nn.functional.normalize(h.float(), dim=-1)
    s = unit @ unit.mT
    if w_a > 0:
        assert attention is not None
        s = (1 - w_a) * s + w_a * (attention @ attention.mT)
    if reach is not None:
        t = torch.arange(h.shape[1], device=h.device)
        s = s * torch.exp(-(t[:, None] - t).abs() / reach)
    return s


@torch.no_grad()
def assign(s: Tensor, threshold: Tensor, protect: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Greedy, left to right: a token joins the most similar earlier representative if that exceeds its
    threshold
    and it is not protected; otherwise it becomes a representative.

    s [B, T, T], threshold [B, T], protect and mask bool [B, T] -> member int64 [B, T] (the representative's
    index,
    its own for representatives and padding) and best int64 [B, T] (the most similar earlier representative,
    whether joined or not; its own index where there is none). Ties go to the earlier representative.
    """
    B, T, _ = s.shape
    own = torch.arange(T, device=s.device).expand(B, T)
    member, best = own.clone(), own.clone()
    representative = torch.zeros(B, T, dtype=torch.bool, device=s.device)
    free = mask & ~protect
    for j in range(T):
        if j:
            value, index = s[:, j, :j].masked_fill(~representative[:, :j], float("-inf")).max(1)
            found = ~value.isinf()
            best[:, j] = torch.where(found & mask[:, j], index, best[:, j])
            joins = found & free[:, j] & (value > threshold[:, j])
            member[:, j] = torch.where(joins, index, j)
        representative[:, j] = mask[:, j] & (member[:, j] == j)
    return member, best


def representatives(member: Tensor, mask: Tensor) -> Tensor:
    """bool [B, T]: tokens that stand for themselves."""
    return mask & (member == torch.arange(member.shape[1], device=member.device))


def prefix_quantile(s: Tensor, mask: Tensor, q: float) -> Tensor:
    """[B, T]: quantile q over tokens i <= j of each token's highest similarity to an earlier one;
    0 for the first."""
    B, T, _ = s.shape
    earlier = (
        torch.ones(T, T, dtype=torch.bool, device=s.device).tril(-1) & mask[:, None, :] & mask[:, :, None]
    )
    top = s.masked_fill(~earlier, float("-inf")).amax(-1)
    seen = torch.ones(T, T, dtype=torch.bool, device=s.device).tril() & ~top.isinf()[:, None, :]
    table = top[:, None, :].expand(B, T, T).masked_fill(~seen, float("nan"))
    return table.nanquantile(q, dim=-1).nan_to_num(0.0) if T else top


def prefix_cut(x: Tensor, mask: Tensor) -> Tensor:
    """[B, T]: mean plus standard deviation of x over the tokens before each one; for the first token, its x.

    A token is not among those it is compared with: of two, the greater would lie on the cut exactly.
    """
    given, x = x.dtype, x.double()  # the variance is a small difference
    m = mask.to(x.dtype)
    n = m.cumsum(1) - m
    mean = ((x * m).cumsum(1) - x * m) / n.clamp_min(1)
    square = ((x * x * m).cumsum(1) - x * x * m) / n.clamp_min(1)
    cut = mean + ((square - mean * mean).clamp_min(0) + 1e-12).sqrt()  # the root of 0 has no gradient
    return torch.where(n > 0, cut, x).to(given)


def budget_threshold(s: Tensor, protect: Tensor, mask: Tensor, budget: Tensor, steps: int = 14) -> Tensor:
    """[B] a threshold at which row b has at most budget[b] representatives, found by bisection.

    Raises ValueError where even joining everything that may be joined leaves more.
    """
    low, high = s.new_full(budget.shape, -2.0), s.new_full(budget.shape, 2.0)

    def count(tau: Tensor) -> Tensor:
        member, _ = assign(s, tau[:, None].expand(mask.shape), protect, mask)
        return representatives(member, mask).sum(1)

    fewest = count(low)
    if bool((fewest > budget).any()):
        row = int((fewest - budget).argmax())
        raise ValueError(
            f"{int(budget[row])} slots were asked for and {int(fewest[row])} tokens cannot join a cluster "
            "(protected, or nothing before them)"
        )
    for _ in range(steps):
        middle = (low + high) / 2
        fits = count(middle) <= budget
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
    return torch.where(count(high) <= budget, high, low)


def contrastive(z: Tensor, member: Tensor, mask: Tensor, margin: float) -> Tensor:
    """Mean over rows and pairs of clusters of relu(c_i . c_j - (1 - margin)), c the mean of unit vectors z
    [B, T, P].

    0 for rows of one cluster, and for clusters that are far enough apart.
    """
    T = z.shape[1]
    shown = representatives(member, mask)
    belongs = (member[:, None, :] == torch.arange(T, device=z.device)[:, None]) & mask[:, None, :]
    c = belongs.to(z.dtype) @ z / belongs.sum(-1, keepdim=True).clamp_min(1)
    pairs = shown[:, :, None] & shown[:, None, :] & ~torch.eye(T, dtype=torch.bool, device=z.device)
    excess = torch.relu(c @ c.mT - (1 - margin)) * pairs
    per_row = excess.sum((1, 2)) / pairs.sum((1, 2)).clamp_min(1)
    return per_row.mean()


# ---------------------------------------------------------------------- stored residuals

Code = dict[str, Tensor]  # the tensors of a code, by name, exactly as they are kept


def encode(z: Tensor, sparsity: float, bits: int = 8, levels: int = 1) -> Code:
    """The largest (1 - sparsity) share of each code z [..., C], quantised token by token:
    values uint8 and indices int16 [..., levels, k], scale and low fp32 [..., levels].

    Affine, 2^bits steps (bits <= 8) from the least to the greatest kept value; errors are at most scale / 2.
    Every further level codes what is still missing; one that would not lower a token's error is left out
    (scale and low 0), so that errors never grow. bits 0: `exact`, z itself.
    """
    if not 0 <= bits <= 8:
        raise ValueError(f"residual_bits {bits}: a stored value is one byte, 1 to 8 bits, or 0 for exact")
    if bits == 0:
        return {"exact": z}
    k, back, made = max(1, round(z.shape[-1] * (1 - sparsity))), torch.zeros_like(z, dtype=torch.float32), []
    for _ in range(levels):
        indices = (z - back).abs().topk(k, -1).indices.sort(-1).values
        kept = (z - back).gather(-1, indices).float()
        low = kept.amin(-1)
        scale = ((kept.amax(-1) - low) / (2**bits - 1)).clamp_min(1e-12)
        values = ((kept - low[..., None]) / scale[..., None]).round().clamp(0, 2**bits - 1)
        one = _stacked([(values.to(torch.uint8), indices.to(torch.int16), scale, low)])
        more = back + decode(one, z.shape[-1])
        better = (z - more).norm(dim=-1) < (z - back).norm(dim=-1)
        back = torch.where(better[..., None], more, back)
        made.append((values.to(torch.uint8), indices.to(torch.int16), scale * better, low * better))
    return _stacked(made)


def _stacked(levels: list[tuple[Tensor, Tensor, Tensor, Tensor]]) -> Code:
    values, indices, scale, low = zip(*levels)
    return {
        "values": torch.stack(values, -2),
        "indices": torch.stack(indices, -2),
        "scale": torch.stack(scale, -1),
        "low": torch.stack(low, -1),
    }


def decode(code: Code, width: int) -> Tensor:
    """What `encode` kept, as [..., C] with C = width: the sum of all levels."""
    if "exact" in code:
        return code["exact"]
    v = code["values"].float() * code["scale"][..., None] + code["low"][..., None]
    return v.new_zeros(*v.shape[:-1], width).scatter(-1, code["indices"].long(), v).sum(-2)


def stored(z: Tensor, sparsity: float, bits: int, levels: int = 1) -> Tensor:
    """z [..., C] as it comes back from storage, with a straight-through gradient."""
    with torch.no_grad():
        back = decode(encode(z, sparsity, bits, levels), z.shape[-1])
    return z + (back.to(z.dtype) - z).detach()
