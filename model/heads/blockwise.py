"""Heads that say a block of tokens at once: masked diffusion, and coarse to fine.

Shape legend: B batch  T time  D model width  N blocks  L slots of a block  W trunk states in sight  S = P + T

Both read the trunk's states up to a block's anchor, so a block sees nothing of itself or of later ones but
what its slots are given. In training the grid of blocks is shifted by a random number of tokens a call,
because generation may stop after any token; in evaluation it starts at the first token.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from model.core import NO_AUX, Aux, Cost, Ctx, State, at_least_fp32, docs_of
from model.flops import linear_flops
from model.heads.base import Head, HeadCost, HeadStep, Reading, Words, readouts_of
from model.heads.history import History, Splice, empty_history, segments_of, splice, tail
from model.heads.slots import Blocks, Sight, SlotStack, blocks_of, sight_of
from model.heads.targets import IGNORE
from model.ops.norm import RMSNorm
from model.registry import make_quantizer
from model.schema import HeadConfig


class BlockHead(Head):
    """What both share: the grid, the trunk states in sight, and the slots' input.

    A slot starts from the trunk's state at the anchor, plus what the subclass gives it, plus a vector of its
    place. State: the trunk's last W states of each row's document.
    """

    def __init__(self, dim: int, config: HeadConfig, norm_eps: float = 1e-5) -> None:
        super().__init__(dim)
        self.readouts = readouts_of([1], config.weight)
        self.size, self.window, self.reach = config.size, config.window, config.size - 1
        if (config.ffn or {}).get("act") == "rwkv":
            raise ValueError(
                "ffn.act: rwkv looks at the token before, which the slots of a block do not have"
            )
        self.row_norm = RMSNorm(dim, norm_eps)
        self.place = nn.Parameter(torch.zeros(self.size, dim))
        self.stack = SlotStack(dim, config, norm_eps)

    def init_state(self, batch: int, like: Tensor, capacity: int | None = None) -> State:
        return empty_history(batch, like, self.window, self.dim)

    def forward(
        self, x: Tensor, state: State | None = None, ctx: Ctx | None = None, words: Words | None = None
    ) -> HeadStep:
        supervised = words is not None and words.labels is not None
        if state is None and not supervised:
            return HeadStep(None)
        docs = docs_of(ctx)
        B, T, _ = x.shape
        segments, carried = segments_of(docs, B, T, x.device)
        way = splice(state, segments, carried)
        trunk = x if state is None else way.take(state.x.to(x.dtype), x)
        after = None
        if state is not None:
            after = tail(trunk, way.segments, self.window)
            after = after._replace(x=after.x.to(state.x.dtype))
        if not supervised:
            return HeadStep(None, after)
        assert words is not None
        phase = int(torch.randint(self.size, ())) if self.training else 0
        blocks = blocks_of(docs, B, T, self.size, phase, x.device)
        anchor = blocks.anchor if state is None else _places_in(way, T)[blocks.anchor]
        sight = sight_of(anchor, way.segments, self.window)
        found, aux = self.read(x.flatten(0, 1)[blocks.anchor], trunk, sight, blocks, words)
        return HeadStep(None, after, {"": found}, aux)

    @abstractmethod
    def read(
        self, base: Tensor, trunk: Tensor, sight: Sight, blocks: Blocks, words: Words
    ) -> tuple[list[Reading], Aux]:
        """base [N, D]: the trunk's states at the anchors."""

    def slots(self, base: Tensor, extra: Tensor, trunk: Tensor, sight: Sight) -> Tensor:
        """Slots from base [N, D] and extra [N, L or 1, D] -> [N, L, D], ready for the table."""
        s = base[:, None] + extra.to(base.dtype) + self.place.to(base.dtype)
        return self.stack(s, trunk, sight)

    def here(self, x: Tensor, state: History | None) -> tuple[Tensor, Tensor, Sight]:
        """To draft: base [B, D], trunk [B, W, D] and what of it is seen, after the last token."""
        if state is None:
            raise ValueError("a block head drafts from a state")
        B, W = len(x), self.window
        index = torch.arange(B * W, device=x.device).view(B, W)
        seen = torch.arange(W, device=x.device) >= W - state.held[:, None]
        return x[:, 0], state.x.to(x.dtype), Sight(index, seen)

    def cost(self, T: int, vocab: int) -> HeadCost:
        """Of blocks from the first token on; the last one has all its slots too."""
        blocks = -(-(T - 1) // self.size) if T > 1 else 0
        slots = blocks * self.size
        rest = self.stack.rest_flops(T, blocks, self.size, self.window)
        fixed = 8.0 + self.window * self.dim * self.place.element_size()
        table = 2.0 * vocab * self.dim * slots
        return HeadCost(linear_flops(self.stack) * slots, Cost(rest, state_fixed=fixed), table)


class MaskHead(BlockHead):
    """Masked diffusion inside a block (MDLM, arXiv 2406.07524; BD3-LM, arXiv 2503.09573).

    Of a block's n tokens, m are masked, m uniform in 1..n and the masked ones at random; each is predicted
    from the rest, with weight n / m. This is the continuous-time loss with its time integrated out: the
    expectation is a bound on the block's nats, whatever n. One slot (`size: 1`) is a next-token head, and
    nothing is random.
    """

    def __init__(self, dim: int, config: HeadConfig, norm_eps: float = 1e-5) -> None:
        super().__init__(dim, config, norm_eps)
        self.mask = nn.Parameter(torch.zeros(dim))
        self.inlet = nn.Linear(dim, dim, bias=False)

    def read(
        self, base: Tensor, trunk: Tensor, sight: Sight, blocks: Blocks, words: Words
    ) -> tuple[list[Reading], Aux]:
        assert words.labels is not None
        masked, scale = noise(blocks.valid, self.training)
        h = self.slots(base, self.given(words.ids.flatten()[blocks.token], ~masked, words), trunk, sight)
        targets = words.labels.flatten()[blocks.token].masked_fill(~masked, IGNORE)
        weights = scale[:, None].expand_as(targets)
        if words.weights is not None:
            weights = weights * words.weights.flatten()[blocks.token]
        keep = blocks.valid.flatten().nonzero().flatten()
        parts = (t.flatten()[keep] for t in (targets, weights, blocks.token - 1))
        return [Reading(h.flatten(0, 1)[keep], *parts)], NO_AUX

    def given(self, ids: Tensor, known: Tensor, words: Words) -> Tensor:
        """[N, L, D]: the rows of the tokens that are known, the mask vector elsewhere."""
        rows = self.row_norm(words.embed(ids))
        return self.inlet(torch.where(known[..., None], rows, self.mask.to(rows.dtype)))

    def draft(
        self, x: Tensor, state: State | None, words: Words, n: int, pick: Callable[[Tensor], Tensor]
    ) -> Tensor:
        self.check_reach(n)
        base, trunk, sight = self.here(x, state)
        known = torch.arange(self.size, device=x.device).expand(len(x), -1) == 0
        ids = words.ids.expand(-1, self.size)
        return pick(self.slots(base, self.given(ids, known, words), trunk, sight)[:, 1 : n + 1])

    def cost(self, T: int, vocab: int) -> HeadCost:
        cost = super().cost(T, vocab)
        slots = cost.table / (2.0 * vocab * self.dim)
        return cost._replace(linear=cost.linear + linear_flops(self.inlet) * slots)


class VarHead(BlockHead):
    """Coarse to fine (VAR, arXiv 2404.02905): a code for the block from the trunk, then all its tokens.

    A code is one of `codes` vectors, the quantization of what the block's tokens say together. The loss is
    the code's cross-entropy given the trunk plus the tokens' given the code, -log p(c) - sum log p(x_j | c),
    which bounds the block's nats; code and tokens are each said at once.
    """

    def __init__(self, dim: int, config: HeadConfig, norm_eps: float = 1e-5) -> None:
        super().__init__(dim, config, norm_eps)
        self.gather = nn.Linear(self.size * dim, dim, bias=False)
        channels = min(dim, 64)
        self.quant = make_quantizer("vq", dim, channels=channels, codes=config.codes)
        self.code_norm = RMSNorm(dim, norm_eps)
        self.code_head = nn.Linear(dim, config.codes, bias=False)

    def read(
        self, base: Tensor, trunk: Tensor, sight: Sight, blocks: Blocks, words: Words
    ) -> tuple[list[Reading], Aux]:
        assert words.labels is not None
        rows = self.row_norm(words.embed(words.ids.flatten()[blocks.token])) * blocks.valid[..., None]
        told = self.gather(rows.flatten(1))[None]
        entered = self.quant("enter", told)
        with torch.autocast(told.device.type, enabled=False):  # in bf16 a code may be nearest to another
            codes = self.quant.encode_z(entered.code.detach().to(at_least_fp32(told.dtype))).flatten()
        code = self.quant("exit", entered.code).y[0]
        h = self.slots(base, code[:, None], trunk, sight)
        labels = words.labels.flatten()[blocks.token].masked_fill(~blocks.valid, IGNORE)
        keep = blocks.valid.flatten().nonzero().flatten()
        weights = (labels != IGNORE).float()
        if words.weights is not None:
            weights = weights * words.weights.flatten()[blocks.token]
        code_weight = weights.sum(1) / (labels != IGNORE).sum(1).clamp_min(1)  # the mean of its tokens'
        parts = (t.flatten()[keep] for t in (labels, weights, blocks.token - 1))
        tokens = Reading(h.flatten(0, 1)[keep], *parts)
        coarse = Reading(self.code_norm(base), codes, code_weight, blocks.anchor, self.code_head.weight)
        return [tokens, coarse], entered.aux

    def draft(
        self, x: Tensor, state: State | None, words: Words, n: int, pick: Callable[[Tensor], Tensor]
    ) -> Tensor:
        self.check_reach(n)
        base, trunk, sight = self.here(x, state)
        codes = self.code_head(self.code_norm(base)).argmax(-1)
        code = self.quant("exit", self.quant.decode_codes(codes[:, None, None]).to(x.dtype)).y
        return pick(self.slots(base, code, trunk, sight)[:, 1 : n + 1])

    def cost(self, T: int, vocab: int) -> HeadCost:
        cost = super().cost(T, vocab)
        blocks = cost.table / (2.0 * vocab * self.dim * self.size)
        once = sum(linear_flops(m) for m in (self.gather, self.quant, self.code_head))
        search = 2 * self.quant.cost(1).flops * blocks
        rest = Cost(cost.rest.flops + search, cost.rest.state_fixed)
        return HeadCost(cost.linear + once * blocks, rest, cost.table)


def noise(valid: Tensor, training: bool) -> tuple[Tensor, Tensor]:
    """Which slots of valid [N, L] are masked, and each block's weight n / m [N].

    In evaluation the same for equal shapes, so that a model's figures do not change from run to run.
    """
    generator = None if training else torch.Generator(device=valid.device).manual_seed(0)
    count = valid.sum(1)
    u = torch.rand(valid.shape[0], device=valid.device, generator=generator)
    m = (u * count).long().clamp_max((count - 1).clamp_min(0)) + 1
    order = torch.rand(valid.shape, device=valid.device, generator=generator).masked_fill(~valid, 2.0)
    rank = order.argsort(1).argsort(1)
    return (rank < m[:, None]) | ~valid, count / m


def _places_in(way: Splice, T: int) -> Tensor:
    """[B*T] -> where each new item stands in the flattened B*S."""
    B, S = way.source.shape
    slot = torch.arange(B * S, device=way.source.device).view(B, S)
    out = torch.empty_like(slot).scatter_(1, way.source, slot)
    return out[:, S - T :].flatten()
