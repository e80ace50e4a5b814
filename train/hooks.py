"""What happens around the steps of a run: log, evaluate, save, and stop when told to."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType
from typing import Any

from dataset.views import View
from model.config import dumps
from model.schema import Config
from train import checkpoint, optim
from train.heldout import Scores, evaluate
from train.meter import StepResult
from train.metrics import Log
from train.state import TrainState
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
    ) -> None:
        self.run, self.config, self.heldout, self.log = run, config, heldout, log
        self.world, self.signals, self.peak = world, signals, peak
        self._text = dumps(config)
        self._flops: float | None = None

    def after_step(self, state: TrainState, result: StepResult) -> None:
        state.meter.add(result)
        if not result.applied:
            self.log.write("event", state.step, event="skip", loss=result.loss, grad_norm=result.grad_norm)
            self.log.say(f"step {state.step}: not finite (loss {result.loss}), skipped")
        if state.step % self.config.run.log_every and state.step < state.schedule.total:
            return
        means = state.meter.read()
        if self._flops is None:
            self._flops = state.model.flops_per_token(self.config.run.context)
        means["mfu"] = means["tokens_per_s"] * self._flops / self.peak if self.peak else None
        where = {"tokens": state.tokens, "origin": state.origin, "lr": result.lr, "skipped": state.skipped}
        self.log.write("train", state.step, **where, **means)
        self.log.progress(state.step, state.schedule.total, train_line(means, result.lr, state))

    def evaluate(self, state: TrainState) -> None:
        if self.heldout is None:
            return
        state.model.advance(state.step, state.step / state.schedule.total)
        with optim.averaged(state.optimizer):
            scores = evaluate(state.model, self.heldout, self.config.run, self.world)
        fields: dict[str, Any] = {"tokens": state.tokens, "origin": state.origin, "loss": scores.loss}
        fields |= {"losses": scores.losses, "bpb": scores.bpb, "stats": scores.stats}
        self.log.write("eval", state.step, **fields)
        self.log.say(f"held-out  step {state.step}: {eval_line(scores)}")
        if self.config.grow.when == "plateau":
            self._plateau(state, scores)

    def _plateau(self, state: TrainState, scores: Scores) -> None:
        """The rule needs a constant learning rate and a model whose new parts count fully."""
        if not state.schedule.stable(state.step) or state.step < state.model.fades_done_at:
            return
        verdict = state.plateau.update(scores.groups, state.tokens)
        if verdict.reached and state.outer.boundary(state.step):
            state.schedule.start_decay(state.step)
            self.log.write(
                "event", state.step, event="plateau", drop=verdict.drop, threshold=verdict.threshold
            )
            self.log.say(
                f"step {state.step}: plateau (held-out loss falls by {verdict.drop:.5f} nats per evaluation, "
                f"threshold {verdict.threshold:.5f}); the stage ends at step {state.schedule.total}"
            )

    def save(self, state: TrainState) -> None:
        run = self.config.run
        tensors, rest = state.model_tensors(), state.state_dict()
        checkpoint.save(self.run, state.step, tensors, rest, self._text, run.keep, self.world)
        self.log.write("event", state.step, event="save")

    def stopping(self) -> bool:
        return self.world.any(self.signals.caught is not None)


def train_line(means: dict[str, Any], lr: float, state: TrainState) -> str:
    heads = "  ".join(f"{head} {value:.3f}" for head, value in means["losses"].items())
    mfu = f"  MFU {means['mfu']:.1%}" if means["mfu"] is not None else ""
    left = state.schedule.total - state.step
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
