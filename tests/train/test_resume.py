"""A run that was stopped and resumed is the run that was not: bit for bit."""

from __future__ import annotations

import shutil

import pytest
import torch

from tests.train.conftest import Fit, equal
from train import checkpoint
from train.errors import UserError
from train.outer import team


def test_resumed_twice_is_bit_equal(request_of) -> None:
    whole = Fit(request_of("whole"))
    assert whole.finished
    for stop, resume in (
        (5, False),
        (10, True),
    ):  # no multiple of log_, save_ or eval_every
        part = Fit(request_of("parts", resume=resume), stop_after=stop)
        assert not part.finished and part.state.step == stop
    parts = Fit(request_of("parts", resume=True))
    assert parts.finished
    assert equal(whole.tensors(), parts.tensors())
    assert whole.losses() == parts.losses()


def test_going_back_to_an_older_checkpoint_gives_the_same_end(request_of) -> None:
    whole = Fit(request_of("run", "run.keep=9"))
    newest = checkpoint.saved(whole.stage.folder)[0]
    (newest / checkpoint.MODEL).write_bytes(b"half")
    again = Fit(request_of("run", "run.keep=9", resume=True))
    assert equal(whole.tensors(), again.tensors())
    assert whole.losses() == again.losses()
    assert checkpoint.verify(newest) == 12  # the damaged one was set aside, not written into


def test_going_back_sets_newer_checkpoints_aside(request_of, monkeypatch) -> None:
    """The others of a launch have step 4 alone, so this one goes back too; what it saves then is its own."""
    keep = "run.keep=9"
    whole = Fit(request_of("whole", keep))
    Fit(request_of("run", keep))
    saved = checkpoint.folder_of(request_of("run").run)
    for step in ("step_00000008", "step_00000012"):
        (saved / step / "of the first time").touch()
    monkeypatch.setattr(team, "_gather", lambda mine: [mine, ("other", ["step_00000000", "step_00000004"])])
    again = Fit(request_of("run", keep, resume=True))
    assert equal(whole.tensors(), again.tensors()) and whole.losses() == again.losses()
    for step in ("step_00000008", "step_00000012"):
        assert not (saved / step / "of the first time").exists()
        assert (saved / f"{step}.aside0" / "of the first time").exists()


@pytest.mark.parametrize("lost", ["mine", "other"])
def test_a_lost_folder_is_no_reason_to_begin_anew(request_of, monkeypatch, lost) -> None:
    whole = Fit(request_of("run"))
    folder = whole.stage.folder if lost == "other" else whole.stage.folder / "workers" / "1"
    there = [] if lost == "other" else ["step_00000008"]
    monkeypatch.setattr(team, "_gather", lambda mine: [mine, ("other", there)])
    before = {p: p.read_bytes() for p in whole.stage.folder.rglob("*") if p.is_file()}
    with pytest.raises(UserError, match=r"no checkpoint that every rank has(.|\n)*: none\n"):
        Fit(request_of(folder, resume=True))
    assert before == {p: p.read_bytes() for p in whole.stage.folder.rglob("*") if p.is_file()}
    monkeypatch.setattr(team, "_gather", lambda mine: [mine, ("other", [])])
    assert Fit(request_of("new", resume=True)).finished  # nobody has anything: all begin together


def test_killed_before_the_first_checkpoint(request_of) -> None:
    whole = Fit(request_of("whole"))
    part = Fit(request_of("part"), stop_after=2)
    shutil.rmtree(checkpoint.folder_of(part.stage.folder))
    again = Fit(request_of("part", resume=True))
    assert equal(whole.tensors(), again.tensors()) and whole.losses() == again.losses()


def test_micro_batches_do_not_change_the_step(request_of) -> None:
    one, four = Fit(request_of("one", "run.micro=4")), Fit(request_of("four", "run.micro=1"))
    for name, value in one.tensors().items():
        torch.testing.assert_close(four.tensors()[name], value, rtol=1e-3, atol=1e-5, msg=name)


def test_bf16_resume_is_bit_equal(request_of) -> None:
    whole = Fit(request_of("whole", "run.precision=bf16"))
    Fit(request_of("parts", "run.precision=bf16"), stop_after=7)
    parts = Fit(request_of("parts", "run.precision=bf16", resume=True))
    assert equal(whole.tensors(), parts.tensors()) and whole.losses() == parts.losses()


def test_growth_starts_where_the_smaller_model_ended(request_of, place) -> None:
    from train.rundir import set_status

    small = Fit(request_of("small1", arch="small1"))
    set_status(small.stage.folder, "complete", step=8)
    grown = Fit(request_of("small2", arch="small2"), stop_after=5)
    at = {r["step"]: r for r in grown.records if r["kind"] == "eval"}
    end = [r for r in small.records if r["kind"] == "eval"][-1]
    assert at[0]["losses"] == end["losses"]  # bit-equal logits at insertion, blend 0
    names = {n for group in grown.state.optimizer.param_groups for n in group["names"]}
    frozen = {n for n, p in grown.state.model.named_parameters() if not p.requires_grad}
    assert frozen and not names & frozen
    old = small.state.model_tensors()
    assert all(torch.equal(grown.state.model_tensors()[n], old[n]) for n in frozen if n in old)
    scales = {n: g["lr_scale"] for g in grown.state.optimizer.param_groups for n in g["names"]}
    assert scales["heads.next.norm.weight"] == 0.5 and grown.state.origin == small.state.tokens
    whole = Fit(request_of("again2", arch="small2"))
    rest = Fit(request_of("small2", arch="small2", resume=True))
    assert equal(whole.tensors(), rest.tensors()) and whole.losses() == rest.losses()


def test_held_out_loss_is_that_of_the_saved_weights(request_of, place) -> None:
    """Also where the token table is kept between calls: behind pretrained rows."""
    from safetensors.torch import save_file

    import model
    from train.heldout import evaluate
    from train.world import World

    (place / "rows").mkdir()
    save_file({"model.embed_tokens.weight": torch.randn(260, 48)}, place / "rows" / "model.safetensors")
    embed = f"embed={{from: {place / 'rows'}, frozen: true, project: 32}}"
    for sets in ((embed,), (embed, "run.precision=bf16")):
        done = Fit(request_of(f"run{len(sets)}", *sets))
        logged = [r["losses"] for r in done.records if r["kind"] == "eval"]
        assert done.stage.heldout is not None and logged[-1] != logged[-2]
        again = evaluate(model.load(done.stage.folder), done.stage.heldout, done.config.run, World())
        assert again.losses == logged[-1]


def test_records_after_the_save_are_written_again(request_of) -> None:
    """Stopped right after its first save, at step 0, a run evaluates step 0 once more and logs it once."""
    from train.metrics import read

    whole = Fit(request_of("whole"))
    part = Fit(request_of("part"), stop_after=1)
    newest, first = checkpoint.saved(part.stage.folder)
    assert first.name == "step_00000000"
    shutil.rmtree(newest)
    again = Fit(request_of("part", resume=True))
    assert whole.losses() == again.losses() and equal(whole.tensors(), again.tensors())
    assert [r["step"] for r in read(again.stage.folder) if r["kind"] == "eval"] == [0, 4, 8, 12]


def test_a_plateau_ends_the_stage_early_and_survives_a_resume(request_of) -> None:
    """A rule that counts any fall below half the loss as flat: it fires as soon as it may, then decays."""
    sets = ("grow={when: plateau, delta: 0.5, tokens_per_param: 0.02}", "run.steps=100", "run.eval_every=2")
    sets += ("schedule={warmup: 2, decay: 0.2}", "optim.lr=1e-3")
    whole = Fit(request_of("whole", *sets))
    (event,) = (r for r in whole.records if r.get("event") == "plateau")
    # Evaluations count after warm-up (4, 6, ...): the fifth gives the first check, the third check ends.
    assert event["step"] == 16 and whole.finished
    assert whole.state.step == whole.state.schedule.total == 20  # and a fifth of the run is decay
    for stop, resume in ((11, False), (17, True)):
        Fit(request_of("parts", *sets, resume=resume), stop_after=stop)
    parts = Fit(request_of("parts", *sets, resume=True))
    assert equal(whole.tensors(), parts.tensors()) and whole.losses() == parts.losses()
