"""`--decay-now`: a decay from any checkpoint, in the run itself or in a branch that is the run."""

from __future__ import annotations

import shutil

import pytest

from tests.train.conftest import Fit, equal
from train import rundir
from train.errors import UserError


def test_decay_starts_from_any_checkpoint(request_of) -> None:
    """A branch with --init-from is, step for step, the run that decays there; so is --resume."""
    sets = ("run.steps=24", "run.keep=9", "schedule={warmup: 2, decay: 6}")
    Fit(request_of("trunk", *sets), stop_after=8)
    trunk = request_of("trunk").run
    branch = Fit(request_of("branch", *sets, init_from=trunk, decay_now=True))
    rates = [(r["step"], r["lr"]) for r in branch.records if r["kind"] == "train"]
    assert branch.finished and branch.state.step == 14  # 8 + 6
    assert rates[-1][1] == pytest.approx(1e-2 / 7, rel=1e-6)
    assert branch.state.tokens == 14 * 128
    here = Fit(request_of("trunk", *sets, resume=True, decay_now=True))
    assert equal(branch.tensors(), here.tensors())
    Fit(
        request_of("again", *sets, init_from=trunk / "checkpoints" / "step_00000008", decay_now=True),
        stop_after=11,
    )
    rest = Fit(request_of("again", *sets, resume=True))
    assert equal(branch.tensors(), rest.tensors())


def test_a_branch_of_a_grown_run_keeps_its_rates(request_of) -> None:
    """Loaded heads learn at half the rate (grow.head_lr) in the branch as in the run."""
    from train.rundir import set_status

    set_status(Fit(request_of("small1", arch="small1")).stage.folder, "complete", step=8)
    Fit(request_of("trunk", arch="small2"), stop_after=4)
    trunk = request_of("trunk").run
    branch = Fit(request_of("branch", arch="small2", init_from=trunk, decay_now=True))
    here = Fit(request_of("trunk", arch="small2", resume=True, decay_now=True))
    assert equal(branch.tensors(), here.tensors())
    a, b = (rundir.about_of(f.stage.folder)["origin"] for f in (branch, here))
    assert a["lr_scales"] == b["lr_scales"] != {} and a["stage"] == b["stage"] == 2


@pytest.mark.parametrize("source", ["trunk", "trunk/checkpoints/step_00000004"])
def test_every_worker_takes_over_its_own(request_of, place, source) -> None:
    from train.stage import prepare
    from train.world import World

    outer = "outer={kind: diloco, every: 4}"
    trunk = Fit(request_of("trunk", outer), stop_after=4).stage.folder
    shutil.copytree(trunk, place / "other")
    shutil.copytree(place / "other", trunk / "workers" / "1")
    request = request_of("branch", outer, init_from=place / source, decay_now=True)
    for worker, folder in enumerate((trunk, trunk / "workers" / "1")):
        stage = prepare(request, request.archs[0], World(worker=worker, workers=2))
        assert stage.source.path == folder / "checkpoints" / "step_00000004"


def test_decay_now_is_refused_where_it_means_nothing(request_of) -> None:
    with pytest.raises(UserError, match="--resume or with --init-from"):
        Fit(request_of("a", decay_now=True))
    with pytest.raises(UserError, match="no decay"):
        Fit(request_of("b", "schedule.kind=cosine", decay_now=True))
    done = Fit(request_of("c"))
    with pytest.raises(UserError, match="the decay began at step"):
        Fit(request_of("d", init_from=done.stage.folder, decay_now=True))
    early = done.stage.folder / "checkpoints" / "step_00000004"
    with pytest.raises(UserError, match="step 4, in the warm-up of 6 steps"):
        Fit(request_of("f", "schedule.warmup=6", init_from=early, decay_now=True))
    with pytest.raises(UserError, match=r"run\.batch"):
        Fit(request_of("e", "run.batch=2", init_from=done.stage.folder, decay_now=True))
