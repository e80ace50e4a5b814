"""Scores of tasks: of a model that knows the answer, of one that does not, and of counted cases."""

from __future__ import annotations

import json
import sys
import types
from types import SimpleNamespace

import pytest
import torch

import model
from dataset.tokenizers import make
from train import taskeval
from train.errors import UserError
from train.harness import RunScorer, cut_before, harness_model, harness_scores

TINY = {
    "dim": 16,
    "vocab": 260,
    "stack": [{"mlp": {"mult": 2, "multiple_of": 8}}],
    "heads": {"next": {"shift": 1}},
}


class Oracle:
    """Looks the answer up: it says of every position what stands behind it in the row (mqar, copy)."""

    vocab = 260

    def __call__(self, tokens, docs=None):
        logits = torch.zeros(*tokens.shape, 260)
        logits[:, :-1].scatter_(2, tokens[:, 1:, None], 1.0)
        return SimpleNamespace(logits=logits)


class Blind(Oracle):
    def __call__(self, tokens, docs=None):
        return SimpleNamespace(logits=torch.zeros(*tokens.shape, 260))


@pytest.mark.parametrize("spec", ["mqar:pairs=2/8", "copy:lengths=3/5", "passkey:lengths=150/200,depths=0/1"])
def test_an_oracle_is_always_right(spec) -> None:
    right = taskeval.answer(Oracle(), make("bytes"), spec, samples=3)  # type: ignore[arg-type]
    wrong = taskeval.answer(Blind(), make("bytes"), spec, samples=3)  # type: ignore[arg-type]
    assert all(c["accuracy"] == c["token_accuracy"] == 1 for c in right.values())
    assert all(c["accuracy"] == c["token_accuracy"] == 0 for c in wrong.values())
    cells = 4 if spec.startswith("passkey") else 2
    assert len(right) == cells + 1 and right["all"]["answers"] == sum(
        c["answers"] for name, c in right.items() if name != "all"
    )


def test_an_answer_counts_when_all_its_tokens_are_right() -> None:
    places = torch.tensor([[0, 1, 1, 0, 2], [1, 0, 2, 2, 0]])
    hits = torch.tensor([[False, True, False, True, True], [True, False, True, True, False]])
    assert taskeval.tally(hits, places).tolist() == [4, 3, 6, 5]


def test_a_score_is_the_sum_of_the_models_own_losses() -> None:
    torch.manual_seed(0)
    lm = model.build(TINY)
    text = SimpleNamespace(
        encode=lambda s: list(s.encode()), decode=lambda ids: bytes(ids).decode(errors="replace")
    )
    scorer = RunScorer(lm, text)  # type: ignore[arg-type]
    nats = lm.nll(torch.tensor([list(b"abcdef")]))["next"][0]
    value, greedy = scorer.score("abc", "def")
    assert value == pytest.approx(-float(nats[2:5].sum()), abs=1e-4) and not greedy
    said = scorer.write("abc", [], 3)
    assert scorer.score("abc", said)[1] or "�" in said
    assert cut_before("one. two; three", [";", "."]) == "one"


def test_a_text_ends_with_its_document() -> None:
    class Says:
        """Writes "hi", ends the document and begins another."""

        def eval(self):
            return self

        def init_state(self, batch):
            return {}

        def generate(self, ids, max_new_tokens, temperature, stop):
            new = [*b"hi", 256, *b"more"][:max_new_tokens]
            new = new[: new.index(stop) + 1] if stop in new else new
            return torch.cat([ids, torch.tensor([new])], dim=1)

    text = SimpleNamespace(encode=lambda s: list(s.encode()), decode=lambda ids: bytes(ids).decode())
    scorer = RunScorer(Says(), text, end=256)  # type: ignore[arg-type]
    assert scorer.write("q", [], 20) == "hi" and scorer.write("q", ["i"], 20) == "h"
    assert scorer.write("q", [], 2) == "hi"


MMLU = {
    "algebra": "The following are questions.\n\n"
    "Q: What is 1+1?\n(A) 1 (B) 2 (C) 3 (D) 4\nA: Let's think. The answer is (B).\n\n"
    "Q: No choices here.\nA: The answer is (A).\n\n"
    "Q: And 2+2\nin all?\n(A) 1 (B) 2 (C) 3 (D) 4\nA: So. The answer is (D)."
}


def test_mmlu_questions_and_both_ways_of_asking(tmp_path, monkeypatch) -> None:
    (tmp_path / "p.json").write_text(json.dumps(MMLU))
    questions = taskeval.mmlu_questions(tmp_path / "p.json")
    assert [(q.text, q.choices, q.right) for q in questions] == [
        ("What is 1+1?", ("1", "2", "3", "4"), 1),
        ("And 2+2\nin all?", ("1", "2", "3", "4"), 3),
    ]
    knows = SimpleNamespace(score=lambda context, said: (1.0 if said.strip() in ("B", "2") else 0.0, False))
    assert taskeval.mmlu(knows, questions) == {  # type: ignore[arg-type]
        "letter": {"accuracy": 0.5, "answers": 2},
        "cloze": {"accuracy": 0.5, "answers": 2},
    }
    monkeypatch.setattr(taskeval.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"latent-lab\[eval\]"):
        taskeval.mmlu_questions()


def test_the_harness_is_asked_for_by_name(monkeypatch) -> None:
    for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r"latent-lab\[eval\]"):
        harness_model(SimpleNamespace())


def test_the_adapter_answers_what_the_harness_asks(monkeypatch) -> None:
    """Against the harness's own base class where it is installed, else against its interface."""
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        api = types.ModuleType("lm_eval.api.model")
        api.LM = type("LM", (), {})  # type: ignore[attr-defined]
        for name, module in (("lm_eval", types.ModuleType("lm_eval")), ("lm_eval.api.model", api)):
            monkeypatch.setitem(sys.modules, name, module)
    asked = []

    class Scorer:
        def score(self, context, continuation):
            asked.append((context, continuation))
            return -1.5, True

        def write(self, context, until, max_new_tokens):
            return f"{context}{until}{max_new_tokens}"

    lm = harness_model(Scorer())
    ask = lambda *args: [SimpleNamespace(args=args)]  # noqa: E731
    assert lm.loglikelihood(ask("a", "b")) == [(-1.5, True)]
    assert lm.loglikelihood_rolling(ask("text")) == [-1.5] and asked == [("a", "b"), ("", "text")]
    assert lm.generate_until(ask("q", {"until": "\n", "max_gen_toks": 5})) == ["q['\\n']5"]


TASK = """
task: sky
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
"""


@pytest.mark.slow
def test_evaluation_by_the_harness_itself(tmp_path) -> None:
    """evaluation: a task file of the harness, offline."""
    pytest.importorskip("lm_eval", reason="the extra [eval] is not installed")
    rows = [{"question": "The sky is", "choices": [" blue", " red"], "answer": 0}] * 3
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "sky.yaml").write_text(TASK.replace("FILE", str(tmp_path / "q.jsonl")))
    knows = SimpleNamespace(score=lambda context, said: (-float("red" in said), False))
    found = harness_scores(knows, [str(tmp_path / "sky.yaml")])  # type: ignore[arg-type]
    assert found["sky"]["acc,none"] == 1.0
