"""`make cluster-demo`: the playbooks on a LAN of three machines, from an empty disk to a grown model.

    python -m tests.cluster.demo [--keep DIR]

setup, setup again (must change nothing), health, shard, launch, status, one node powered off, one drained and
added back, the dead one revived and added back, grow, collect, stop. Exit code 0 when all of it held. The
nodes have no systemd; they use this environment's Python by its path. Needs root and the extra [cluster].
"""

from __future__ import annotations

import argparse
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.cluster.sshd import SshLan, missing

ROOT = Path(__file__).resolve().parents[2]
BOOKS = ROOT / "playbooks"
SERVER, DRAINED, KILLED = "n1", "n2", "n3"
PLAYBOOK = Path(sys.executable).with_name("ansible-playbook")
MODEL = {
    "dim": 32,
    "defaults.mamba2": {"state": 16, "head_dim": 16},
    "defaults.swa": {"head_dim": 16, "group": 1, "window": 64},
    "defaults.mlp": {"act": "swiglu", "mult": 2.0, "multiple_of": 16},
    "run.batch": 6,
    "run.context": 64,
    "run.log_every": 5,
    "run.save_every": 10,
    "run.eval_tokens": 2048,
}


def stage(name: str, layers: int, steps: int) -> dict[str, Any]:
    stack = [{"repeat": layers, "of": ["mamba2", "mlp", "swa", "mlp"]}]
    return {"name": name, "arch": "samba.yaml", "set": {**MODEL, "stack": stack, "run.steps": steps}}


def settings(steps: int) -> dict[str, Any]:
    """all.vars of the inventory."""
    return {
        "lab_root": "/srv/lab",
        "lab_user": "root",
        "lab_become": False,
        "lab_python": sys.executable,
        "lab_port": 29500,
        "lab_min_disk_gb": 0.5,
        "lab_deadline_s": 120,
        "lab_parameters": 40_000,
        "lab_step_s": 0.1,
        "lab_data": {"dir": "data/pystdlib-bytes", "source": "pystdlib", "tokenizer": "bytes"},
        "lab_run": "demo",
        "lab_stages": [stage("one", 1, steps), stage("two", 2, 20)],
        "lab_outer": {"shards": 3, "every": 10, "codec": "int8", "heartbeat": 20.0, "patience": 300.0},
    }


class Demo:
    def __init__(self, lan: SshLan, folder: Path, steps: int) -> None:
        self.lan, self.folder = lan, folder
        self.inventory, self.vault = folder / "inventory.yml", folder / "vault.yml"
        lan.inventory(self.inventory, settings(steps), SERVER)
        (folder / "vault-password").write_text(secrets.token_hex(16))
        self.vault.write_text(f"lab_secret: {secrets.token_hex(32)}\n")
        self.env = {**os.environ, "ANSIBLE_CONFIG": str(BOOKS / "ansible.cfg"), "TMPDIR": str(folder)}
        self.env |= {"ANSIBLE_LOCAL_TEMP": str(folder / "ansible"), "HOME": str(folder), "NO_COLOR": "1"}
        self.env |= {"OMP_NUM_THREADS": "1", "ANSIBLE_NOCOLOR": "1", "GIT_CONFIG_COUNT": "1"}
        self.env |= {"GIT_CONFIG_KEY_0": "safe.directory", "GIT_CONFIG_VALUE_0": "*"}
        self.env["PATH"] = f"{PLAYBOOK.parent}:{os.environ['PATH']}"
        words = ["ansible-vault", "encrypt", "--vault-password-file", str(folder / "vault-password")]
        subprocess.run([*words, str(self.vault)], check=True, env=self.env, capture_output=True)
        head = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
        self.revision = subprocess.run(head, check=True, capture_output=True, text=True).stdout.strip()
        self.began = time.monotonic()

    def play(self, name: str, *extra: str, expect: int | None = 0) -> str:
        """Run a playbook on the controller; its output. Raises SystemExit for an unexpected exit code."""
        print(f"[{time.monotonic() - self.began:5.0f} s] {name} {' '.join(extra)}", flush=True)
        words = [str(PLAYBOOK), "-i", str(self.inventory), "-e", f"@{self.vault}"]
        words += ["-e", f"lab_revision={self.revision}"]
        words += ["--vault-password-file", str(self.folder / "vault-password"), str(BOOKS / f"{name}.yml")]
        with open(self.folder / "plays.log", "a+") as log:
            log.write(f"===== {name} {' '.join(extra)}\n")
            log.flush()
            at = log.seek(0, os.SEEK_END)
            options: dict[str, Any] = {
                "stdout": log,
                "stderr": subprocess.STDOUT,
                "stdin": subprocess.DEVNULL,
            }
            process = self.lan.popen("n0", [*words, *extra], cwd=self.folder, env=self.env, **options)
            process.wait(timeout=1800)
            log.seek(at)
            out = log.read()
        for line in out.splitlines():
            if re.search(r"unreachable=[1-9]|failed=[1-9]|fatal:", line):
                print(f"    {line[:200]}")
        if expect is not None and process.returncode != expect:
            raise SystemExit(f"{name}: exit code {process.returncode}, expected {expect}\n{out[-6000:]}")
        return out

    def records(self, node: str, stage: str) -> Path:
        return self.lan.folder / "srv" / node / "lab" / "runs" / "demo" / stage

    def status(self, node: str, stage: str) -> dict[str, Any]:
        try:
            return json.loads((self.records(node, stage) / "worker" / "status.json").read_text())
        except (OSError, ValueError):
            return {}

    def events(self, stage: str) -> list[dict[str, Any]]:
        path = self.records(SERVER, stage) / "server" / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def wait(self, what: str, condition: Any, limit: float = 900) -> None:
        print(f"[{time.monotonic() - self.began:5.0f} s] waiting: {what}", flush=True)
        end = time.monotonic() + limit
        while not condition():
            if time.monotonic() > end:
                for log in sorted(self.lan.folder.glob("srv/*/lab/state/*/log")):
                    print(f"--- {log}\n{log.read_text()[-1500:]}")
                raise SystemExit(f"not within {limit:.0f} s: {what}")
            time.sleep(1)

    def pushed(self, stage: str, node: str, after: int = 0) -> bool:
        return any(e.get("worker") == node and e.get("kind") == "push" for e in self.events(stage)[after:])

    def tour(self) -> None:
        workers = self.lan.machines
        self.play("setup")
        again = self.play("setup")
        counts = re.findall(r"^(\S+) +: ok=\d+ +changed=(\d+)", again, re.M)
        if not counts or any(n != "0" for _, n in counts):
            raise SystemExit(f"the second setup changed something: {counts}")
        print(f"    second setup: {dict(counts)} changed")
        out = self.play("health")
        print("    " + (re.search(r"suggested: .*", out) or ["no suggestion"])[0])
        self.play("shard")
        self.play("launch")
        self.wait("a push from every worker", lambda: all(self.pushed("one", w) for w in workers))
        self.play("status")
        self.lan.power_off(KILLED)
        print(f"    {KILLED}: powered off")
        self.play("drain", "-e", f"node={DRAINED}")
        if self.status(DRAINED, "one").get("status") != "stopped":
            raise SystemExit(f"{DRAINED}: drained, but its run is {self.status(DRAINED, 'one')}")
        out = self.play("status", expect=2)
        if f"{KILLED}: unreachable" not in out or "drained" not in out:
            raise SystemExit(f"status does not tell of {KILLED} and {DRAINED}:\n{out[-3000:]}")
        mark = len(self.events("one"))
        self.play("add-worker", "-e", f"node={DRAINED}", expect=None)
        self.wait(f"a push from {DRAINED}, back", lambda: self.pushed("one", DRAINED, mark))
        self.lan.boot(KILLED)
        mark = len(self.events("one"))
        self.play("add-worker", "-e", f"node={KILLED}")
        self.wait(f"a push from {KILLED}, back", lambda: self.pushed("one", KILLED, mark))
        self.play("grow", "-e", "now=true")
        self.wait(
            "stage two", lambda: all(self.status(w, "two").get("status") == "complete" for w in workers)
        )
        self.play("collect", "-e", f"into={self.folder / 'collected'}")
        self.play("stop")
        self.judge(workers)

    def judge(self, workers: list[str]) -> None:
        """The runs that were collected: the second stage grown from the first, the loss falling."""
        losses = {}
        for worker in workers:
            for name in ("one", "two"):
                run = self.folder / "collected" / "demo" / worker / name / "worker"
                about = json.loads((run / "run.json").read_text())
                if name == "two" and not str(about["origin"]["from"] or "").startswith(
                    "/srv/lab/runs/demo/one/final"
                ):
                    raise SystemExit(f"{run}: did not grow from stage one: {about['origin']}")
                records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
                found = [r["loss"] for r in records if r["kind"] == "train"]
                losses[f"{worker} {name}"] = (found[0], found[-1])
        print(
            "    loss, first and last: " + ", ".join(f"{k} {a:.3f} {b:.3f}" for k, (a, b) in losses.items())
        )
        if not losses[f"{SERVER} one"][1] < losses[f"{SERVER} one"][0]:
            raise SystemExit("the loss did not fall")


def left_over(lan: SshLan) -> list[str]:
    """Namespaces and processes of the LAN that are still there."""
    found = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    out = [line for line in found.splitlines() if line.startswith(lan.prefix + "-")]
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                words = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if str(lan.folder).encode() in words:
                out.append(f"process {entry.name}: {words[:200]!r}")
    return out


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m tests.cluster.demo", description=__doc__.split("\n")[0])
    p.add_argument(
        "--keep", type=Path, default=None, metavar="DIR", help="leave logs and collected runs there"
    )
    p.add_argument(
        "--steps",
        type=int,
        default=20000,
        help="of a shard in stage one: more than the drill takes",
    )
    args = p.parse_args(argv)
    if not PLAYBOOK.exists():
        raise SystemExit("error: no ansible-playbook in this environment; pip install -e '.[cluster]'")
    if why := missing():
        print(f"skipped: {why}")
        return 0
    folder = Path(tempfile.mkdtemp(prefix="lab-"))
    lan: SshLan | None = None
    try:
        with SshLan(3, folder / "lan", mbit=0, delay=0.5) as lan:
            Demo(lan, folder, args.steps).tour()
    finally:
        if args.keep:
            args.keep.mkdir(parents=True, exist_ok=True)
            for name in ("plays.log", "inventory.yml", "collected"):
                if (folder / name).is_dir():
                    shutil.copytree(folder / name, args.keep / name, dirs_exist_ok=True)
                elif (folder / name).exists():
                    shutil.copy(folder / name, args.keep / name)
            for log in folder.glob("lan/srv/*/lab/state/*/log"):
                shutil.copy(log, args.keep / f"{log.parts[-5]}-{log.parts[-2]}.log")
        shutil.rmtree(folder, ignore_errors=True)
    left = left_over(lan)
    print("\n".join(left) if left else "nothing is left")
    return 1 if left or folder.exists() else 0


if __name__ == "__main__":
    sys.exit(main())
