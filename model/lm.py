"""Bank + plan -> LanguageModel: embed, sites, heads, losses.

Shape legend: B batch  T time  D model width  V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from model.bank import build_module, scale_residual_outputs
from model.combine import Faded, Residual
from model.core import NO_AUX, Aux, Ctx, Docs, at_least_fp32, merge_aux
from model.embed import Embed
from model.flops import flops_per_token
from model.generate import generate
from model.heads import (
    IGNORE,
    Head,
    HeadStep,
    Reading,
    Readout,
    Words,
    make_head,
    shift_targets,
    shift_weights,
)
from model.items import Bracket, Cross, Plan, Visit
from model.ops.loss import linear_argmax, linear_cross_entropy
from model.plan import make_plan
from model.run import Around, Pass, States
from model.schema import Config


@dataclass
class Output:
    """What a forward pass returns.

    logits: [B, T, V] of the output head, or None when labels were given (they are never all held).
    hidden: [B, T, D] that the heads read, beside logits.
    loss:   0-d fp32: weighted heads plus auxiliary losses; None without labels.
    losses: {readout: 0-d mean cross-entropy in nats}, detached; see `LanguageModel.readouts`.
    sums:   {readout: (sum of weighted nats, sum of weights)}, detached: exact means over many batches.
    state:  {site: state} after the last token, when a state was passed in.
    aux:    named losses and statistics by site.
    aims:   {readout: what is minimised, summed like the nats of `sums`}, detached: the same unless the model
            has an objective of its own.
    """

    logits: Tensor | None = None
    hidden: Tensor | None = None
    loss: Tensor | None = None
    losses: dict[str, Tensor] = field(default_factory=dict)
    sums: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    state: States | None = None
    aux: Aux = NO_AUX
    aims: dict[str, Tensor] = field(default_factory=dict)


class Objective(Protocol):
    """What may stand in place of the cross-entropy; see `train.objective`."""

    def __call__(
        self, h: Tensor, table: Tensor, targets: Tensor, weights: Tensor | None, reference: Tensor | None
    ) -> tuple[Tensor, Tensor]: ...


class LanguageModel(nn.Module):
    """A model made of a bank of modules and a plan that says where each is visited."""

    progress: Tensor
    objective: Objective | None = None  # of training alone; None: cross-entropy
    around: Around = {}  # how the visits of some sites are called in training; see `run.Pass`

    def __init__(self, config: Config, vocab: int, rows: Tensor | None = None) -> None:
        """rows: pretrained table [V, W] for `embed: {from: ...}`, or None."""
        super().__init__()
        self.config, self.vocab = config, vocab
        self.plan: Plan = make_plan(config)
        mup, eps = config.optim.mup, config.norm_eps
        # Under muP rows start alike at every width.
        std = None if mup is None else mup.base**-0.5
        std = std if config.init_std is None else config.init_std
        self.embed = Embed(vocab, config.dim, config.embed, rows, std)
        self.bank = nn.ModuleDict({name: build_module(spec, eps) for name, spec in self.plan.modules.items()})
        self.heads = nn.ModuleDict({name: make_head(config.dim, c, eps) for name, c in config.heads.items()})
        self.register_buffer("progress", torch.zeros(()), persistent=False)
        self.logit_scale = 1.0 if mup is None else mup.base / config.dim  # see train.optim.mup
        visits = sum(isinstance(item, Visit) for item in self.plan.walk())
        scale_residual_outputs(self.bank, max(visits, 1))
        if self.plan.freeze_input:
            self.embed.freeze_input()

    # -- running

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        weights: Tensor | None = None,
        docs: Docs | None = None,
        state: States | None = None,
        *,
        norms: Mapping[str, Tensor | float] | None = None,
        aux_scale: float = 1.0,
        last: bool = False,
        reference: Tensor | None = None,
    ) -> Output:
        """tokens [B, T] int64. See `Output` for what comes back.

        labels:    [B, T], usually the tokens themselves, unshifted; each head shifts them and masks the
                   last `shift` positions of every document; -100 is ignored. None: logits, no loss.
        weights:   [B, T] loss weight of each token as a target.
        docs:      where documents lie; None: every row is one document.
        state:     from `init_state` or an earlier call; consumed.
        norms:     {readout: divisor of the summed loss}; default the batch's own sum of weights. The
                   global batch's makes accumulated and data-parallel gradients exact.
        aux_scale: factor on auxiliary losses (a micro batch's share of the global batch).
        reference: [B, T] nats of a reference model for each token as a target, for `objective`.
        last:      logits of the last position only, [B, 1, V]; a yoco then skips its cross half elsewhere.
        """
        table = None if labels is None and self.embed.gathers else self.embed.table()
        x, run = self._trunk(tokens, table, docs, state, last and labels is None)
        out = Output(state=run.out if state is not None else None)
        words = self._words(tokens, table, labels, weights)
        if labels is None:
            out.hidden, out.logits = self._logits(x, table, words, run, last)
        else:
            assert table is not None  # left out only where there are no labels
            self._losses(x, self._unembed(table), words, norms, run, out, reference)
        out.aux = merge_aux(run.aux)
        if out.loss is not None:
            for value in out.aux.losses.values():
                out.loss = out.loss + aux_scale * value.float()
        return out

    def _trunk(
        self,
        tokens: Tensor,
        table: Tensor | None,
        docs: Docs | None,
        state: States | None,
        last: bool = False,
    ) -> tuple[Tensor, Pass]:
        """What the heads read: [B, T, D] (or [B, 1, D] where a cross half was skipped), and the pass."""
        around = self.around if self.training and state is None else {}
        run = Pass(self.bank, Ctx(docs=docs, progress=self.progress), state, last, around)
        return run.run(self.plan.items, self._compute_dtype(self.embed(tokens, table))), run

    def _compute_dtype(self, x: Tensor) -> Tensor:
        device = x.device.type
        return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x

    def _words(
        self,
        tokens: Tensor,
        table: Tensor | None,
        labels: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Words:
        return Words(tokens, lambda ids: self.embed(ids, table), labels, weights)

    def _head(self, name: str, x: Tensor, run: Pass, words: Words) -> HeadStep:
        step = self.heads[name](x, run.state(f"heads.{name}"), run.ctx, words)
        run.keep(f"heads.{name}", step.state, step.aux)
        return step

    def _logits(
        self, x: Tensor, table: Tensor | None, words: Words, run: Pass, last: bool
    ) -> tuple[Tensor, Tensor]:
        first = self.output_head
        for name in self.heads:
            if name != first and run.states is not None and f"heads.{name}" in run.states:
                self._head(name, x, run, words)  # its state must go on
        h = self._head(first, x, run, words).y
        assert h is not None
        if last and h.shape[1]:
            x, h = (t[:, -1:] if run.ctx.docs is None else _last_tokens(t, run.ctx.docs) for t in (x, h))
        return x, self._scores(h, table)

    def _scores(self, h: Tensor, table: Tensor | None) -> Tensor:
        """Logits [..., V] of a head's states [..., D]; table: as for `Embed.logits`, of the input."""
        if table is None:
            return self.embed.logits(h * self.logit_scale, None)
        return self.embed.logits(h, self._unembed(table))

    def _losses(
        self,
        x: Tensor,
        unembed: Tensor,
        words: Words,
        norms: Mapping[str, Tensor | float] | None,
        run: Pass,
        out: Output,
        reference: Tensor | None,
    ) -> None:
        assert words.labels is not None
        total = x.new_zeros((), dtype=torch.float32)
        counts = self.head_counts(words.labels, run.ctx.docs, words.weights)
        for head in self.heads:
            for suffix, readings in self._head(head, x, run, words).readings.items():
                name = head + suffix
                aim = nats = x.new_zeros((), dtype=torch.float32)
                for r in readings:
                    part, ce = self._token_losses(r, unembed, self.readouts[name].shift, reference)
                    aim, nats = aim + part, nats + ce
                count = counts[name]
                norm = count.clamp_min(1e-9) if norms is None else norms[name]
                total = total + self.readouts[name].weight * aim / norm
                out.sums[name], out.aims[name] = (nats.detach(), count), aim.detach()
                out.losses[name] = nats.detach() / count.clamp_min(1e-9)
        out.loss = total

    def _token_losses(
        self, r: Reading, unembed: Tensor, shift: int, reference: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(what is minimised, cross-entropy), 0-d sums over the reading's targets."""
        table = unembed if r.table is None else r.table
        if self.objective is None or not self.training:
            nats = linear_cross_entropy(r.h, table, r.targets, r.weights)
            return nats, nats.detach()
        plain = shift == 1 and r.at is None and r.table is None
        shifted = shift_weights(reference, 1) if plain and reference is not None else None
        return self.objective(r.h, table, r.targets, r.weights, shifted)

    @torch.no_grad()
    def nll(self, tokens: Tensor, docs: Docs | None = None) -> dict[str, Tensor]:
        """{readout: [B, T] nats of what is predicted at each position}; nan where there is no target.

        Of a head that says blocks: terms of its bound, whose sum counts (`mask`: of the masked tokens alone,
        weighted; `var`: a code's nats stand at its block's first token).
        """
        x, run, unembed, words = self._supervised(tokens, docs)
        out = {}
        for head in self.heads:
            for suffix, readings in self._head(head, x, run, words).readings.items():
                targets = shift_targets(tokens, self.readouts[head + suffix].shift, docs)
                total = torch.zeros(tokens.numel(), dtype=at_least_fp32(x.dtype), device=x.device)
                for r in readings:
                    table = unembed if r.table is None else r.table
                    nats = linear_cross_entropy(r.h, table, r.targets, r.weights, reduction="none")
                    total = nats if r.at is None else total.index_add(0, r.at, nats.to(total.dtype))
                out[head + suffix] = total.view_as(targets).masked_fill(targets == IGNORE, float("nan"))
        return out

    @torch.no_grad()
    def top1(self, tokens: Tensor, docs: Docs | None = None) -> dict[str, tuple[int, int]]:
        """{readout: (predicted tokens that are its likeliest, predicted tokens)}; of `mask`, the masked."""
        x, run, unembed, words = self._supervised(tokens, docs)
        out = {}
        for head in self.heads:
            for suffix, readings in self._head(head, x, run, words).readings.items():
                r = readings[0]
                hits = (linear_argmax(r.h, unembed) == r.targets).sum()
                out[head + suffix] = int(hits), int((r.targets != IGNORE).sum())
        return out

    def _supervised(self, tokens: Tensor, docs: Docs | None) -> tuple[Tensor, Pass, Tensor, Words]:
        """A pass without states: what the heads read, the pass, the unembedding, tokens that are labels."""
        table = self.embed.table()
        x, run = self._trunk(tokens, table, docs, None)
        return x, run, self._unembed(table), self._words(tokens, table, tokens)

    @torch.no_grad()
    def head_counts(
        self, labels: Tensor, docs: Docs | None = None, weights: Tensor | None = None
    ) -> dict[str, Tensor]:
        """{readout: sum of weights of its supervised tokens}, without a forward pass."""
        out = {}
        for name, (shift, _) in self.readouts.items():
            w = None if weights is None else shift_weights(weights, shift)
            out[name] = _count(shift_targets(labels, shift, docs), w)
        return out

    # -- state

    def named_heads(self) -> list[tuple[str, Head]]:
        return [(name, cast(Head, head)) for name, head in self.heads.items()]

    @property
    def output_head(self) -> str:
        """The head that generates: the first that predicts the next token, else the first."""
        shifts = {name: next(iter(h.readouts.values())).shift for name, h in self.named_heads() if h.speaks}
        if not shifts:
            raise ValueError(
                "heads: none says the next token, like {next: {shift: 1}}; the others only draft"
            )
        return next((name for name, shift in shifts.items() if shift == 1), next(iter(shifts)))

    @property
    def readouts(self) -> dict[str, Readout]:
        """What is predicted, and reported, by name: the head's, with `.shift` where it makes several."""
        return {name + suffix: r for name, head in self.named_heads() for suffix, r in head.readouts.items()}

    def init_state(
        self,
        batch: int,
        capacity: int | None = None,
        dtype: torch.dtype | None = None,
        heads: Collection[str] | None = None,
    ) -> States:
        """An empty state for `batch` rows; capacity: see `core.Block.init_state`.

        heads: those that go on from call to call, besides the output head; None: all. (One that only drafts
        costs time in every step, and nothing else needs its state.)
        """
        like = torch.empty((), device=self.embed.weight.device, dtype=dtype or torch.float32)
        states: States = {}
        for item in self.plan.walk():
            module: Any = self.bank[item.module]
            if isinstance(item, Visit | Cross) or (isinstance(item, Bracket) and not item.turned):
                states[item.site] = module.init_state(batch, like, capacity)
        for name, head in self.named_heads():
            if heads is None or name in heads or name == self.output_head:
                states[f"heads.{name}"] = head.init_state(batch, like, capacity)
        return states

    @torch.no_grad()
    def draft(self, head: str, hidden: Tensor, state: Any, new: Tensor, n: int) -> Tensor:
        """[B, n] ids that a head guesses to follow new [B, 1]; hidden [B, 1, D] and state: after the token
        before it, of `Output`; the state is consumed."""
        table = None if self.embed.gathers else self.embed.table()
        words = self._words(new, table)
        drafter = cast(Head, self.heads[head])
        return drafter.draft(hidden, state, words, n, lambda h: self._scores(h, table).argmax(-1))

    def generate(self, tokens: Tensor, max_new_tokens: int = 50, **options: Any) -> Tensor:
        """Prompt [B, T] + new tokens [B, T + n]; options as in `model.generate.generate`."""
        return generate(self, tokens, max_new_tokens, **options)

    def _unembed(self, table: Tensor) -> Tensor:
        """[V, D] whose product with a head's states is the logits."""
        out = self.embed.output_table(table)
        return out if self.logit_scale == 1.0 else out * self.logit_scale

    # -- training

    def advance(self, step: int, progress: float = 0.0) -> None:
        """Set what depends on the optimizer step of this stage: fades, and the progress in [0, 1]."""
        self.progress.fill_(progress)
        for module in self.bank.values():
            if isinstance(module, Faded):
                module.advance(step)

    @property
    def fades_done_at(self) -> int:
        """The step of this stage at which every new shell counts fully."""
        return max((m.done_at for m in self.bank.values() if isinstance(m, Faded)), default=0)

    def no_decay(self) -> set[str]:
        """Names of parameters that take no weight decay: vectors, and what blocks declare."""
        names = {n for n, p in self.named_parameters() if p.dim() < 2}
        for path, module in self.named_modules():
            if module is self:
                continue
            names |= {f"{path}.{n}" for n in getattr(module, "no_decay", ()) if hasattr(module, n)}
        return names

    def flops_per_token(self, context: int) -> float:
        """Training FLOPs (forward and backward) per token at that context; see model.flops."""
        return flops_per_token(self, context)

    def compile_blocks(self) -> None:
        """torch.compile every bank module in place (parameter names do not change)."""
        torch._dynamo.config.cache_size_limit = max(64, 4 * len(self.bank))
        for module in self.bank.values():
            if isinstance(module, Residual):
                module.compile(dynamic=True)


def _count(targets: Tensor, weights: Tensor | None) -> Tensor:
    keep = targets != IGNORE
    return (keep.float() if weights is None else keep * weights.float()).sum()


def _last_tokens(h: Tensor, docs: Docs) -> Tensor:
    """[B, 1, D]: the state at each row's last token that is not padding."""
    return h.gather(1, docs.last_places()[:, None, None].expand(-1, 1, h.shape[2]))
