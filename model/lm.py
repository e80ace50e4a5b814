"""Bank + plan -> LanguageModel: embed, sites, heads, losses.

Shape legend: B batch  T time  D model width  V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from model.blocks.xattn import KVMemory
from model.combine import Faded, Residual
from model.core import NO_AUX, Aux, Bottleneck, Ctx, Docs, merge_aux
from model.embed import Embed
from model.flops import flops_per_token
from model.generate import generate
from model.heads import IGNORE, Head, shift_targets, shift_weights
from model.items import Bracket, Cross, ModuleSpec, Plan, Visit
from model.ops.loss import linear_argmax, linear_cross_entropy
from model.plan import make_plan
from model.quant.adapter import Adapter
from model.registry import make_block, make_quantizer, make_wrap
from model.run import Pass, States
from model.schema import Config


@dataclass
class Output:
    """What a forward pass returns.

    logits: [B, T, V] of the first head, or None when labels were given (they are never all held).
    loss:   0-d fp32: weighted heads plus auxiliary losses; None without labels.
    losses: {head: 0-d mean cross-entropy in nats}, detached.
    sums:   {head: (sum of weighted nats, sum of weights)}, detached: exact means over many batches.
    state:  {site: state} after the last token, when a state was passed in.
    aux:    named losses and statistics by site.
    """

    logits: Tensor | None = None
    loss: Tensor | None = None
    losses: dict[str, Tensor] = field(default_factory=dict)
    sums: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    state: States | None = None
    aux: Aux = NO_AUX


class LanguageModel(nn.Module):
    """A model made of a bank of modules and a plan that says where each is visited."""

    progress: Tensor

    def __init__(self, config: Config, vocab: int, rows: Tensor | None = None) -> None:
        """rows: pretrained table [V, W] for `embed: {from: ...}`, or None."""
        super().__init__()
        self.config, self.vocab = config, vocab
        self.plan: Plan = make_plan(config)
        self.embed = Embed(vocab, config.dim, config.embed, rows, config.init_std)
        eps = config.norm_eps
        self.bank = nn.ModuleDict({name: _build(spec, eps) for name, spec in self.plan.modules.items()})
        self.heads = nn.ModuleDict({name: Head(config.dim, c, eps) for name, c in config.heads.items()})
        self.register_buffer("progress", torch.zeros(()), persistent=False)
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
    ) -> Output:
        """tokens [B, T] int64. See `Output` for what comes back.

        labels:    [B, T], usually the tokens themselves, unshifted; each head shifts them and masks the
                   last `shift` positions of every document; -100 is ignored. None: logits, no loss.
        weights:   [B, T] loss weight of each token as a target.
        docs:      where documents lie; None: every row is one document.
        state:     from `init_state` or an earlier call; consumed.
        norms:     {head: divisor of the summed loss}; default the batch's own sum of weights. The
                   global batch's makes accumulated and data-parallel gradients exact.
        aux_scale: factor on auxiliary losses (a micro batch's share of the global batch).
        last:      logits of the last position only, [B, 1, V]; a yoco then skips its cross half elsewhere.
        """
        table = self.embed.table()
        x, run = self._trunk(tokens, table, docs, state, last and labels is None)
        out = Output(state=run.out if state is not None else None)
        unembed = self.embed.output_table(table)
        if labels is None:
            out.logits = self._logits(x, unembed, run, last)
        else:
            self._losses(x, unembed, labels, weights, docs, norms, run, out)
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
        run = Pass(self.bank, Ctx(docs=docs, progress=self.progress), state, last)
        return run.run(self.plan.items, self._compute_dtype(self.embed(tokens, table))), run

    def _compute_dtype(self, x: Tensor) -> Tensor:
        device = x.device.type
        return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x

    def _head(self, name: str, x: Tensor, run: Pass) -> Tensor:
        step = self.heads[name](x, run.state(f"heads.{name}"), run.ctx)
        run.keep(f"heads.{name}", step.state, step.aux)
        return step.y

    def _logits(self, x: Tensor, unembed: Tensor, run: Pass, last: bool) -> Tensor:
        first = self.output_head
        for name in self.heads:
            if name != first and run.states is not None:
                self._head(name, x, run)  # its state must go on
        h = self._head(first, x, run)
        if last and h.shape[1]:
            h = h[:, -1:] if run.ctx.docs is None else _last_tokens(h, run.ctx.docs)
        return nn.functional.linear(h, unembed.to(h.dtype)).float()

    def _losses(
        self,
        x: Tensor,
        unembed: Tensor,
        labels: Tensor,
        weights: Tensor | None,
        docs: Docs | None,
        norms: Mapping[str, Tensor | float] | None,
        run: Pass,
        out: Output,
    ) -> None:
        total = x.new_zeros((), dtype=torch.float32)
        for name, head in self.named_heads():
            h = self._head(name, x, run).flatten(0, 1)
            targets = shift_targets(labels, head.shift, docs).flatten()
            w = None if weights is None else shift_weights(weights, head.shift).flatten()
            nats = linear_cross_entropy(h, unembed, targets, w)
            count = _count(targets, w)
            norm = count.clamp_min(1e-9) if norms is None else norms[name]
            total = total + head.weight * nats / norm
            out.sums[name] = (nats.detach(), count)
            out.losses[name] = nats.detach() / count.clamp_min(1e-9)
        out.loss = total

    def nll(self, tokens: Tensor, docs: Docs | None = None) -> dict[str, Tensor]:
        """{head: [B, T] nats of what the head predicts at each position}; nan where there is no target."""
        out = {}
        for name, (h, unembed, targets) in self._predictions(tokens, docs).items():
            nats = linear_cross_entropy(h, unembed, targets.flatten(), reduction="none")
            out[name] = nats.view_as(targets).masked_fill(targets == IGNORE, float("nan"))
        return out

    def top1(self, tokens: Tensor, docs: Docs | None = None) -> dict[str, tuple[int, int]]:
        """{head: (targets that are the head's likeliest token, targets)}."""
        out = {}
        for name, (h, unembed, targets) in self._predictions(tokens, docs).items():
            flat = targets.flatten()
            out[name] = int((linear_argmax(h, unembed) == flat).sum()), int((flat != IGNORE).sum())
        return out

    @torch.no_grad()
    def _predictions(self, tokens: Tensor, docs: Docs | None) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """{head: (states [B*T, D], unembedding [V, D], targets [B, T])}."""
        table = self.embed.table()
        x, run = self._trunk(tokens, table, docs, None)
        return {
            name: (
                self._head(name, x, run).flatten(0, 1),
                self.embed.output_table(table),
                shift_targets(tokens, head.shift, docs),
            )
            for name, head in self.named_heads()
        }

    @torch.no_grad()
    def head_counts(
        self, labels: Tensor, docs: Docs | None = None, weights: Tensor | None = None
    ) -> dict[str, Tensor]:
        """{head: sum of weights of its supervised tokens}, without a forward pass."""
        out = {}
        for name, head in self.named_heads():
            w = None if weights is None else shift_weights(weights, head.shift)
            out[name] = _count(shift_targets(labels, head.shift, docs), w)
        return out

    # -- state

    def named_heads(self) -> list[tuple[str, Head]]:
        return [(name, cast(Head, head)) for name, head in self.heads.items()]

    @property
    def output_head(self) -> str:
        """The head that generates: the first that predicts the next token, else the first."""
        for name, head in self.named_heads():
            if head.shift == 1:
                return name
        return next(iter(self.heads))

    def init_state(self, batch: int, capacity: int | None = None, dtype: torch.dtype | None = None) -> States:
        """An empty state for `batch` rows; capacity: see `core.Block.init_state`."""
        like = torch.empty((), device=self.embed.weight.device, dtype=dtype or torch.float32)
        states: States = {}
        for item in self.plan.walk():
            module: Any = self.bank[item.module]
            if isinstance(item, Visit | Cross) or (isinstance(item, Bracket) and not item.turned):
                states[item.site] = module.init_state(batch, like, capacity)
        for name, head in self.named_heads():
            states[f"heads.{name}"] = head.init_state(batch, like, capacity)
        return states

    def generate(self, tokens: Tensor, max_new_tokens: int = 50, **options: Any) -> Tensor:
        """Prompt [B, T] + new tokens [B, T + n]; options as in `model.generate.generate`."""
        return generate(self, tokens, max_new_tokens, **options)

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


def scale_residual_outputs(module: nn.Module, visits: int) -> None:
    """Divide every residual output projection by sqrt(visits): the stream's variance stays O(1)."""
    with torch.no_grad():
        for linear in residual_outputs(module):
            linear.weight /= visits**0.5


def residual_outputs(module: nn.Module) -> list[nn.Linear]:
    """The Linears that write to the residual stream: those a block marks `residual_out`."""
    return [m for m in module.modules() if isinstance(m, nn.Linear) and getattr(m, "residual_out", False)]


def _build(spec: ModuleSpec, norm_eps: float) -> nn.Module:
    module: nn.Module
    if spec.kind == "block":
        module = Residual(make_block(spec.name, spec.dim, **spec.params), norm_eps)
    elif spec.kind == "quant":
        module = make_quantizer(spec.name, spec.dim, **spec.params)
    elif spec.kind == "wrap":
        module = make_wrap(spec.name, spec.dim, **spec.params)
    elif spec.kind == "memory":
        module = KVMemory(spec.dim, **spec.params)
    elif spec.kind == "adapter":
        module = Adapter(spec.dim, **spec.params)
    else:
        module = Faded(**spec.params)
    if not isinstance(module, Residual | Bottleneck | Faded | KVMemory):
        raise TypeError(f"{spec.name} is not a block or a bottleneck")
    return module.requires_grad_(not spec.frozen)


def _count(targets: Tensor, weights: Tensor | None) -> Tensor:
    keep = targets != IGNORE
    return (keep.float() if weights is None else keep * weights.float()).sum()


def _last_tokens(h: Tensor, docs: Docs) -> Tensor:
    """[B, 1, D]: the state at each row's last token that is not padding."""
    return h.gather(1, docs.last_places()[:, None, None].expand(-1, 1, h.shape[2]))
