"""Playing the playbooks on a LAN with sshd: inventory, vault, the controller's environment, what plays did.

Plays(lan, folder, settings).play("setup")     runs playbooks/setup.yml on the controller n0
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cluster import sshd
from tests.cluster.sshd import SshLan

ROOT = Path(__file__).resolve().parents[2]
BOOKS = ROOT / "playbooks"
PLAYBOOK = Path(sys.executable).with_name("ansible-playbook")
SERVER = "n1"
RECAP = re.compile(r"^(\S+) +: ok=\d+ +changed=(\d+) +unreachable=(\d+) +failed=(\d+)", re.M)


@dataclass(frozen=True)
class Played:
    """One run of a playbook. changed, unreachable, failed: counts by host."""

    what: str
    code: int
    seconds: float
    out: str
    changed: dict[str, int]
    unreachable: dict[str, int]
    failed: dict[str, int]

    def __str__(self) -> str:
        hosts = ", ".join(f"{h} {n}" for h, n in self.changed.items() if h != "localhost")
        return f"{self.what}: exit code {self.code}, {self.seconds:.0f} s, changed {hosts or 'nothing'}"


def recap(out: str, column: int) -> dict[str, int]:
    return {found[0]: int(found[column]) for found in RECAP.findall(out)}


def tells(played: Played, *patterns: str) -> None:
    """Raises SystemExit when a play's output lacks one of these regular expressions."""
    for pattern in patterns:
        if not re.search(pattern, played.out):
            raise SystemExit(f"{played.what}: says nothing like {pattern!r}\n{played.out[-4000:]}")


class Plays:
    """settings: all.vars of the inventory besides ssh."""

    def __init__(self, lan: SshLan, folder: Path, settings: dict[str, Any]) -> None:
        self.lan, self.folder = lan, folder
        self.done: list[Played] = []
        self.inventory, self.vault = folder / "inventory.yml", folder / "vault.yml"
        lan.inventory(self.inventory, settings, SERVER)
        (folder / "vault-password").write_text(secrets.token_hex(16))
        self.vault.write_text(f"lab_secret: {secrets.token_hex(32)}\n")
        self.env = {**os.environ, "ANSIBLE_CONFIG": str(BOOKS / "ansible.cfg"), "TMPDIR": str(folder)}
        self.env |= {"ANSIBLE_LOCAL_TEMP": str(folder / "ansible"), "HOME": str(folder), "NO_COLOR": "1"}
        self.env |= {"OMP_NUM_THREADS": "1", "ANSIBLE_NOCOLOR": "1", "GIT_CONFIG_COUNT": "1"}
        self.env |= {"GIT_CONFIG_KEY_0": "safe.directory", "GIT_CONFIG_VALUE_0": "*", "PWD": str(folder)}
        self.env["PATH"] = f"{PLAYBOOK.parent}:{os.environ['PATH']}"
        words = ["ansible-vault", "encrypt", "--vault-password-file", str(folder / "vault-password")]
        subprocess.run([*words, str(self.vault)], check=True, env=self.env, capture_output=True)
        head = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
        self.revision = subprocess.run(head, check=True, capture_output=True, text=True).stdout.strip()
        self.began = time.monotonic()

    def say(self, what: str) -> None:
        print(f"[{time.monotonic() - self.began:5.0f} s] {what}", flush=True)

    def play(self, name: str, *extra: str, expect: int = 0, inventory: Path | None = None) -> Played:
        """Run a playbook on the controller. Raises SystemExit when it ends with another exit code."""
        what = " ".join([name, *extra])
        words = [str(PLAYBOOK), "-i", str(inventory or self.inventory), "-e", f"@{self.vault}"]
        words += ["-e", f"lab_revision={self.revision}"]
        words += ["--vault-password-file", str(self.folder / "vault-password"), str(BOOKS / f"{name}.yml")]
        began = time.monotonic()
        with open(self.folder / "plays.log", "a+") as log:
            log.write(f"===== {what}\n")
            log.flush()
            at = log.seek(0, os.SEEK_END)
            options = {"stdout": log, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
            process = self.lan.popen("n0", [*words, *extra], cwd=self.folder, env=self.env, **options)
            process.wait(timeout=1800)
            log.seek(at)
            out = log.read()
        counts = (recap(out, column) for column in (1, 2, 3))
        played = Played(what, process.returncode, time.monotonic() - began, out, *counts)
        self.done.append(played)
        self.say(str(played))
        if played.code != expect:
            raise SystemExit(f"{what}: exit code {played.code}, expected {expect}\n{out[-6000:]}")
        return played

    def home(self, node: str) -> Path:
        """lab_root of a node, seen from outside."""
        return self.lan.folder / "srv" / node / "lab"

    def status(self, node: str, stage: str) -> dict[str, Any]:
        """status.json of a worker's run; empty when there is none."""
        try:
            return json.loads((self.home(node) / f"runs/demo/{stage}/worker/status.json").read_text())
        except (OSError, ValueError):
            return {}

    def pushes(self, stage: str) -> list[str]:
        """Workers in the order of their pushes, from the server's records."""
        path = self.home(SERVER) / f"runs/demo/{stage}/server/metrics.jsonl"
        records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [r["worker"] for r in records if r.get("kind") == "push"]

    def wait(self, what: str, condition: Any, limit: float = 900) -> None:
        """Until condition() holds. Raises SystemExit, after the ends of all logs, when it does not."""
        end = time.monotonic() + limit
        while not condition():
            if time.monotonic() > end:
                for log in sorted(self.lan.folder.glob("srv/*/lab/state/*/log")):
                    print(f"--- {log}\n{log.read_text()[-1500:]}")
                raise SystemExit(f"not within {limit:.0f} s: {what}")
            time.sleep(1)
        self.say(what)


def missing() -> str | None:
    """Why the playbooks cannot be played on this machine, or None."""
    if not PLAYBOOK.exists():
        return "no ansible-playbook in this environment; pip install -e '.[cluster]'"
    return sshd.missing()


def left_over(lan: SshLan) -> list[str]:
    """Namespaces, mounts and processes of the LAN that are still there."""
    found = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    out = [line for line in found.splitlines() if line.startswith(lan.prefix + "-")]
    mounts = Path("/proc/self/mounts").read_text().splitlines()
    out += [f"mount {line}" for line in mounts if str(lan.folder) in line]
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                words = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if str(lan.folder).encode() in words:
                out.append(f"process {entry.name}: {words[:200]!r}")
    return out


def keep(folder: Path, into: Path) -> None:
    """Copy logs and collected runs."""
    into.mkdir(parents=True, exist_ok=True)
    for name in ("plays.log", "inventory.yml", "collected"):
        if (folder / name).is_dir():
            shutil.copytree(folder / name, into / name, dirs_exist_ok=True)
        elif (folder / name).exists():
            shutil.copy(folder / name, into / name)
    for log in folder.glob("lan/srv/*/lab/state/*/log"):
        shutil.copy(log, into / f"{log.parts[-5]}-{log.parts[-2]}.log")


def drill(tour: Callable[[SshLan, Path], None], kept: Path | None) -> int:
    """Make a LAN of three machines, run tour(lan, folder) on it, look that nothing stays. The exit code."""
    if why := missing():
        print(f"error: {why}", file=sys.stderr)
        return 2
    folder = Path(tempfile.mkdtemp(prefix="lab-"))
    try:
        with SshLan(3, folder / "lan", mbit=0, delay=0.5) as lan:
            tour(lan, folder)
    finally:
        if kept:
            keep(folder, kept)
        shutil.rmtree(folder, ignore_errors=True)
    left = left_over(lan) + [str(folder)] * folder.exists()
    print("\n".join(left) if left else "nothing is left")
    return 1 if left else 0
