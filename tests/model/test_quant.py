"""Quantizers beyond their laws, and the adapter: token merging is held to every block law.

Shape legend: B batch  T time  D model width  C channels  K merge
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from model.core import Block, Cost, Ctx, Step, merge_aux, state_map
from model.quant.adapter import Adapter
from model.quant.base import Quantizer
from model.registry import BLOCKS, make_block, make_quantizer
from tests.laws import laws_time, laws_training  # noqa: F401 - they register the laws
from tests.laws.harness import LAWS, Case
from tests.laws.toys import Decay

# ----------------------------------------------------------------------------- quantizers


@pytest.mark.parametrize(
    ("name", "params", "bits"),
    [("int8", {"channels": 10}, 80.0), ("fsq", {"levels": [2, 4, 16]}, 7.0), ("fsq", {"channels": 5}, 15.0)],
)
def test_nominal_bits(name: str, params: dict, bits: float) -> None:
    assert make_quantizer(name, 24, **params).bits_per_token == pytest.approx(bits)


@pytest.mark.parametrize(
    ("name", "params", "says"),
    [
        ("int8", {"channels": 0}, "at least one"),
        ("fsq", {"levels": 1}, "at least 2 levels"),
        ("fsq", {"levels": [8, 8], "channels": 3}, "2 numbers for channels=3"),
    ],
)
def test_bad_parameters_say_why(name: str, params: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make_quantizer(name, 24, **params)


def test_codes_that_do_not_exist_are_refused() -> None:
    q = make_quantizer("fsq", 24, channels=2, levels=8)
    for bad in (8, -1):
        with pytest.raises(IndexError, match="outside"):
            q.decode_codes(torch.tensor([[[0, bad]]]))


@pytest.mark.parametrize("levels", [2, 3, 8, 255, 256])
def test_every_level_is_used_by_unit_gaussians(levels: int) -> None:
    """Equal bins of the squash are about equally likely: no level is dead, and bits are well spent."""
    q = make_quantizer("fsq", 64, channels=16, levels=levels)
    stats = q("enter", torch.randn(16, 512, 64)).aux.stats
    assert stats["usage"] > 0.99
    assert stats["entropy_bits"] > 0.97 * stats["bits"]


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_int8_keeps_the_stream_at_any_scale(scale: float) -> None:
    """With as many channels as the width, 8 bits lose about 1 % of a normalized stream."""
    q = make_quantizer("int8", 48, channels=48)
    x = torch.randn(4, 64, 48) * scale
    y = q("exit", q("enter", x).code).y
    want = nn.functional.rms_norm(x, (48,), eps=1e-12 * scale**2)
    assert (y - want).norm() < 0.03 * want.norm()


def test_quantizer_learns_to_reconstruct() -> None:
    """Trained end to end, an 8-channel int8 bracket recovers data of 8 dimensions."""
    torch.manual_seed(0)
    basis = torch.randn(8, 32)
    q = make_quantizer("int8", 32, channels=8)
    optimizer = torch.optim.Adam(q.parameters(), lr=1e-2)
    losses = []
    for _ in range(150):
        x = nn.functional.rms_norm(torch.randn(128, 1, 8) @ basis, (32,))
        y = q("exit", q("enter", x).code).y
        loss = (y - x).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.02 < 0.5 < losses[0]


# ----------------------------------------------------------------------------- the adapter


class Merged(Block):
    """x + exit(inner(enter(x))): an adapter with a recurrent or attending inside, as a block."""

    merge = 3
    pool = "mean"
    inner = "toy_inner"
    adapter: type[Adapter] = Adapter

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.bracket = self.adapter(dim, width=2 * dim, merge=self.merge, pool=self.pool)
        self.body = make_block(self.inner, 2 * dim) if self.inner != "swa" else make_swa(2 * dim)

    def init_state(self, batch: int, like: Tensor, capacity: int | None = None):
        parts = (self.bracket, self.body)
        return tuple(part.init_state(batch, like, capacity) for part in parts)

    def forward(self, x: Tensor, state=None, ctx: Ctx | None = None) -> Step:
        outer, inner = (None, None) if state is None else state
        entered = self.bracket("enter", x, outer, ctx)
        step = self.body(entered.code, inner, entered.ctx)
        left = self.bracket("exit", step.y, entered.saved, entered.state, ctx)
        aux = merge_aux([entered.aux, step.aux, left.aux])
        return Step(x + left.y, None if state is None else (left.state, step.state), aux)

    def comparable(self, state):
        """A document that has made no group leaves the inside's state as it was; ctx hides it."""
        own = state[0].seen >= self.merge if self.merge > 1 else torch.tensor(True)
        rows = state_map(lambda t: t * own.view(-1, *[1] * (t.dim() - 1)), state[1])
        return state[0], rows

    def cost(self, T: int) -> Cost:
        G = T // self.merge
        linears = sum(2.0 * m.weight.numel() for m in self.body.modules() if isinstance(m, nn.Linear))
        inner = self.body.cost(G)
        return self.bracket.cost(T) + Cost(
            inner.flops + linears * (G - T), inner.state_fixed, inner.state_per_token
        )


def make_swa(dim: int) -> Block:
    return make_block("swa", dim, head_dim=8, window=3)


@pytest.fixture
def merged(monkeypatch: pytest.MonkeyPatch):
    """Register a `Merged` block for one test; gives its case."""

    def add(**attributes) -> Case:
        monkeypatch.setitem(BLOCKS._classes, "toy_inner", Decay)
        monkeypatch.setitem(BLOCKS._classes, "toy", type("Toy", (Merged,), attributes))
        return Case("toy", dim=8, T=17 - 17 % attributes.get("merge", 3))

    return add


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize(
    "attributes",
    [
        {"merge": 1},
        {"merge": 3},
        {"merge": 2, "inner": "swa"},
        {"merge": 4, "pool": "gated"},
        {"merge": 2, "pool": "mlp"},
    ],
    ids=str,
)
def test_merging_obeys_every_law(attributes: dict, name: str, merged) -> None:
    LAWS[name](merged(**attributes))


class Unshifted(Adapter):
    """Reads group g at the positions that it was made of: the leak that the shift prevents."""

    def enter(self, x: Tensor, state=None, ctx: Ctx | None = None):
        entered = super().enter(x, state, ctx)
        G = x.shape[1] // self.merge
        own = torch.arange(x.shape[1]) // self.merge
        read = torch.where(own < G, own + 2, 0).expand(x.shape[:2])
        return entered._replace(saved=entered.saved._replace(read=read))


@pytest.mark.parametrize("merge", [2, 3, 4])
def test_without_the_shift_the_future_leaks(merge: int, merged) -> None:
    with pytest.raises(AssertionError, match="before t="):
        LAWS["no_look_ahead"](merged(merge=merge, adapter=Unshifted))


@pytest.mark.parametrize("merge", [2, 3, 4])
def test_shift_is_no_larger_than_it_must_be(merge: int) -> None:
    """Group g is read at once by the token that completes it."""
    adapter = Adapter(4, width=4, merge=merge)
    x = torch.randn(1, 12, 4)
    entered = adapter("enter", x)
    y = adapter("exit", entered.code, entered.saved).y
    for t in range(12):
        g = (t + 1) // merge - 1
        want = x[0, g * merge : (g + 1) * merge].mean(0) if g >= 0 else torch.zeros(4)
        torch.testing.assert_close(y[0, t], want)


@pytest.mark.parametrize("pool", ["mean", "gated", "mlp"])
def test_adapter_starts_at_the_identity_of_group_means(pool: str) -> None:
    adapter = Adapter(6, width=9, merge=3, pool=pool)
    x = torch.randn(2, 9, 6)
    code = adapter("enter", x).code
    assert code.shape == (2, 3, 9)
    torch.testing.assert_close(adapter.v(code), x.unflatten(1, (3, 3)).mean(2))
    adapter.zero_exit()
    entered = adapter("enter", x)
    assert not adapter("exit", entered.code, entered.saved).y.any()


def test_inside_runs_every_kth_step() -> None:
    """Streaming: the inside gets one position per K tokens, and nothing in between."""
    adapter, x = Adapter(4, merge=4), torch.randn(2, 9, 4)
    state, lengths = adapter.init_state(2, x), []
    for t in range(9):
        entered = adapter("enter", x[:, t : t + 1], state)
        lengths.append(entered.code.shape[1])
        state = adapter("exit", entered.code, entered.saved, entered.state).state
    assert lengths == [0, 0, 0, 1, 0, 0, 0, 1, 0]


def test_a_document_without_a_group_hides_the_state_of_the_one_before() -> None:
    """The inside's state is document A's while B has made no group: B's first group must start anew."""
    torch.manual_seed(0)
    adapter, body = Adapter(4, width=4, merge=3).double(), Decay(4).double()

    def run(pieces: list[tuple[Tensor, Ctx | None]]) -> Tensor:
        outer, inner, out = adapter.init_state(1, pieces[0][0]), body.init_state(1, pieces[0][0]), []
        for x, ctx in pieces:
            entered = adapter("enter", x, outer, ctx)
            step = body(entered.code, inner, entered.ctx)
            left = adapter("exit", step.y, entered.saved, entered.state, ctx)
            outer, inner = left.state, step.state
            out.append(left.y)
        return torch.cat(out, 1)

    a, b = torch.randn(1, 7, 4).double(), torch.randn(1, 8, 4).double()
    alone = run([(b, None)])
    split = run([(torch.cat([a, b[:, :2]], 1), Ctx.packed([0, 7, 9])), (b[:, 2:], None)])
    torch.testing.assert_close(split[:, 7:], alone)
    # A call that brings nothing of B either: only A's tail and B's head, no group at all.
    split = run(
        [(a[:, :4], None), (torch.cat([a[:, 4:5], b[:, :1]], 1), Ctx.packed([0, 1, 2])), (b[:, 1:], None)]
    )
    torch.testing.assert_close(split[:, 5:], alone)


def test_adapter_says_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="did you mean 'gated'"):
        Adapter(4, merge=2, pool="gate")
    with pytest.raises(ValueError, match="at least 1"):
        Adapter(4, merge=0)
    with pytest.raises(ValueError, match="saved"):
        Adapter(4, merge=2)("exit", torch.zeros(1, 1, 4))


def test_bases_are_honest_about_what_they_lack() -> None:
    with pytest.raises(TypeError, match="quantize"):
        Quantizer(4, channels=2)  # type: ignore[abstract]
