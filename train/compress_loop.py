"""Training a context compressor: the steps, the held-out loss, checkpoints that resume bit for bit.

A step is: accumulate micro batches, average gradients over ranks, clip, step. Which examples a step takes and
what it draws at random follow from (seed, step) alone.

Shape legend: B batch.
"""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dataset.files import write_bytes
from model.compress import ContextCompressor
from model.compress.autocompressor import SegmentCompressor
from model.compress.bptt import backward_document
from model.compress.clusters import Clusters
from model.compress.evaluate import losses_of, misfit
from model.compress.saving import tensors_of
from train import checkpoint
from train.compress_data import Example, collate, padded
from train.errors import Diverged, UserError
from train.hooks import Signals
from train.metrics import Log
from train.world import World, autocast, seed_step

CONFIG = "config.json"  # of a run: data, reading, settings, method
PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True)
class Settings:
    """What a run does.

    batch: examples per step over all ranks.  micro: per forward pass.  warmup: share of the steps.
    objective: lm (every token of the text, prompts too) | ae (the context again) | qa (answers alone) |
    distill | document (all segments of a text, AutoCompressors) | through (the text itself, clusters in
    quality mode).  The held-out loss is that of the answers, or of the whole target, whatever the objective.
    precision: fp32 or bf16.  clip: norm of the gradient.  learning_rate None: the method's own.
    generate_tokens: of every sample.
    """

    steps: int = 500
    batch: int = 8
    micro: int = 4
    objective: str = "lm"
    learning_rate: float | None = None
    weight_decay: float = 1e-5
    warmup: float = 0.05
    clip: float = 1.0
    eval_steps: int = 100
    eval_examples: int = 64
    save_steps: int = 100
    seed: int = 0
    precision: str = "fp32"
    generate_tokens: int = 24


def optimizer_for(compressor: ContextCompressor, settings: Settings) -> torch.optim.Optimizer:
    """AdamW with the method's grouped learning rates; one rate for all if the settings name it."""
    rates = compressor.learning_rates() if settings.learning_rate is None else {}
    groups: dict[float, list[nn.Parameter]] = {}
    for name, p in compressor.named_parameters():
        if p.requires_grad:
            rate = next(
                (r for prefix, r in rates.items() if name.startswith(prefix)), settings.learning_rate or 1e-4
            )
            groups.setdefault(rate, []).append(p)
    if not groups:
        raise UserError(f"method {compressor.registered_name} has nothing to train with these options")
    made = [{"params": ps, "lr": r, "base_lr": r} for r, ps in groups.items()]
    return torch.optim.AdamW(made, weight_decay=settings.weight_decay, betas=(0.9, 0.95))


class Fit:
    """One run: a compressor, its data and its folder."""

    def __init__(
        self, compressor: ContextCompressor, train: list[Example], heldout: list[Example], settings: Settings,
        run: Path, log: Log, world: World, described: dict[str, Any], decode: Any = None,
    ) -> None:  # fmt: skip
        self.c, self.train_rows, self.heldout, self.s = compressor, train, heldout, settings
        self.run, self.log, self.world, self.decode = run, log, world, decode
        self.described = json.dumps(described, indent=1, sort_keys=True)
        self.optimizer = optimizer_for(compressor, settings)
        self.step, self.best = 0, math.inf
        self.misfit = misfit(compressor, heldout[: settings.eval_examples])

    # ------------------------------------------------------------------ state

    def save(self) -> None:
        if self.world.main:
            optimizer = self.optimizer.state_dict()
            optimizer["state"] = {str(k): v for k, v in optimizer["state"].items()}  # names, as JSON has them
            state = {"optimizer": optimizer, "best": self.best}
            checkpoint.save(self.run, self.step, tensors_of(self.c), state, self.described, keep=1)

    def resume(self) -> bool:
        """Go back to the newest whole checkpoint, if there is one. Raises UserError for another run's."""
        path, _ = checkpoint.newest(self.run)
        if path is None:
            return False
        if (path / checkpoint.CONFIG).read_text() != self.described:
            raise UserError(f"{self.run}: was begun with other options; see {path / checkpoint.CONFIG}")
        saved = checkpoint.load(path)
        self.c.load_state_dict(saved.model)
        optimizer = saved.train["optimizer"]
        optimizer["state"] = {int(k): v for k, v in optimizer["state"].items()}
        self.optimizer.load_state_dict(optimizer)
        self.step, self.best = saved.step, float(saved.train["best"])
        return True

    # ------------------------------------------------------------------ steps

    def examples(self, step: int) -> list[Example]:
        """This rank's share of a step: a fresh order every epoch, by seed."""
        n, batch = len(self.train_rows), self.s.batch
        picked = []
        for i in range(step * batch, (step + 1) * batch):
            order = self._order(i // n)
            picked.append(self.train_rows[order[i % n]])
        return picked[self.world.rank :: self.world.size]

    def _order(self, epoch: int) -> list[int]:
        if getattr(self, "_epoch", None) != epoch:
            self._permutation = list(range(len(self.train_rows)))
            random.Random(f"{self.s.seed}/{epoch}").shuffle(self._permutation)
            self._epoch = epoch
        return self._permutation

    def backward(self, rows: list[Example], share: float) -> dict[str, float]:
        """Add the gradient of a micro batch, times its share of the step; its losses as numbers."""
        objective, device = self.s.objective, self.world.device
        if objective in ("document", "through"):  # joined row by row, so that no padding lies inside
            ids, mask = (t.to(device) for t in padded([(*e.context, *e.text) for e in rows]))
            if objective == "document":
                assert isinstance(self.c, SegmentCompressor)
                generator = torch.Generator().manual_seed(self.s.seed * 1_000_003 + self.step)
                return backward_document(self.c, ids, mask, generator=generator, scale=share)
            assert isinstance(self.c, Clusters)
            out = self.c.through(ids, mask, labels=ids)
        else:
            b = collate(rows).to(device)
            out = self.c(
                b.context, b.text, b.labels if objective == "qa" else None, objective,
                context_mask=b.context_mask, attention_mask=b.text_mask,
                source_ids=b.source, source_mask=b.source_mask,
            )  # fmt: skip
        assert out.loss is not None
        if out.loss.requires_grad:
            (out.loss * share).backward()
        parts = {"loss": out.loss, **out.losses, **out.stats}
        return {k: float(v.detach()) for k, v in parts.items()}

    def train_step(self) -> dict[str, float]:
        seed_step(self.s.seed, self.step, self.world.rank)
        self.c.train()
        self.optimizer.zero_grad(set_to_none=True)
        rows, sums = self.examples(self.step), dict[str, float]()
        for at in range(0, len(rows), self.s.micro):
            part = rows[at : at + self.s.micro]
            with autocast(self.world.device, self.s.precision):
                losses = self.backward(part, len(part) / self.s.batch)
            for k, v in losses.items():
                sums[k] = sums.get(k, 0.0) + v * len(part) / len(rows)
        params = [p for g in self.optimizer.param_groups for p in g["params"] if p.grad is not None]
        for p in params:
            self.world.sum(p.grad)
        norm = float(nn.utils.clip_grad_norm_(params, self.s.clip)) if params else 0.0
        if not math.isfinite(norm):
            raise Diverged(f"step {self.step}: the gradient's norm is {norm}; lower --learning_rate")
        ramp = max(1, round(self.s.warmup * self.s.steps))
        falling = max(0, self.step - ramp) / max(1, self.s.steps - ramp)
        factor = min(1.0, (self.step + 1) / ramp) * 0.5 * (1 + math.cos(math.pi * falling))
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        self.optimizer.step()
        self.step += 1
        return {**sums, "grad_norm": norm, "lr": self.optimizer.param_groups[0]["lr"]}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Held-out nats per token after the compressed context, and after the whole one where it fits.

        The best is kept as it was scored: the parachute moves the threshold afterwards.
        """
        self.c.eval()
        rows, tokens = self.heldout[: self.s.eval_examples], 0
        names = {"loss": "compressed"} | ({} if self.misfit else {"full": "full"})
        sums = dict.fromkeys(names, 0.0)
        for at in range(0, len(rows), self.s.micro):
            b = collate(rows[at : at + self.s.micro]).to(self.world.device)
            found, count = losses_of(self.c, b, tuple(names.values()))
            for key, variant in names.items():
                sums[key] += float(found[variant].sum())
            tokens += int(count.sum())
        scores = {key: nats / max(tokens, 1) for key, nats in sums.items()}
        if scores["loss"] < self.best:
            self.best = scores["loss"]
            if self.world.main:
                self.c.save(self.run / "best")
        if (
            isinstance(self.c, Clusters)
            and self.c.config.adaptive_threshold
            and self.step
            and "full" in scores
        ):
            scores["tau"] = self.c.parachute(scores["loss"] / max(scores["full"], 1e-9))
        return scores

    @torch.no_grad()
    def sample(self) -> str:
        """What the decoder writes after the first held-out context and prompt."""
        row = self.heldout[0]
        prompt = row.text[: row.prompt or min(8, len(row.text))]
        ids = torch.tensor([row.read], device=self.world.device)
        text = torch.tensor([prompt], device=self.world.device)
        out = self.c.generate(
            text, self.c.compress(ids), max_new_tokens=self.s.generate_tokens, do_sample=False, pad_token_id=0
        )
        return str(self.decode(out[0].tolist()))

    def fit(self, signals: Signals) -> bool:
        """Train to the end (True), or until a signal (False); both leave a checkpoint."""
        if self.world.main:
            write_bytes(self.run / CONFIG, self.described.encode())
        if self.misfit:
            self.log.say(f"no loss after the full context is measured: {self.misfit}")
        while True:
            due = self.step % self.s.eval_steps == 0 or self.step == self.s.steps
            if due:
                scores = self.evaluate()
                self.log.write("eval", self.step, **scores)
                full = f", full context {scores['full']:.4f}" if "full" in scores else ""
                self.log.say(f"step {self.step}: held-out {scores['loss']:.4f}{full}")
                if self.decode is not None and self.world.main:
                    self.log.write("sample", self.step, text=self.sample())
            if self.step >= self.s.steps:
                break
            result = self.train_step()
            self.log.write("train", self.step, **result)
            self.log.progress(self.step, self.s.steps, f"loss {result['loss']:.4f}")
            if self.step % self.s.save_steps == 0:
                self.save()
            if self.world.any(signals.caught is not None):
                self.save()
                return False
        self.save()
        if self.world.main:
            self.c.save(self.run / "last")
        return True
