"""Laws of quantizers: what every `enter ... exit` bracket with codes must obey.

Shape legend: B batch  T time  D model width  C channels of the code
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from model.core import Aux, Cost, Ctx
from model.quant.base import Quantizer
from model.registry import QUANTIZERS, make_quantizer

from .harness import assert_close, docs_from, gradients, padded_rows, random_rows, weights_like

QUANT_LAWS: dict[str, Callable[[QuantCase], None]] = {}


def law(fn: Callable[[QuantCase], None]) -> Callable[[QuantCase], None]:
    QUANT_LAWS[fn.__name__] = fn
    return fn


@dataclass(frozen=True)
class QuantCase:
    """One quantizer to judge."""

    name: str
    dim: int = 24
    params: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name + "".join(f"-{k}={v}" for k, v in self.params.items())

    def build(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> Quantizer:
        torch.manual_seed(seed)
        return make_quantizer(self.name, self.dim, **self.params).to(dtype).eval()

    def input(self, B: int, T: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
        return torch.randn(B, T, self.dim, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def registered(table: dict[str, list[dict[str, Any]]]) -> list[QuantCase]:
    return [QuantCase(name, **entry) for name in QUANTIZERS.names() for entry in table.get(name, [{}])]


def bracket(q: Quantizer, x: Tensor, ctx: Ctx | None = None) -> tuple[Tensor, Tensor]:
    """(y, sum of the losses) of a round trip."""
    entered = q("enter", x, None, ctx)
    assert entered.code.dtype == x.dtype, f"code in {entered.code.dtype} for x in {x.dtype}"
    assert entered.code.shape == (*x.shape[:-1], q.code_dim)
    step = q("exit", entered.code, entered.saved, None, ctx)
    assert step.y.shape == x.shape and step.y.dtype == x.dtype
    return step.y, sum(entered.aux.losses.values(), x.new_zeros(()))


@law
def codes_survive_a_round_trip(case: QuantCase) -> None:
    """indices -> codes -> indices is the identity, and grid values stay where they are when quantized."""
    q = case.build()
    codes = q.encode(case.input(3, 40))
    assert codes.dtype == torch.int64 and codes.shape[:2] == (3, 40)
    grid = q.decode_codes(codes).double()
    assert torch.equal(q.encode_z(grid), codes), "grid values have other codes"
    z_q, _ = q.quantize(grid)
    assert_close(z_q, grid, "quantized twice", tol=1e-5)


@law
def enter_gives_the_codes(case: QuantCase) -> None:
    """enter's code is decode(encode(x)): what is stored is what is read."""
    q = case.build(torch.float32)
    x = case.input(3, 40, torch.float32)
    assert_close(q("enter", x).code, q.decode_codes(q.encode(x)), "stored against entered", tol=1e-6)


@law
def gradient_goes_straight_through(case: QuantCase) -> None:
    """The gradient of quantize is that of its smooth bound, which is the identity if nothing else is said."""
    q = case.build()
    z = q.down(case.input(2, 20)).clamp(-3, 3).detach().requires_grad_()
    z_q, _ = q.quantize(z)
    w = weights_like(z_q)
    got, want = (gradients((y * w).sum(), [z])[0] for y in (z_q, q.bound(z)))
    assert_close(got, want, "gradient")
    assert torch.nn.functional.cosine_similarity(got.flatten(), w.flatten(), dim=0) > 0.5


@law
def a_call_changes_nothing(case: QuantCase) -> None:
    """Neither in eval nor in train mode does a forward change a buffer or the next forward."""
    q = case.build()
    x = case.input(2, 20)
    want = q.state_dict()
    want = {k: v.clone() for k, v in want.items()}
    first, _ = bracket(q, x)
    second, _ = bracket(q.train(), x)
    third, _ = bracket(q, x)
    assert torch.equal(first, second) and torch.equal(first, third), (
        "the output depends on the mode or history"
    )
    for k, v in q.state_dict().items():
        assert torch.equal(v, want[k]), f"a forward changed {k}"


@law
def packed_equals_separate(case: QuantCase) -> None:
    """Packed documents are coded as if alone: outputs and gradients."""
    q = case.build()
    rows = random_rows(random.Random(2), 2, 20)
    x = case.input(2, 20).requires_grad_()
    leaves = [x, *q.parameters()]
    y, _ = bracket(q, x, Ctx(docs=docs_from(rows)))
    alone = []
    for r, row in enumerate(rows):
        parts = x[r : r + 1].split(row, dim=1)
        alone.append(torch.cat([bracket(q, part)[0] for part in parts], 1))
    want = torch.cat(alone)
    assert_close(y, want, "y")
    w = weights_like(y)
    for got, ref in zip(gradients((y * w).sum(), leaves), gradients((want * w).sum(), leaves)):
        assert_close(got, ref, "a gradient")


@law
def padding_does_not_count(case: QuantCase) -> None:
    """Padding is in no statistic, no loss and no gradient of a loss."""
    q = case.build().train()
    docs = docs_from(padded_rows(random.Random(0), 3, 24))
    pad = ~docs.tokens[..., None]
    x = case.input(3, 24).requires_grad_()
    noisy = torch.where(pad, 30.0 * case.input(3, 24, seed=5), x)
    for got, ref in zip(*(q("enter", v, None, Ctx(docs=docs)).aux for v in (noisy, x))):
        assert set(got) == set(ref)
        for k in got:
            assert_close(got[k], ref[k], k)
    packed = q("enter", x[docs.tokens][None]).aux
    for k, v in q("enter", x, None, Ctx(docs=docs)).aux.stats.items():
        assert_close(v, packed.stats[k], f"{k} against the tokens alone", tol=1e-6)


@law
def statistics_make_sense(case: QuantCase) -> None:
    """0 < usage <= 1, perplexity at least 1, entropy at most the nominal bits; all detached."""
    q = case.build()
    stats = q("enter", case.input(4, 50).requires_grad_()).aux.stats
    assert not any(v.requires_grad or v.dim() for v in stats.values())
    if stats:
        assert {"usage", "perplexity", "bits", "entropy_bits"} <= set(stats)
        assert 0 < stats["usage"] <= 1 and stats["perplexity"] >= 1
        assert stats["entropy_bits"] <= stats["bits"] + 1e-3
        assert stats["bits"] == torch.tensor(q.bits_per_token, dtype=torch.float32)
        same = q("enter", case.input(1, 1).expand(2, 30, -1)).aux.stats
        assert same["perplexity"] <= 1.001, "one token repeated uses one code"


@law
def codes_are_made_in_fp32(case: QuantCase) -> None:
    """bf16 inputs and autocast are coded as the same values in fp32 would be."""
    q = case.build(torch.float32)
    x = case.input(3, 60, torch.bfloat16)
    want = q.encode(x.float())
    assert torch.equal(q.encode(x), want), "bf16 x has other codes"
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(q.encode(x.float()), want), "autocast changes codes"
    half = case.build(torch.float32).to(torch.bfloat16)
    assert torch.isfinite(bracket(half, x)[0]).all()


@law
def starts_near_the_identity(case: QuantCase) -> None:
    """a is orthonormal, b its pseudo-inverse."""
    for channels in (8, 24, 40) if "channels" in QUANTIZERS.params(case.name) else (None,):
        given = {**case.params, **({} if channels is None else {"channels": channels})}
        try:
            q = QuantCase(case.name, case.dim, given).build()
        except ValueError:  # a case may fix the number of channels
            q = case.build()
        a, b = q.a.weight.double(), q.b.weight.double()
        assert_close(b, torch.linalg.pinv(a), "b against the pseudo-inverse of a", tol=1e-5)
        small = a @ a.T if a.shape[0] <= a.shape[1] else a.T @ a
        assert_close(small, torch.eye(len(small), dtype=torch.float64), "a is not orthonormal", tol=1e-5)


@law
def frozen_stays_frozen(case: QuantCase) -> None:
    """Frozen halves get no gradient, x keeps the one it had."""
    q = case.build()
    x = case.input(2, 9).requires_grad_()
    w = weights_like(x)
    y, loss = bracket(q, x)
    (want,) = gradients((y * w).sum(), [x])
    q.requires_grad_(False)
    y, loss = bracket(q, x)
    ((y * w).sum() + loss).backward()
    assert all(p.grad is None for p in q.parameters())
    y, _ = bracket(q, x)
    assert_close(gradients((y * w).sum(), [x])[0], want, "gradient of x")


@law
def flops_equal_the_counter(case: QuantCase) -> None:
    """cost(T).flops and the Linears are what torch's counter sees in enter and exit together."""
    q = case.build(torch.float32)
    for T in (1, 13):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            bracket(q, case.input(2, T, torch.float32))
        linears = sum(2 * m.weight.numel() * T for m in (q.a, q.b))
        assert 2 * (q.cost(T).flops + linears) == counter.get_total_flops()


@law
def builds_saves_and_loads(case: QuantCase) -> None:
    """dim is enough, T may be 0 or 1, and a strict state_dict carries everything."""
    for dim in (16, 64):
        made = make_quantizer(case.name, dim)
        y, _ = bracket(made, torch.randn(2, 3, dim))
        assert torch.isfinite(y).all()
    q, other = case.build(seed=0), case.build(seed=1)
    x = case.input(2, 9)
    for T in (0, 1):
        y, loss = bracket(q, x[:, :T])
        assert y.shape == (2, T, case.dim) and torch.isfinite(loss).all()
    assert not torch.equal(bracket(other, x)[0], bracket(q, x)[0])
    other.load_state_dict(q.state_dict(), strict=True)
    assert torch.equal(bracket(other, x)[0], bracket(q, x)[0])


# ----------------------------------------------------------------------------- broken on purpose


class Broken(Quantizer):
    """Rounds to a grid of step 0.1; one defect each. bug "" is honest."""

    bug = ""

    def __init__(self, dim: int, *, channels: int = 4) -> None:
        super().__init__(dim, channels=channels)
        self.register_buffer("seen", torch.zeros(()))
        self.extra = nn.Parameter(torch.zeros(()))
        if self.bug == "scaled b":
            self.b.weight.data *= 2
        if self.bug == "hidden":
            self._shift = torch.rand(())

    bits_per_token = 32.0

    def down(self, x: Tensor) -> Tensor:
        if self.bug == "bf16 codes" and x.dtype == torch.float32:
            return self.a(x).float()
        return super().down(x)

    def encode_z(self, z: Tensor) -> Tensor:
        return torch.floor(z * 10).long() if self.bug == "floor" else torch.round(z * 10).long()

    def decode_codes(self, codes: Tensor) -> Tensor:
        return codes.float() / 10

    def quantize(self, z: Tensor, keep: Tensor | None = None):
        grid = torch.round(z * 10) / 10
        if self.bug == "other codes":
            grid = grid + 0.1
        if self.bug == "hidden":
            grid = grid + self._shift
        if self.bug == "counts calls":
            self.seen += 1
        if self.bug == "mixes tokens":
            grid = grid + z.mean(1, keepdim=True)
        if self.bug == "pads count" or keep is None:
            keep = torch.ones(z.shape[:-1], dtype=torch.bool)
        loss = ((z - grid.detach()).pow(2).mean(-1) * keep).sum()
        value = grid if self.bug == "no gradient" else z + (grid - z).detach()
        if self.bug == "detaches x":
            value = value if self.a.weight.requires_grad else value.detach() + 0 * self.extra
        used = torch.tensor(2.0 if self.bug == "usage" else 0.5)
        stats = {"usage": used, "perplexity": torch.ones(()), "bits": torch.tensor(32.0)}
        return value, Aux({"commit": loss}, {**stats, "entropy_bits": torch.ones(())})

    def cost(self, T: int):
        return Cost(flops=float(self.bug == "flops"))


QUANT_BREAKS = {
    "codes_survive_a_round_trip": "floor",
    "enter_gives_the_codes": "other codes",
    "gradient_goes_straight_through": "no gradient",
    "a_call_changes_nothing": "counts calls",
    "packed_equals_separate": "mixes tokens",
    "padding_does_not_count": "pads count",
    "statistics_make_sense": "usage",
    "codes_are_made_in_fp32": "bf16 codes",
    "starts_near_the_identity": "scaled b",
    "frozen_stays_frozen": "detaches x",
    "flops_equal_the_counter": "flops",
    "builds_saves_and_loads": "hidden",
}
