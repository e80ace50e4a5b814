"""Output layer and cross-entropy in one, without ever holding the logits of a batch.

Shape legend: N tokens  D model width  V vocabulary  R rows of a chunk
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.ops.dtypes import at_least_fp32
from model.ops.loss.forms import KINDS, TokenLoss

__all__ = ["IGNORE", "KINDS", "TokenLoss", "linear_argmax", "linear_cross_entropy", "linear_token_loss"]

IGNORE = -100
MIN_ROWS = 1024  # smaller chunks cost time: the weight gradient is read and written once a chunk
CHUNK_LOGITS = 1 << 24  # logits of a chunk when the vocabulary is small: 64 MiB in fp32
TILE_LOGITS = 1 << 19  # logits between two matmuls are worked on in tiles of 2 MiB, which a cache holds
CE = TokenLoss()


def linear_cross_entropy(
    h: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    ignore: int = IGNORE,
    reduction: str = "sum",
    chunk: int | None = None,
) -> Tensor:
    """Weighted cross-entropy of `targets` under logits h @ weight' + bias, in nats, fp32 (fp64 for fp64 h).

        loss_n = weights_n * (lse_n - logit_n[target_n]),   lse = log sum exp logits

    h [N, D], weight [V, D], targets [N] int64 (`ignore`: no loss, no gradient), weights [N] or None for 1,
    bias [V] or None. Matmuls run in h's dtype (autocast's, where it is on), log-sum-exp in fp32.

    reduction: "sum" gives the 0-d sum. Its gradients to h, weight and bias, those that are wanted, are
               made in the forward pass, chunk by chunk; they cannot be differentiated again.
               "none" gives [N] losses without gradient, 0 where ignored.
    chunk:     rows at a time; None is 1024, or more where the vocabulary is small.
    Raises ValueError for shapes that do not fit.
    """
    if reduction not in ("sum", "none"):
        raise ValueError(f"reduction={reduction!r}: must be 'sum' or 'none'")
    safe, scale, rows = _prepare(h, weight, targets, weights, ignore, chunk)
    if reduction == "none":
        with torch.no_grad():
            return _losses(h, weight, bias, safe, scale, CE, rows)[0]
    return _sum(h, weight, bias, safe, scale, CE, rows)[0]


def linear_token_loss(
    h: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    *,
    form: TokenLoss,
    bias: Tensor | None = None,
    ignore: int = IGNORE,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(sum of the losses of that form, sum of the cross-entropies without gradient), both 0-d, weighted.

    Otherwise as `linear_cross_entropy` with reduction "sum", which the neutral form is bit for bit.
    """
    safe, scale, rows = _prepare(h, weight, targets, weights, ignore, chunk)
    return _sum(h, weight, bias, safe, scale, form.settled, rows)


def _prepare(
    h: Tensor, weight: Tensor, targets: Tensor, weights: Tensor | None, ignore: int, chunk: int | None
) -> tuple[Tensor, Tensor, int]:
    """(targets that can be looked up [N], weight of each loss [N], rows of a chunk). Raises ValueError."""
    if h.dim() != 2 or weight.dim() != 2 or h.shape[1] != weight.shape[1] or targets.shape != h.shape[:1]:
        raise ValueError(
            "linear_cross_entropy: want h [N, D], weight [V, D], targets [N]; got "
            f"{list(h.shape)}, {list(weight.shape)}, {list(targets.shape)}"
        )
    if weights is not None and weights.shape != targets.shape:
        raise ValueError(f"weights must be [N] = {list(targets.shape)}, got {list(weights.shape)}")
    kept = (targets != ignore).to(at_least_fp32(h.dtype))
    scale = kept if weights is None else kept * weights.detach()
    safe = torch.where(targets == ignore, 0, targets)
    return safe, scale, chunk or max(MIN_ROWS, CHUNK_LOGITS // weight.shape[0])


def _sum(
    h: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, scale: Tensor, form: TokenLoss, rows: int
) -> tuple[Tensor, Tensor]:
    inputs = (h, weight, bias)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        total, ce = _SumLoss.apply(h, weight, bias, targets, scale, form, rows)
        return total, ce.detach()
    losses, ce = _losses(h, weight, bias, targets, scale, form, rows)
    return losses.sum(), ce.sum()


def linear_argmax(h: Tensor, weight: Tensor, bias: Tensor | None = None, chunk: int | None = None) -> Tensor:
    """[N] int64: the likeliest token of each row, by chunks as above. No gradient."""
    rows = chunk or max(MIN_ROWS, CHUNK_LOGITS // weight.shape[0])
    with torch.no_grad(), _no_autocast(h):
        h, weight = _operands(h, weight)
        parts = [_logits(part, weight, bias).argmax(-1) for part in h.split(rows)]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64, device=h.device)


def _no_autocast(x: Tensor) -> torch.autocast:
    return torch.autocast(x.device.type, enabled=False)


def _operands(h: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both matmul operands in one dtype."""
    device = h.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else h.dtype
    return h.to(dtype), weight.to(dtype)


def _logits(h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[R, V] in fp32 or fp64, freshly made: the caller may write into it."""
    logits = torch.mm(h, weight.t()).to(at_least_fp32(h.dtype))
    return logits if bias is None else logits.add_(bias)


class _Chunk(NamedTuple):
    """Losses [R] and cross-entropies [R], weighted; log-sum-exp [R]; d loss / d ce [R], None for 1."""

    loss: Tensor
    ce: Tensor
    lse: Tensor
    factor: Tensor | None


def _chunk_losses(logits: Tensor, targets: Tensor, scale: Tensor, form: TokenLoss) -> _Chunk:
    lse = logits.logsumexp(-1)
    ce = lse - logits.gather(1, targets[:, None])[:, 0]
    loss, factor = form.of(ce, logits, lse)
    if factor is not None:  # of a token without a loss it may have overflown, and inf * 0 is nan
        factor = torch.where(scale != 0, factor, 0.0)
    if form.z:
        loss = loss + form.z * lse.square()
    weighted = torch.where(scale != 0, loss * scale, 0.0)
    return _Chunk(weighted, weighted if loss is ce else torch.where(scale != 0, ce * scale, 0.0), lse, factor)


def _losses(
    h: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, scale: Tensor, form: TokenLoss, rows: int
) -> tuple[Tensor, Tensor]:
    """([N] losses, [N] cross-entropies), no gradient."""
    operands = _operands(h, weight)
    out, ce = torch.empty_like(scale), torch.empty_like(scale)
    with _no_autocast(h):
        for i in range(0, h.shape[0], rows):
            part = slice(i, i + rows)
            found = _chunk_losses(
                _logits(operands[0][part], operands[1], bias), targets[part], scale[part], form
            )
            out[part], ce[part] = found.loss, found.ce
    return out, ce


class _SumLoss(torch.autograd.Function):
    """The sum of the losses; the gradients are made while a chunk's logits are at hand."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        h: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        scale: Tensor,
        form: TokenLoss,
        rows: int,
    ) -> tuple[Tensor, Tensor]:
        want_h, want_weight, want_bias = ctx.needs_input_grad[:3]
        work = scale.dtype
        x, w = _operands(h, weight)
        grad_h = torch.empty_like(h) if want_h else None
        grad_weight = torch.zeros_like(weight, dtype=work) if want_weight else None
        grad_bias = torch.zeros_like(bias, dtype=work) if want_bias and bias is not None else None
        total, plain = scale.new_zeros(()), scale.new_zeros(())
        with _no_autocast(h):
            for i in range(0, h.shape[0], rows):
                part = slice(i, i + rows)
                slopes = torch.mm(x[part], w.t())  # still logits: a tile at a time becomes slopes
                for tile, wanted, weigh in _tiles(slopes, targets[part], scale[part]):
                    logits = tile.to(work)
                    logits = logits if bias is None else logits.add_(bias)
                    found = _chunk_losses(logits, wanted, weigh, form)
                    total += found.loss.sum()
                    plain += found.ce.sum()
                    slope = _into_slope(logits, found, wanted, weigh, form)
                    if grad_bias is not None:
                        grad_bias += slope.sum(0)
                    tile.copy_(slope)
                if grad_h is not None:
                    grad_h[part] = slopes @ w
                if grad_weight is not None:
                    _add_product(grad_weight, slopes, x[part])
        ctx.save_for_backward(grad_h, grad_weight, grad_bias)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        ctx.mark_non_differentiable(plain)
        return total, plain

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple:  # type: ignore[override]
        grad_h, grad_weight, grad_bias = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        return (
            None if grad_h is None else grad_h * grad.to(grad_h.dtype),
            None if grad_weight is None else (grad_weight * grad).to(weight_dtype),
            None if grad_bias is None else (grad_bias * grad).to(bias_dtype),
            *(None,) * 4,
        )


def _tiles(logits: Tensor, targets: Tensor, scale: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The same rows of logits [R, V], targets and scale [R]: views."""
    rows = max(16, TILE_LOGITS // max(1, logits.shape[1]))
    return zip(logits.split(rows), targets.split(rows), scale.split(rows))


def _into_slope(logits: Tensor, found: _Chunk, targets: Tensor, scale: Tensor, form: TokenLoss) -> Tensor:
    """d loss / d logits, written over the logits: scale (softmax (factor + 2 z lse) - factor onehot)."""
    softmax = logits.sub_(found.lse[:, None]).exp_()
    hit = scale if found.factor is None else scale * found.factor
    row = hit + scale * (2 * form.z * found.lse) if form.z else hit
    slope = softmax.mul_(row[:, None])
    return slope.scatter_add_(1, targets[:, None], -hit[:, None])


def _add_product(total: Tensor, slope: Tensor, x: Tensor) -> None:
    """total [V, D] += slope' x; summed over chunks in fp32 whatever the operands are."""
    if total.dtype == x.dtype:
        total.addmm_(slope.t(), x)
    else:
        total += slope.t() @ x
