"""`make cluster-demo`: the playbooks on a LAN of three machines, from an empty disk to a grown model.

    python -m tests.cluster.demo [--keep DIR]

setup, setup again (must change nothing), health, shard, launch, status, logs, one node powered off, another
drained and added back, the dead one revived and added back, grow, collect, stop; then a sweep.
Exit code 0 when all of it held. The nodes have no systemd; they use this environment's Python by its path.
Needs root and the extra [cluster].
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from tests.cluster import sshd
from tests.cluster.plays import SERVER, Plays, drill, tells

DRAINED, KILLED = "n2", "n3"
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
        "lab_nice": 19,
        "lab_data": {"dir": "data/pystdlib-bytes", "source": "pystdlib", "tokenizer": "bytes"},
        "lab_run": "demo",
        "lab_stages": [stage("one", 1, steps), stage("two", 2, 20)],
        "lab_outer": {"shards": 3, "every": 10, "codec": "int8", "heartbeat": 20.0, "patience": 300.0},
    }


class Demo(Plays):
    def push_from(self, stage: str, nodes: list[str], why: str) -> None:
        """Wait for one more push from each of these workers."""
        before = len(self.pushes(stage))
        self.wait(
            f"pushes from {', '.join(nodes)}: {why}", lambda: {*nodes} <= {*self.pushes(stage)[before:]}
        )

    def tour(self) -> None:
        """From an empty disk to a grown model."""
        workers = self.lan.machines
        self.play("setup")
        again = self.play("setup")
        if any(again.changed.values()) or set(again.changed) != {"localhost", *workers}:
            raise SystemExit(f"the second setup changed something: {again.changed}")
        health = self.play("health")
        tells(health, "suggested: ")
        self.say(re.findall(r"suggested: .*", health.out)[0])
        self.play("shard")
        self.play("launch")
        self.push_from("one", workers, "launched")
        tells(self.play("status"), *(rf'{w}: .*worker {{\\?"state\\?": \\?"running' for w in workers))
        tells(self.play("logs", "-e", "lines=5"), "state/server/log", *(rf"ok: \[{w}\]" for w in workers))
        self.firewall(workers)
        self.lose_and_regain(workers)
        self.play("grow", "-e", "now=true")
        self.wait(
            "stage two: complete on all workers",
            lambda: all(self.status(w, "two").get("status") == "complete" for w in workers),
        )
        self.play("collect", "-e", "into=collected")
        self.play("stop")
        self.judge(workers)
        self.spread(workers)

    def firewall(self, workers: list[str]) -> None:
        """With nft, a member reaches the server's port and the controller, which is none, does not."""
        if not sshd.nft():
            self.say("no nft on this machine: firewall rules not tried")
            return
        where = f"{self.lan.address(1)}:29500"
        found = {node: self.lan.reaches(node, where) for node in ("n0", *workers)}
        if found != {"n0": False, **{w: True for w in workers}}:
            raise SystemExit(f"{where} is reached from: {found}")
        self.say(f"{where}: open to {', '.join(workers)}, closed to n0")

    def lose_and_regain(self, workers: list[str]) -> None:
        """One node dies, another is drained; both come back while the third trains on."""
        self.lan.power_off(KILLED)
        self.say(f"{KILLED}: powered off")
        self.play("drain", "-e", f"node={DRAINED}")
        if self.status(DRAINED, "one").get("status") != "stopped":
            raise SystemExit(f"{DRAINED}: drained, but its run is {self.status(DRAINED, 'one')}")
        self.push_from("one", [SERVER], f"goes on without {DRAINED} and {KILLED}")
        tells(self.play("status", expect=2), f"{KILLED}: unreachable", f"{DRAINED}: .*stopped.*drained")
        self.play("add-worker", "-e", f"node={DRAINED}")
        self.push_from("one", [DRAINED], "back")
        self.lan.boot(KILLED)
        self.play("add-worker", "-e", f"node={KILLED}")
        self.push_from("one", workers, "all are back")

    def judge(self, workers: list[str]) -> None:
        """The runs that were collected: the second stage grown from the first, the loss falling."""
        losses = {}
        for worker in workers:
            for name in ("one", "two"):
                run = self.folder / "collected" / "demo" / worker / name / "worker"
                origin = json.loads((run / "run.json").read_text())["origin"]
                if name == "two" and "/srv/lab/runs/demo/one/final" not in str(origin["from"]):
                    raise SystemExit(f"{run}: did not grow from stage one: {origin}")
                records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
                found = [r["loss"] for r in records if r["kind"] == "train"]
                losses[f"{worker} {name}"] = (found[0], found[-1])
        self.say("loss, first and last: " + ", ".join(f"{k} {a:.3f} {b:.3f}" for k, (a, b) in losses.items()))
        first, last = losses[f"{SERVER} one"]
        if not last < first:
            raise SystemExit(f"the loss did not fall: {first} to {last}")

    def spread(self, workers: list[str]) -> None:
        """A sweep of four runs over three machines: each is trained once, and all come to the controller."""
        words = ("sweep", "-e", "sweep=experiments/first", "-e", "into=collected")
        self.play(*words)
        states = [self.home(w) / "state" / "sweep" / "state.json" for w in workers]
        self.wait(
            "the sweep: done on all workers",
            lambda: all(p.exists() and json.loads(p.read_text())["state"] == "done" for p in states),
        )
        tells(self.play(*words), *(rf'{w}: {{\\?"state\\?": ' for w in workers))
        files = [self.folder / "collected" / "sweeps" / "first" / f"{w}.jsonl" for w in workers]
        found = [json.loads(line) for file in files for line in file.read_text().splitlines()]
        runs = [(x["case"], x["seed"]) for x in found if x["kind"] == "run"]
        if len(runs) != 4 or len({*runs}) != 4:
            raise SystemExit(f"the sweep: wanted each of its four runs from one worker, not {sorted(runs)}")
        self.play("stop")


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m tests.cluster.demo", description=__doc__.split("\n")[0])
    p.add_argument("--keep", type=Path, metavar="DIR", help="leave logs and collected runs there")
    p.add_argument("--steps", type=int, default=20000, help="of stage one: more than the drill takes")
    args = p.parse_args(argv)
    return drill(lambda lan, folder: Demo(lan, folder, settings(args.steps)).tour(), args.keep)


if __name__ == "__main__":
    sys.exit(main())
