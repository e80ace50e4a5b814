"""A sweep file: read strictly, resolved once, reported from its summaries alone."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import dataset
from dataset.tasks import write as write_task
from dataset.tokenizers import make
from experiments import plots, summary
from experiments.__main__ import main
from experiments.commands import ROOT
from experiments.intervals import Mean, paired, verdict
from experiments.plots import front
from experiments.report import group
from experiments.sweep import read
from model.schema import ConfigError

ARCH = """
dim: 16
stack: [{gla: {head_dim: 8}}, {mlp: {mult: 2, multiple_of: 8}}]
heads: {next: {shift: 1}}
run: {batch: 2, context: 32, precision: fp32, eval_every: 2, eval_tokens: 64, save_every: 2, log_every: 1}
"""
SWEEP = """
question: Does the width matter?
arch: base.yaml
data:
  recall: {path: DATA, tasks: ["mqar:pairs=4/8"]}
cases:
  narrow: {about: as it is}
  wide: {set: {dim: 24, optim: {lr: 1e-3}}}
  longer: {after: narrow, share: 0.5}
grid: {run.context: [32]}
seeds: 2
budget: {tokens: 256}
eval_tokens: 64
samples: 2
prefill: 16
measure: mqar
"""


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    write_task(["mqar:pairs=4/8", "copy:lengths=4"], make("bytes"), tmp_path / "data", 40, 20)
    (tmp_path / "base.yaml").write_text(ARCH)
    (tmp_path / "sweep.yaml").write_text(SWEEP.replace("DATA", str(tmp_path / "data")))
    return tmp_path / "sweep.yaml"


def invent(path: Path) -> None:
    """Summaries as runs would have left them: `wide` is better by 0.1 with every seed."""
    found = read(path)
    for run in found.runs:
        gain = 0.1 * ("wide" in run.case)
        shape = {
            "parameters": 1000,
            "trained": 900,
            "flops_per_token": 6e3,
            "state_bytes": 512,
            "context": 32,
        }
        identity = {"digest": summary.identity_digest(found, run), "identity": found.identity(run)}
        identity |= {"measured": found.measured(run), "dataset": "0" * 64}
        case = {"kind": "case", "case": run.case, "data": run.data, **identity, **shape, "tokens": 256}
        metrics = {
            "bits_per_byte": 2 - gain + 0.01 * run.seed,
            "mqar": 0.5 + gain,
            "mqar pairs=4 noise=0": 0.6,
        }
        curve = [[0, 0.0, 5.0, 8.0], [128, 1.0, 2.0, 3.0 - gain], [256, 2.0, 1.5, 2.0 - gain]]
        line = {"kind": "run", "case": run.case, "data": run.data, "seed": run.seed, "digest": found.key(run)}
        line |= {"metrics": metrics, "curve": curve, "tokens": 256, "seconds": 2.0, "tokens_per_s": 128.0}
        summary.put(found, case, {**line, "code": "0" * 40, "torch": "2"})


def test_runs_are_found_again_by_what_they_are(sweep) -> None:
    found = read(sweep)
    assert [r.label for r in found.runs][:3] == [
        "narrow context=32 on recall, seed 0", "wide context=32 on recall, seed 0",
        "longer context=32 on recall, seed 0",
    ]  # fmt: skip
    keys = [found.key(r) for r in found.runs]
    assert len(set(keys)) == 6 and found.base_of("wide context=32") == "narrow context=32"
    assert found.runs[1].config.dim == 24 and found.runs[1].config.optim.lr == 1e-3
    sweep.write_text(sweep.read_text().replace("seeds: 2", "seeds: 3").replace("as it is", "other words"))
    assert [read(sweep).key(r) for r in read(sweep).runs][:6] == keys  # words and more seeds change none
    (sweep.parent / "base.yaml").write_text(ARCH.replace("dim: 16", "dim: 32"))
    again = read(sweep)
    assert not {again.key(r) for r in again.runs if "wide" not in r.case} & set(keys)


MISTAKES = {
    "unknown key": (("seeds: 2", "seed: 2"), "sweep.yaml:11:1: unknown key 'seed'; did you mean 'seeds'?"),
    "unknown block": (("dim: 24", "stack: [glaa]"), "did you mean 'gla'"),
    "no share": (("share: 0.5", "share: 1.5"), "longer context=32.share: 1.5: want a share of the budget"),
    "two budgets": (
        ("tokens: 256", "tokens: 256, seconds: 3"),
        "exactly one of tokens, bytes, flops, seconds and cpu_seconds",
    ),
    "unknown base": (("seeds: 2", "base: broad"), "no case 'broad'"),
    "unknown task": (("mqar:pairs=4/8", "mqar:pair=4"), "no option 'pair'"),
    "unknown measure": (("measure: mqar", "measure: copy"), "'copy' is neither"),
    "after nothing": (("after: narrow", "after: nobody"), "no case that starts from nothing"),
    "after less": (
        ("cases:\n  narrow: {about: as it is}", "  other: {path: there}\ncases:\n  narrow: {on: [recall]}"),
        "which it starts from, is not trained on ['other']",
    ),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_mistakes_are_named_with_their_place(sweep, what) -> None:
    (old, new), message = MISTAKES[what]
    sweep.write_text(sweep.read_text().replace(old, new))
    with pytest.raises(ConfigError) as caught:
        read(sweep)
    shown = str(caught.value)
    assert message in shown and "sweep.yaml" in shown


def test_a_changed_base_is_named_and_refused(sweep, capsys) -> None:
    invent(sweep)
    assert main(["run", str(sweep), "--dry-run"]) == 0
    assert "2/2" in capsys.readouterr().out
    (sweep.parent / "base.yaml").write_text(ARCH.replace("dim: 16", "dim: 32"))
    before = (sweep.parent / "summaries.jsonl").read_bytes()
    assert main(["run", str(sweep)]) == 2
    error = capsys.readouterr().err
    assert "narrow" in error and "config.dim: 16 then, 32 now" in error and "forget" in error
    assert (sweep.parent / "summaries.jsonl").read_bytes() == before  # nothing half-done
    assert main(["forget", str(sweep)]) == 0
    left = summary.read(sweep.parent / "summaries.jsonl")
    assert {line["case"] for line in left} == {"wide context=32"}  # it sets its own width


def test_the_report_is_rebuilt_byte_for_byte(sweep, capsys) -> None:
    assert main(["report", str(sweep)]) == 2 and "no runs yet" in capsys.readouterr().err
    invent(sweep)
    made = []
    for name in ("a", "b"):
        assert main(["report", str(sweep), "--out", str(sweep.parent / name)]) == 0
        made.append({p.name: p.read_bytes() for p in (sweep.parent / name).iterdir()})
    assert made[0] == made[1] and len(made[0]) == 4
    text = made[0]["results.md"].decode()
    rows = {
        r.split("|")[1].strip(): [c.strip() for c in r.split("|")] for r in text.splitlines() if r[:2] == "| "
    }
    assert "0.600 ± 0.000" in text and "+0.100 ± 0.000" in text and "better" in text and "tie" in text
    assert rows["wide context=32"] and "narrow context=32: as it is" in text
    found = read(sweep)
    line = next(x for x in summary.read(sweep.parent / "summaries.jsonl") if x["kind"] == "run")
    summary.put(found, {**line, "metrics": {}, "curve": [[0, 0.0, 5.0, 8.0]]})
    assert main(["report", str(sweep), "--out", str(sweep.parent / "c")]) == 0
    assert f"Diverged: {line['case']} (1 runs)." in (sweep.parent / "c" / "results.md").read_text()
    html = made[0]["results.html"].decode()
    assert html.count("data:image/png;base64,") == 2 and "<table>" in html and "http" not in html


COMMITTED = sorted(p for p in (ROOT / "experiments").glob("*/*.yaml") if "\nquestion:" in p.read_text())


@pytest.mark.parametrize("path", COMMITTED, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_question_can_be_run(path) -> None:
    """Features change under the sweeps that use them; a question also says what was expected."""
    found = read(path)
    assert found.runs and len({found.key(r) for r in found.runs}) == len(found.runs)
    assert "prediction" in (path.parent / "README.md").read_text().lower()


ANSWERED = [p for p in COMMITTED if summary.file_of(read(p)).is_file() and p.parent.name != "first"]


@pytest.mark.parametrize("path", ANSWERED, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_committed_tables_are_those_of_the_committed_runs(path, tmp_path) -> None:
    """`report` makes them again, byte for byte, and plots under the names that the page shows."""
    assert main(["report", str(path), "--out", str(tmp_path)]) == 0
    made = next(tmp_path.glob("*.md"))
    assert made.read_bytes() == (path.parent / made.name).read_bytes()
    assert all((path.parent / p.name).is_file() for p in tmp_path.glob("*.png"))


def test_what_a_run_starts_from_is_counted(sweep) -> None:
    """Tokens, FLOPs and seconds of the first part belong to the second part's cost."""
    invent(sweep)
    found = read(sweep)
    g = group(found, summary.read(summary.file_of(found)), ["recall"])
    assert g.before("longer context=32") == (256, 256 * 6e3, 2.0) and g.before("wide context=32") == (0, 0, 0)
    xs = [list(line.get_xdata()) for line in plots.curves(g).axes[0].lines]
    assert xs[2] == [x + 256e-6 for x in xs[0]]
    summary.forget(found, lambda line: "narrow" in line["case"])  # its first part is not here
    g = group(found, summary.read(summary.file_of(found)), ["recall"])
    assert g.before("longer context=32") == (0, 0, 0)


def test_parts_are_merged(sweep, tmp_path, capsys) -> None:
    """What other machines measured is taken in once; another sweep's, or another length, is refused."""
    invent(sweep)
    file = sweep.parent / "summaries.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    there = tmp_path / "there.jsonl"
    there.write_text("".join(lines[:3] + lines[5:]))
    file.write_text("".join(lines[:6]))
    assert main(["merge", str(sweep), str(there)]) == 0 and "3 runs taken in" in capsys.readouterr().out
    assert file.read_text() == "".join(lines)
    assert main(["merge", str(sweep), str(there)]) == 0 and "0 runs taken in" in capsys.readouterr().out
    for old, new, word in (
        ('"state_bytes": 512', '"state_bytes": 5', "differs in state_bytes"),
        ('"eval_tokens": 64', '"eval_tokens": 65', "another sweep"),
    ):
        there.write_text("".join(lines).replace(old, new))
        assert main(["merge", str(sweep), str(there)]) == 2 and word in capsys.readouterr().err
        assert file.read_text() == "".join(lines)
    assert main(["merge", str(sweep), str(tmp_path / "none.jsonl")]) == 2
    own, whole = tmp_path / "own.jsonl", file.read_text()
    there.write_text(whole)
    file.write_text("".join(lines[:6]))
    assert main(["merge", str(sweep), "--summaries", str(own), str(there)]) == 0
    assert own.read_text() == whole and file.read_text() == "".join(lines[:6])
    capsys.readouterr()
    words = [str(sweep), "--dry-run", "--part", "0/1", "--summaries"]
    assert main(["run", *words, str(own)]) == 0 and "2/2" in capsys.readouterr().out
    assert main(["run", *words, str(tmp_path / "new.jsonl")]) == 0
    assert "1/2" in capsys.readouterr().out and not (tmp_path / "new.jsonl").exists()


@pytest.mark.parametrize("clock", ["seconds", "cpu_seconds"])
def test_machines_share_no_budget_of_one_machines_time(sweep, clock, capsys) -> None:
    sweep.write_text(sweep.read_text().replace("tokens: 256", f"{clock}: 2"))
    assert main(["run", str(sweep), "--part", "0/2", "--dry-run"]) == 2
    assert f"has a budget in {clock}" in capsys.readouterr().err
    assert main(["run", str(sweep), "--dry-run"]) == 0


def test_data_is_made_before_anything_is_trained(sweep, capsys) -> None:
    """prepare: what is missing is made by the words of `make`, what is there is left; ids are told."""
    made = sweep.parent / "made"
    make_words = f"{{path: {made}, make: [task, 'copy:lengths=4', --samples, '8', --heldout-samples, '4']}}"
    sweep.write_text(sweep.read_text().replace("data:\n", f"data:\n  made: {make_words}\n"))
    assert main(["prepare", str(sweep)]) == 0
    ids = {
        name: dataset.open(path).manifest["id"]
        for name, path in (("made", made), ("recall", sweep.parent / "data"))
    }
    told = capsys.readouterr().out
    assert all(f"{name}: " in told and found in told for name, found in ids.items())
    before = (made / "manifest.json").stat().st_mtime_ns
    assert main(["prepare", str(sweep)]) == 0 and (made / "manifest.json").stat().st_mtime_ns == before


def test_a_signal_lets_the_command_in_hand_save(tmp_path) -> None:
    """SIGTERM goes to the command, Ctrl-C to the whole group; either is obeyed when the command has ended."""
    saves = (
        "import pathlib, signal, sys, time; n = int(sys.argv[2]);"
        "signal.signal(n, lambda *_: (time.sleep(1),"
        "pathlib.Path(sys.argv[1]).write_text('saved'), sys.exit(130)));"
        "print('on', flush=True); time.sleep(60)"
    )
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        kept = tmp_path / str(int(number))
        words = ["-c", saves, str(kept), str(int(number))]
        ours = f"from experiments.commands import run; run(*{words!r})"
        process = subprocess.Popen(
            [sys.executable, "-c", ours], cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        assert process.stdout is not None
        while process.stdout.readline() != "on\n":
            assert process.poll() is None
        if number == signal.SIGINT:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        assert process.wait(60) == code and kept.read_text() == "saved"


def test_intervals_and_verdicts() -> None:
    mean = Mean.of([1.0, 2.0, 3.0])
    assert mean.value == 2 and mean.half == pytest.approx(4.303 / math.sqrt(3))
    assert math.isnan(Mean.of([1.0]).half)
    gap = paired({0: 1.0, 1: 2.0, 2: 3.0}, {0: 1.5, 1: 2.4, 2: 3.6, 3: 9.0})
    assert gap.value == pytest.approx(-0.5) and gap.count == 3
    assert verdict(gap, lower_is_better=True) == "better" and verdict(gap, False) == "worse"
    assert verdict(Mean(0.1, 0.2, 3), True) == "tie" and verdict(Mean(0.1, math.nan, 1), True) == "one seed"
    assert front([(1, 5), (2, 6), (3, 4), (3, 9)], True) == [(1, 5), (3, 4)]
    assert front([(1, 5), (2, 6), (3, 4)], False) == [(1, 5), (2, 6)]


@pytest.mark.slow
def test_a_sweep_is_run_resumed_and_measured(sweep, capsys) -> None:
    """sweep: killed after its first case, it goes on; what is done is left alone."""
    out = str(sweep.parent / "runs")
    assert main(["run", str(sweep), "--only", "narrow context=32", "--part", "0/2", "--out", out]) == 0
    lines = (sweep.parent / "summaries.jsonl").read_text().splitlines()
    assert [json.loads(line)["kind"] for line in lines] == ["case", "run"]
    assert main(["run", str(sweep), "--out", out]) == 0
    runs = [x for x in summary.read(sweep.parent / "summaries.jsonl") if x["kind"] == "run"]
    assert len(runs) == 6 and all(r["metrics"]["prefill_ms"] > 0 for r in runs)
    assert [r["tokens"] for r in runs] == [256, 256, 256, 256, 128, 128]  # `longer` has half of the budget
    assert [len(r["curve"]) for r in runs] == [3, 3, 3, 3, 2, 2]
    assert json.loads(lines[1]) in runs and 0 <= runs[0]["metrics"]["mqar"] <= 1
    folders = [p for p in Path(out).iterdir() if (p / "run.json").is_file()]
    assert len(folders) == 6
    about = [json.loads((p / "run.json").read_text())["origin"]["from"] for p in folders]
    assert sum(a is not None for a in about) == 2
    assert main(["report", str(sweep)]) == 0
    assert main(["run", str(sweep), "--out", out]) == 0 and "done" in capsys.readouterr().out


@pytest.mark.slow
def test_a_sweep_makes_what_its_runs_need_and_scores_them_elsewhere(sweep, capfd) -> None:
    """before: once a call that has runs left; heldout: another dataset's text, told apart from its own."""
    write_task(["copy:lengths=4"], make("bytes"), sweep.parent / "other", 40, 20)
    text = sweep.read_text().replace(
        "cases:", f"before: [[-c, \"open('{sweep.parent}/made', 'a').write('x')\"]]\ncases:"
    )
    sweep.write_text(text.replace("seeds: 2", "seeds: 1"))
    words = ["run", str(sweep), "--only", "narrow context=32", "--out", str(sweep.parent / "runs")]
    assert main(words) == main(words) == 0 and (sweep.parent / "made").read_text() == "x"
    own = summary.read(sweep.parent / "summaries.jsonl")[1]["metrics"]
    sweep.write_text(sweep.read_text().replace("tasks:", f"heldout: {sweep.parent / 'other'}, tasks:"))
    assert main(words) == 2 and "measured.heldout" in capfd.readouterr().err
    assert main(["forget", str(sweep)]) == main(words) == 0
    other = summary.read(sweep.parent / "summaries.jsonl")[1]["metrics"]
    assert other["bits_per_byte"] != own["bits_per_byte"] and other["mqar"] == own["mqar"]


@pytest.mark.slow
@pytest.mark.parametrize("clock", ["seconds", "cpu_seconds"])
def test_a_sweep_with_a_budget_of_time_finds_its_length(sweep, clock, capsys) -> None:
    """sweep: eight steps show the speed, also where the study's own warm-up is longer than they are."""
    text = sweep.read_text().replace("tokens: 256", f"{clock}: 2")
    sweep.write_text(text.replace("seeds: 2", "seeds: 1\nset: {schedule.warmup: 10}"))
    out = sweep.parent / "runs"
    assert main(["run", str(sweep), "--only", "narrow context=32", "--out", str(out)]) == 0
    case, run = summary.read(sweep.parent / "summaries.jsonl")
    assert case["tokens"] > 20 * 64 and case["tokens"] % 64 == 0 and run["tokens"] == case["tokens"]
