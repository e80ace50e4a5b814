"""A run answering the questions of others: log-likelihoods and greedy text, and lm-evaluation-harness on top.

    scorer = RunScorer(model.load(run), Text(run / "tokenizer.json"))
    scorer.score("The sky is", " blue")              # nats, and whether greedy decoding would say it
    harness_scores(scorer, ["lambada_openai"])       # needs the extra [eval]

Anything with `score` and `write` can be measured, a compressed decoder too (experiments/compression).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from model.lm import LanguageModel
from model.text import Text
from train.errors import UserError
from train.world import autocast

CPU = torch.device("cpu")


class Scorer(Protocol):
    """What the harness asks of a model."""

    def score(self, context: str, continuation: str) -> tuple[float, bool]:
        """Log-likelihood of the continuation in nats, and whether it is what greedy decoding would write."""

    def write(self, context: str, until: list[str], max_new_tokens: int) -> str:
        """Greedy continuation, cut before the first of `until`."""


class RunScorer:
    """precision: of the run, `fp32` or `bf16`. end: the id that ends a document: what stands before an empty
    context, and where a text is over."""

    def __init__(self, lm: LanguageModel, text: Text, precision: str = "fp32", end: int = 0) -> None:
        self.lm, self.text, self.precision, self.end = lm.eval(), text, precision, end

    def _ids(self, context: str) -> list[int]:
        return self.text.encode(context) if context else [self.end]

    @torch.no_grad()
    def score(self, context: str, continuation: str) -> tuple[float, bool]:
        before, wanted = self._ids(context), self.text.encode(continuation)
        if not wanted:
            return 0.0, True
        ids = torch.tensor([before + wanted])
        with autocast(CPU, self.precision):
            logits = self.lm(ids[:, :-1]).logits[0, len(before) - 1 :].float()
        target = torch.tensor(wanted)
        nats = torch.nn.functional.cross_entropy(logits, target, reduction="sum")
        return -float(nats), bool((logits.argmax(-1) == target).all())

    @torch.no_grad()
    def write(self, context: str, until: list[str], max_new_tokens: int) -> str:
        """Raises UserError for a model that cannot run token by token."""
        try:
            self.lm.init_state(1)
        except ValueError as error:
            raise UserError(str(error)) from None
        ids = torch.tensor([self._ids(context)])
        with autocast(CPU, self.precision):
            made = self.lm.generate(ids, max_new_tokens=max_new_tokens, temperature=0.0, stop=self.end)
        new = made[0, ids.shape[1] :].tolist()
        if new[-1:] == [self.end]:
            new.pop()  # no text, and a decoder need not know that
        return cut_before(self.text.decode(new), until)


def cut_before(text: str, until: Sequence[str]) -> str:
    """The text before the first of the stop strings."""
    for stop in until:
        text = text.split(stop)[0] if stop else text
    return text


def harness_model(scorer: Scorer) -> Any:
    """An `lm_eval.api.model.LM`. Raises UserError, naming the extra, where lm-eval is not installed."""
    try:
        from lm_eval.api.model import LM
    except ImportError:
        raise UserError("lm-evaluation-harness is not installed: pip install 'latent-lab[eval]'") from None

    class Harness(LM):
        def loglikelihood(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            return [scorer.score(*r.args) for r in requests]

        def loglikelihood_rolling(self, requests: Any, **_: Any) -> list[float]:
            return [scorer.score("", r.args[0])[0] for r in requests]

        def generate_until(self, requests: Any, **_: Any) -> list[str]:
            out = []
            for r in requests:
                context, options = r.args
                until = options.get("until", [])
                until = [until] if isinstance(until, str) else until
                out.append(scorer.write(context, until, int(options.get("max_gen_toks", 64))))
            return out

    return Harness()


def harness_scores(scorer: Scorer, tasks: Sequence[str], limit: int | None = None) -> dict[str, Any]:
    """{task: {metric: value}} of the harness's own tasks, or of a task's YAML file. Raises UserError.

    What a task reads from a hub must be in its cache already where there is no network (HF_HUB_OFFLINE=1).
    """
    model = harness_model(scorer)
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    files = [Path(t) for t in tasks if t.endswith((".yaml", ".yml"))]
    if missing := [str(f) for f in files if not f.is_file()]:
        raise UserError(f"{missing[0]}: no such task file")
    folders = [str(f.parent) for f in files]
    names = [_task_name(Path(t)) if Path(t) in files else t for t in tasks]
    manager = TaskManager(include_path=folders or None, include_defaults=len(files) < len(tasks))
    try:
        found = simple_evaluate(
            model=model, tasks=names, task_manager=manager, limit=limit, bootstrap_iters=0, log_samples=False
        )
    except (KeyError, ValueError, ConnectionError, FileNotFoundError) as error:
        raise UserError(f"lm-eval: {', '.join(names)}: {error}") from error
    kept = {}
    for name, row in found["results"].items():
        kept[name] = {k: v for k, v in row.items() if isinstance(v, int | float) and "stderr" not in k}
    return kept


def _task_name(file: Path) -> str:
    import yaml

    class Loader(yaml.SafeLoader):
        """Task files name functions by tags of their own (`!function`); only the name is read here."""

    Loader.add_multi_constructor("!", lambda loader, suffix, node: None)
    named = yaml.load(file.read_text(), Loader)
    return str(named.get("task") or file.stem)
