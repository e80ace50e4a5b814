"""What is recorded, and the tables and pages made of it."""

from __future__ import annotations

import pytest

from train import metrics
from train.evaluate import task_table
from train.pretrain import main
from train.report import History, happenings


def test_records_after_a_rewind_are_kept(tmp_path) -> None:
    """Whichever comes first: the log, or the new file that `rewind` puts in its place."""
    before = metrics.Log(tmp_path, True, 4)
    for step in (1, 2, 3):
        before.write("train", step, loss=float(step))
    before.close()
    log = metrics.Log(tmp_path, True, 4)
    metrics.rewind(tmp_path, 2)
    log.write("train", 3, loss=30.0)
    log.close()
    assert [(r["step"], r["loss"]) for r in metrics.read(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_ranks_beyond_the_first_and_dry_runs_write_nothing(tmp_path) -> None:
    for log in (metrics.Log(tmp_path, False, 4), metrics.Log(None, True, 4)):
        log.write("train", 1, loss=1.0)
        log.close()
    assert not list(tmp_path.iterdir())


def test_a_missing_score_leaves_its_cell_empty() -> None:
    table = task_table("mqar", {"4": {"accuracy": 0.5}, "8": {"passes": 1200, "accuracy": 0.25}})
    columns = {str(c.header): list(c.cells) for c in table.columns}
    assert columns == {"": ["4", "8"], "accuracy": ["0.500", "0.250"], "passes": ["", "1,200"]}


@pytest.mark.parametrize(
    "reason, said", [("not finite", "not finite"), ("grad_norm", "grad_norm far above those before")]
)
def test_the_page_says_why_a_step_was_skipped(reason: str, said: str) -> None:
    skip = {"event": "skip", "step": 7, "reason": reason}
    lines = happenings([History("tiny", {}, [], [], [skip], [])])
    assert f"- tiny: step 7 skipped, {said}" in lines


def test_a_model_that_cannot_run_token_by_token_ends_without_sample_text(
    place, data, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(place)
    (place / "ahead.yaml").write_text(
        "extends: tiny.yaml\n"
        "stack: [{wrap: {by: {mod: {router: topk}}, inner: [{mlp: {mult: 2, multiple_of: 8}}]}}]\n"
    )
    words = ["--arch", "ahead.yaml", "--data", str(data), "--set", "run.steps=2"]
    assert main(words) == 0
    assert "no sample text: mod: the router `topk`" in " ".join(capsys.readouterr().out.split())
