"""Quantizers with learned codes, beyond their laws: upkeep, restarts, groups, stages, bits.

Shape legend: B batch  T time  C channels  N codes
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from model.core import Ctx, Docs
from model.quant.base import upkeep
from model.quant.codebook import Codebook
from model.registry import make_quantizer


def feed(book: Codebook, z: Tensor, keep: Tensor | None = None) -> None:
    book.collect(z, book.nearest(z), keep)


def test_upkeep_is_the_moving_average_of_the_formula() -> None:
    book = Codebook(3, 2, decay=0.9, dead=0.0)
    table, z = book.table.clone(), torch.randn(50, 2)
    chosen = book.nearest(z)
    feed(book, z)
    book.upkeep()
    for n in range(3):
        mine = z[chosen == n]
        share = 0.9 / 3 + 0.1 * len(mine) / 50
        mean = 0.9 * table[n] / 3 + 0.1 * mine.sum(0) / 50
        torch.testing.assert_close(book.share[n].item(), share, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(book.table[n], mean / share)


def test_codes_become_the_means_of_clusters() -> None:
    torch.manual_seed(0)
    centres = torch.randn(8, 4) * 3
    book = Codebook(8, 4, decay=0.8)
    book.table.copy_(centres + torch.randn(8, 4))
    book.mean.copy_(book.table / 8)
    for _ in range(60):
        feed(book, (centres[torch.randint(8, (512,))] + 0.05 * torch.randn(512, 4)))
        book.upkeep()
    assert torch.cdist(centres, book.table).amin(1).max() < 0.1


def test_dead_codes_come_back() -> None:
    q = make_quantizer("vq", 16, channels=8, codes=64, decay=0.9)
    for book in q.tables:  # all codes far from the data but one
        book.table[1:] += 100.0
        book.mean.copy_(book.table / 64)
    x = torch.randn(8, 256, 16)
    before = q("enter", x).aux.stats["usage"]
    for _ in range(40):
        q("enter", x)
        upkeep(q)
    after = q("enter", x).aux.stats["usage"]
    assert before < 0.05 and after > 0.9


def moved(q, x: Tensor, ctx: Ctx | None = None, times: int = 1) -> dict[str, Tensor]:
    """Buffers after `times` forwards and one upkeep."""
    for _ in range(times):
        q("enter", x, None, ctx)
    upkeep(q)
    return {k: v.clone() for k, v in q.state_dict().items()}


def vq(**params):
    torch.manual_seed(0)
    return make_quantizer("vq", 16, channels=8, codes=16, **params)


@pytest.mark.parametrize("name", ["vq", "rvq"])
def test_a_replayed_forward_changes_nothing(name: str) -> None:
    """Activation checkpointing runs forward twice; upkeep must not notice."""
    x = torch.randn(2, 40, 16)
    made = []
    for times in (1, 2):
        torch.manual_seed(0)
        made.append(moved(make_quantizer(name, 16, channels=8, codes=16), x, times=times))
    for k in made[0]:
        torch.testing.assert_close(made[0][k], made[1][k])
    torch.manual_seed(0)
    fresh = make_quantizer(name, 16, channels=8, codes=16).state_dict()
    assert any(not torch.equal(fresh[k], made[0][k]) for k in fresh), "upkeep did nothing at all"


def test_tables_rest_when_they_should() -> None:
    x = torch.randn(2, 40, 16)
    want = vq().state_dict()
    frozen = vq().requires_grad_(False)
    with torch.no_grad():
        blind = moved(vq(), x)
    broken = moved(vq(), x * float("nan"))
    for name, got in {
        "frozen": moved(frozen, x),
        "eval": moved(vq().eval(), x),
        "no_grad": blind,
        "not finite": broken,
    }.items():
        for k in want:
            assert torch.equal(got[k], want[k]), f"{name}: {k} moved"


def test_padding_does_not_move_tables() -> None:
    x = torch.randn(2, 40, 16)
    mask = torch.arange(40).expand(2, 40) < torch.tensor([[25], [40]])
    got = moved(vq(), torch.where(mask[..., None], x, 77.0), Ctx(docs=Docs.from_mask(mask)))
    want = moved(vq(), x[mask][None])
    for k in want:
        torch.testing.assert_close(got[k], want[k])


def test_cosine_codes_do_not_see_scale() -> None:
    q = vq(cosine=True)
    z = torch.randn(5, 30, 8)
    assert torch.equal(q.encode_z(z), q.encode_z(9 * z))
    moved(q, torch.randn(4, 50, 16))
    torch.testing.assert_close(q.tables[0].table.norm(dim=1), torch.full((16,), 8**0.5))


def test_groups_are_quantizers_side_by_side() -> None:
    q = vq(groups=2)
    z = torch.randn(3, 20, 8)
    codes = q.encode_z(z)
    assert codes.shape == (3, 20, 2) and q.bits_per_token == 8.0
    for g, part in enumerate(z.split(4, dim=-1)):
        want = torch.cdist(part.reshape(-1, 4), q.tables[g].table).argmin(1).view(3, 20)
        assert torch.equal(codes[..., g], want)


def test_every_stage_of_rvq_brings_the_code_nearer() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 128, 16)
    errors = []
    for stages in (1, 2, 4):
        torch.manual_seed(1)
        q = make_quantizer("rvq", 16, channels=4, codes=16, stages=stages, decay=0.8)
        for _ in range(30):
            q("enter", x)
            upkeep(q)
        z = q.down(x)
        errors.append(((q.quantize(z)[0] - z).norm() / z.norm()).item())
    assert errors[1] < 0.7 * errors[0] and errors[2] < 0.7 * errors[1]


def test_simvq_moves_every_code_at_once() -> None:
    q = make_quantizer("simvq", 16, channels=8, codes=32)
    before = q.turned(torch.float32).detach().clone()
    aux = q("enter", torch.randn(1, 2, 16)).aux  # two tokens choose at most two codes
    aux.losses["codes"].backward()
    assert q.a.weight.grad is None or not q.a.weight.grad.any(), "the codes' loss must not move z"
    with torch.no_grad():
        q.turn -= 0.1 * q.turn.grad
    assert ((q.turned(torch.float32) - before).abs().amax(1) > 0).all()


def test_commitment_moves_z_alone() -> None:
    q = make_quantizer("simvq", 16, channels=8, codes=32)
    q("enter", torch.randn(2, 9, 16)).aux.losses["commit"].backward()
    assert q.a.weight.grad.any() and (q.turn.grad is None or not q.turn.grad.any())


def test_bit_entropy_is_that_of_all_codes() -> None:
    """Softmax over -k |z - code|^2 of all 2^C codes has the entropy of independent bits."""
    q = make_quantizer("lfq", 8, channels=4, sharpness=0.3)
    z = torch.randn(6, 4)
    codes = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=4)))
    p = torch.softmax(-0.3 * (z[:, None] - codes).pow(2).sum(-1), dim=1)
    brute = torch.special.entr(p).sum(1).mean()
    bit = torch.sigmoid(4 * 0.3 * z)
    bits = torch.special.entr(torch.stack([bit, 1 - bit])).sum((0, 2)).mean()
    torch.testing.assert_close(bits, brute)
    mean = bit.mean(0)
    spread = torch.special.entr(torch.stack([mean, 1 - mean])).sum() / 4
    torch.testing.assert_close(q._entropy_loss(z, None), bits / 4 - spread)


def test_bsq_lies_on_the_sphere() -> None:
    lfq, bsq = (make_quantizer(name, 16, channels=8) for name in ("lfq", "bsq"))
    z = torch.randn(3, 20, 8)
    assert torch.equal(bsq.encode_z(z), lfq.encode_z(z))
    torch.testing.assert_close(bsq.bound(z).norm(dim=-1), torch.full((3, 20), 8**0.5))
    assert torch.equal(bsq.bound(5 * z) > 0, bsq.bound(z) > 0)
    # Two points of one orthant of the sphere are less than a right angle apart.
    assert (bsq.bound(z) - bsq.quantize(z)[0]).norm(dim=-1).max() < (2 * 8) ** 0.5


@pytest.mark.parametrize(
    ("name", "params", "says"),
    [
        ("vq", {"channels": 8, "groups": 3}, "must divide"),
        ("vq", {"codes": 1}, "at least 2"),
        ("rvq", {"stages": 0}, "at least 1"),
        ("simvq", {"codes": 1}, "at least 2"),
        ("vq", {"code": 4}, "did you mean 'codes'"),
    ],
)
def test_bad_parameters_say_why(name: str, params: dict, says: str) -> None:
    with pytest.raises((ValueError, TypeError), match=says):
        make_quantizer(name, 16, **params)


@pytest.mark.parametrize("name", ["vq", "rvq", "simvq", "lfq"])
def test_codes_that_do_not_exist_are_refused(name: str) -> None:
    q = make_quantizer(name, 16, channels=8)
    codes = q.encode(torch.randn(1, 3, 16))
    for bad in (-1, 256):
        with pytest.raises(IndexError, match=r"0\.\.255|0 or 1"):
            q.decode_codes(torch.full_like(codes, bad))
