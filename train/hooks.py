"""What happens around the steps of a run: log, evaluate, save, and stop when told to."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from dataset.tokenizers import Tokenizer
from dataset.views import View
from model.config import dumps
from model.schema import Config
from train import checkpoint, optim, replay
from train.feed import Micro
from train.guard import NOT_FINITE
from train.heldout import Scores, evaluate
from train.loop import due
from train.meter import StepResult
from train.metrics import Log
from train.sampling import sample
from train.sites import site_stats
from train.state import TrainState
from train.tracing import Tracer
from train.world import World


class Signals:
    """SIGINT and SIGTERM raise a flag; the step in hand is finished and saved first.

    A second SIGINT interrupts at once, but not under torchrun, which passes on the one it got itself.
    """

    def __init__(self, alone: bool) -> None:
        self.caught: int | None = None
        self._alone = alone
        self._old: dict[int, Any] = {}

    def _catch(self, number: int, frame: FrameType | None) -> None:
        if self.caught == signal.SIGINT == number and self._alone:
            raise KeyboardInterrupt
        self.caught = self.caught or number

    def __enter__(self) -> Signals:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._old[number] = signal.signal(number, self._catch)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)


class RunHooks:
    """The hooks of a run in a folder; see `loop.Hooks`."""

    def __init__(
        self,
        run: Path,
        config: Config,
        heldout: View | None,
        log: Log,
        world: World,
        signals: Signals,
        peak: float,
        tokenizer: Tokenizer | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        """tokenizer: for sample text while training, or None. tracer: of --profile."""
        self.run, self.config, self.heldout, self.log = run, config, heldout, log
        self.world, self.signals, self.peak = world, signals, peak
        self.tokenizer, self.tracer = tokenizer, tracer
        self._text = dumps(config)
        self._flops: float | None = None
        self._gate: View | None = None

    def after_step(self, state: TrainState, result: StepResult) -> None:
        state.meter.add(result)
        self._ending(state)
        if self.tracer is not None:
            self.tracer.step()
        if state.nowcast is not None and state.nowcast.news is not None:
            self.log.write("event", state.step, event="nowcast", **state.nowcast.news)
            state.nowcast.news = None
        if self.heldout is not None and due(state.step, self.config.run.stats_every):
            found = site_stats(state.model, self.heldout, self.config, self.world)
            self.log.write("sites", state.step, **found)
        if state.step % self.config.run.log_every and not state.outer.finished(state):
            return
        means = state.meter.read()
        if self._flops is None:
            self._flops = state.model.flops_per_token(self.config.run.context)
        means["mfu"] = means["tokens_per_s"] * self._flops / self.peak if self.peak else None
        where: dict[str, Any] = {"tokens": state.tokens, "origin": state.origin}
        where |= {"lr": result.lr, "skipped": state.skipped}
        if traffic := state.outer.report():
            where["outer"] = traffic
        state.outer.tell(loss=means["loss"], tokens_per_s=means["tokens_per_s"])
        self.log.write("train", state.step, **where, **means)
        self.log.progress(state.at, state.schedule.total, train_line(means, result.lr, state))

    def refused(self, state: TrainState, micros: Sequence[Micro], result: StepResult) -> None:
        """Record a step that was not taken; the first of a row that is not finite is kept for replay."""
        fields = {"reason": result.refused, "loss": result.loss, "grad_norm": result.grad_norm}
        self.log.write("event", state.step, event="skip", **fields)
        why = "not finite" if result.refused == NOT_FINITE else f"{result.refused} far above those before"
        self.log.say(f"step {state.step}: {why} (loss {result.loss}, |g| {result.grad_norm}), skipped")
        if result.refused == NOT_FINITE and state.skipped_in_a_row == 1:
            where = replay.keep(self.run, state, micros, result, self._text, self.world)
            self.log.say(f"its batch and state are kept: python train/pretrain.py --replay {where}")

    def score(self, state: TrainState, tokens: int) -> tuple[float, int]:
        """Held-out loss of the model as it is, in another order of rows than `evaluate` has, and the tokens
        that were scored: less than `tokens` where they are not whole groups of rows, or not there."""
        assert self.heldout is not None  # settled
        if self._gate is None:
            run = self.config.run
            options: dict[str, Any] = {"packing": run.packing, "seed": 1, "split": "heldout"}
            self._gate = self.heldout.dataset.view(run.context, **options)
        asked = replace(self.config.run, eval_tokens=tokens)
        found = evaluate(state.model, self._gate, asked, self.world)
        return found.loss, found.tokens

    def evaluate(self, state: TrainState) -> None:
        if self.heldout is None:
            return
        state.model.advance(state.at, state.at / state.schedule.total)
        with optim.averaged(state.optimizer):
            scores = evaluate(state.model, self.heldout, self.config.run, self.world)
        fields: dict[str, Any] = {"tokens": state.tokens, "origin": state.origin, "loss": scores.loss}
        fields |= {"losses": scores.losses, "bpb": scores.bpb, "stats": scores.stats}
        if self.config.run.ema:
            with state.ema.applied():
                mean = evaluate(state.model, self.heldout, self.config.run, self.world)
            fields["ema"] = {"loss": mean.loss, "losses": mean.losses, "bpb": mean.bpb}
        self.log.write("eval", state.step, **fields)
        self.log.say(f"held-out  step {state.step}: {eval_line(scores)}")
        if self.config.run.sample and self.tokenizer is not None and not state.outer.finished(state):
            new = self.config.run.sample
            sample(state, self.config, self.heldout, self.tokenizer, self.log, self.world, new)
        if self.config.grow.when == "plateau":
            self._plateau(state, scores)

    def _plateau(self, state: TrainState, scores: Scores) -> None:
        """The rule needs a constant learning rate and a model whose new parts count fully."""
        if not state.schedule.stable(state.step) or state.step < state.model.fades_done_at:
            return
        flops = state.tokens * state.model.flops_per_token(self.config.run.context)
        state.outer.plateau(state, state.plateau.update(scores.groups, state.tokens, flops).reached)
        self._ending(state)

    def _ending(self, state: TrainState) -> None:
        """Say that a plateau ends the stage, at the step where it does."""
        if self.config.grow.when != "plateau" or state.schedule.started != state.step:
            return
        _, drop, threshold, _ = state.plateau.verdict
        self.log.write("event", state.step, event="plateau", drop=drop, threshold=threshold)
        self.log.say(
            f"step {state.step}: plateau (held-out loss falls by {drop:.5f} nats per evaluation, threshold "
            f"{threshold:.5f}); the stage ends at step {state.schedule.total}"
        )

    def save(self, state: TrainState, replace: bool = False) -> None:
        run = self.config.run
        tensors, rest = state.model_tensors(), state.state_dict()
        checkpoint.save(self.run, state.step, tensors, rest, self._text, run.keep, self.world, replace)
        self.log.write("event", state.step, event="save")

    def stopping(self) -> bool:
        return self.world.any(self.signals.caught is not None)


def train_line(means: dict[str, Any], lr: float, state: TrainState) -> str:
    heads = "  ".join(f"{head} {value:.3f}" for head, value in means["losses"].items())
    mfu = f"  MFU {means['mfu']:.1%}" if means["mfu"] is not None else ""
    left = state.schedule.total - state.at  # async: at the speed of one worker a shard
    per_step = state.tokens / max(1, state.step) / means["tokens_per_s"]
    return (
        f"loss {means['loss']:.4f}  {heads}  lr {lr:.2e}  |g| {means['grad_norm']:.2f}  "
        f"{means['tokens_per_s']:,.0f} tok/s{mfu}  ETA {duration(left * per_step)}"
    )


def eval_line(scores: Scores) -> str:
    parts = []
    for head, nats in scores.losses.items():
        parts.append(f"{head} {nats:.4f} nats ({scores.bpb[head]:.3f} bits/byte)")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """90 -> 1m30s"""
    if not seconds < 1e9:  # also NaN
        return "?"
    s = round(seconds)
    if s < 60:
        return f"{s}s"
    if s < 3600:
        return f"{s // 60}m{s % 60:02d}s"
    return f"{s // 3600}h{s % 3600 // 60:02d}m"
