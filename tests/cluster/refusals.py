"""Bad input against live nodes, and --check of every playbook: each fault is named, and nothing is half-done.

    python -m tests.cluster.refusals [--keep DIR] [--part new|ready|running]

Files of all nodes are compared before and after every refusal and every --check. Needs what demo.py needs.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from tests.cluster.demo import settings
from tests.cluster.lan import run
from tests.cluster.plays import Played, Plays, drill, tells

FAILED, UNREACHABLE = 2, 4  # exit codes of ansible-playbook
PARTS = ("new", "ready", "running")


class Refusals(Plays):
    def traces(self, live: bool) -> dict[str, tuple[int, ...]]:
        """Size, mode and time of every file of the nodes; live: but for those that running programs write."""
        out, top = {}, self.lan.folder / "srv"
        # os.walk passes by folders that a running program removes meanwhile; rglob ends there
        for path in (Path(at, name) for at, *names in os.walk(top) for name in names[0] + names[1]):
            words = path.relative_to(top).parts
            if ".ansible" in words or (live and {"runs", "state", "__pycache__"} & {*words}):
                continue
            try:
                found = path.lstat()
            except FileNotFoundError:
                continue  # a temporary file of a running program
            still = (found.st_size, found.st_mtime_ns) if path.is_file() else ()
            out["/".join(words)] = (found.st_mode, *still)
        return out

    def unchanged(self, *words: str, expect: int = 0, live: bool = False, **more: Any) -> Played:
        """A play that must leave all files of all nodes as they are."""
        before = self.traces(live)
        # Another folder for ssh's shared connections: each play is to make its own.
        self.env["ANSIBLE_SSH_CONTROL_PATH_DIR"] = str(self.folder / f"ssh{len(self.done)}")
        played = self.play(*words, expect=expect, **more)
        after = self.traces(live)
        if wrong := sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k)):
            raise SystemExit(f"{played.what}: changed {', '.join(wrong[:20])}")
        return played

    def with_inventory(self, change: Callable[[dict[str, Any]], None]) -> Path:
        found = yaml.safe_load(self.inventory.read_text())
        change(found["all"])
        path = self.folder / "changed.yml"
        path.write_text(yaml.safe_dump(found, sort_keys=False))
        return path

    def tour(self, parts: tuple[str, ...]) -> None:
        """New nodes, then nodes that are set up, then a cluster that trains."""
        if "new" in parts:
            self.new_nodes()
        self.play("setup")
        if "ready" in parts:
            self.ready_nodes()
        if "running" in parts:
            self.play("shard")
            self.play("launch")
            everybody = {*self.lan.machines}
            self.wait("pushes from all", lambda: everybody <= {*self.pushes("one")})
            self.running_nodes()
            self.play("stop")

    def new_nodes(self) -> None:
        """Nothing is on the nodes, and nothing must come to be."""
        self.unchanged("setup", "--check")
        self.misspelt_key()
        tells(self.unchanged("setup", "-e", "lab_secret=", expect=FAILED), "lab_secret is missing or shorter")
        tells(self.unchanged("launch", expect=FAILED), "n1 has no code .*n2 has no code .*n3 has no code ")
        self.wrong_keys()
        self.unplugged("setup")
        self.full_disk("setup")

    def misspelt_key(self) -> None:
        path = self.with_inventory(lambda every: every["vars"].update(lab_portt=29500))
        tells(
            self.unchanged("setup", expect=FAILED, inventory=path),
            r"all\.vars: unknown key 'lab_portt'; did you mean 'lab_port'\?",
        )

    def wrong_keys(self) -> None:
        """n2 shows another host key than the one that is known; then a login key that no node knows."""
        ssh = self.lan.folder / "ssh"
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "stranger", "-f", str(ssh / "stranger"))
        known = (ssh / "known_hosts").read_text()
        stranger = " ".join((ssh / "stranger.pub").read_text().split()[:2])
        lines = [
            f"{self.lan.address(2)} {stranger}" if line.startswith(f"{self.lan.address(2)} ") else line
            for line in known.splitlines()
        ]
        (ssh / "known_hosts").write_text("\n".join(lines) + "\n")
        played = self.unchanged("setup", expect=UNREACHABLE)
        tells(played, r"fatal: \[n2\]: UNREACHABLE.*", "Host key verification failed")
        (ssh / "known_hosts").write_text(known)
        path = self.with_inventory(
            lambda every: every["vars"].update(ansible_ssh_private_key_file=str(ssh / "stranger"))
        )
        played = self.unchanged("setup", expect=UNREACHABLE, inventory=path)
        tells(played, *(rf"fatal: \[{w}\]: UNREACHABLE" for w in self.lan.machines), "Permission denied")

    def unplugged(self, *plays: str) -> None:
        self.lan.cut("n3")
        for name in plays:
            played = self.unchanged(name, expect=UNREACHABLE, live=name == "launch")
            tells(played, r"fatal: \[n3\]: UNREACHABLE")
        self.lan.heal("n3")

    def full_disk(self, *plays: str) -> None:
        """0.1 GB on n2."""
        inside = ["nsenter", "-t", str(self.lan.inits["n2"].pid), "-m"]
        run(*inside, "mount", "-t", "tmpfs", "-o", "size=100m,mode=755", "tmpfs", "/srv")
        for name in plays:
            tells(self.unchanged(name, expect=FAILED), r"n2 has 0\.1 GB free for /srv/lab, wanted 0\.5")
        self.lan.power_off("n2")  # the mount goes with the machine
        self.lan.boot("n2")

    def ready_nodes(self) -> None:
        """All nodes are set up; nothing runs, and nothing must start."""
        self.unchanged("setup", "--check")
        tells(self.unchanged("launch", expect=FAILED), "n1: has no data in /srv/lab/data/pystdlib-bytes")
        self.other_code()
        self.unchanged("shard", "--check")
        self.unchanged("health", "--check")
        self.play("shard")
        if any(self.unchanged("shard").changed.values()):
            raise SystemExit("the second shard changed something")
        path = self.with_inventory(lambda every: every["vars"]["lab_data"].update(heldout=0.25))
        other = self.unchanged("shard", expect=FAILED, inventory=path)
        tells(other, "n1: error: /srv/lab/data/pystdlib-bytes: holds another dataset")
        self.other_data()
        path = self.with_inventory(lambda every: every["vars"]["lab_outer"].update(codec="int9"))
        tells(self.unchanged("launch", expect=FAILED, inventory=path), r"outer\.codec: want one of")
        tells(self.unchanged("drain", "-e", "node=n9", expect=FAILED), "say which worker: -e node=NAME")
        for words in (("launch",), ("slurm",), ("collect",)):
            self.unchanged(*words, "--check")
        self.unplugged("launch", "health")

    def other_code(self) -> None:
        """n2 has another commit, n3 an edited file; `sync` brings n2 back when the edit is undone."""
        code = self.home("n2") / "code"
        who = ["-c", "user.name=somebody", "-c", "user.email=somebody@example.org"]
        run(
            "git",
            "-c",
            "safe.directory=*",
            *who,
            "-C",
            str(code),
            "commit",
            "-q",
            "--allow-empty",
            "-m",
            "Mine",
        )
        mixed = f"n2 has revision [0-9a-f]{{12}}, n1 has {self.revision[:12]}"
        for name in ("launch", "shard", "health"):
            tells(self.unchanged(name, expect=FAILED), mixed)
        edited = self.home("n3") / "code" / "README.md"
        good = edited.stat(), edited.read_text()
        edited.write_text(good[1] + "Mine.\n")
        tells(self.unchanged("launch", expect=FAILED), mixed, r"n3 has edited M? ?README\.md")
        tells(self.unchanged("sync", expect=FAILED), r"edited files on n3 ")
        edited.write_text(good[1])
        os.utime(edited, ns=(good[0].st_atime_ns, good[0].st_mtime_ns))
        tells(self.unchanged("sync", "--check"), f"would become {self.revision}")
        changed = self.play("sync").changed
        if (changed["n1"], changed["n3"]) != (0, 0) or not changed["n2"]:
            raise SystemExit(f"sync: wanted a change on n2 alone, not {changed}")

    def other_data(self) -> None:
        """n3 has another secret, then another manifest; `setup` and `shard` bring it back."""
        secret, manifest = (self.home("n3") / p for p in ("etc/secret", "data/pystdlib-bytes/manifest.json"))
        good = secret.read_text()
        secret.write_text("f" * 64 + "\n")
        tells(self.unchanged("launch", expect=FAILED), "n3: has no secret, or another than n1; run setup.yml")
        secret.write_text(good)
        good = manifest.read_text()
        manifest.write_text(good + "\n")
        tells(
            self.unchanged("launch", expect=FAILED), "n3: has no data in .*, or other than the first worker's"
        )
        changed = self.play("shard").changed
        if manifest.read_text() != good or changed["n1"] or changed["n2"]:
            raise SystemExit(f"shard: wanted n3's data made good and no other change: {changed}")

    def running_nodes(self) -> None:
        """--check of everything while it trains, which goes on; then what is refused in that state."""
        for words in (
            ("setup",),
            ("launch",),
            ("stop",),
            ("status",),
            ("logs",),
            ("drain", "-e", "node=n2"),
            ("add-worker", "-e", "node=n3"),
            ("grow", "-e", "now=true"),
            ("collect", "-e", f"into={self.folder / 'nowhere'}"),
        ):
            self.unchanged(*words, "--check", live=True)
        if (self.folder / "nowhere").exists():
            raise SystemExit("collect --check made a folder")
        tells(self.unchanged("grow", expect=FAILED, live=True), "no worker has finished stage one")
        other = self.unchanged("launch", "-e", "lab_stage_name=two", expect=FAILED, live=True)
        tells(other, "n1: the server runs stage one of demo, not two of demo")
        seen = len(self.pushes("one"))
        everybody = {*self.lan.machines}
        self.wait("all train on", lambda: everybody <= {*self.pushes("one")[seen:]})


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m tests.cluster.refusals", description=__doc__.split("\n")[0])
    p.add_argument("--keep", type=Path, metavar="DIR", help="leave logs there")
    p.add_argument("--part", choices=PARTS, help="one of the three alone")
    args = p.parse_args(argv)
    parts = (args.part,) if args.part else PARTS
    return drill(lambda lan, folder: Refusals(lan, folder, settings(20000)).tour(parts), args.keep)


if __name__ == "__main__":
    sys.exit(main())
