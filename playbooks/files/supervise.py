"""Keep one program running: restart it when it fails, stop it by SIGTERM and, after a deadline, by force.

    supervise.py start  --state DIR [options] -- COMMAND...    in the background; says `started` or `running`
    supervise.py run    --state DIR [options] -- COMMAND...    in the foreground (what the systemd unit runs)
    supervise.py stop   --state DIR                            says `stopped` or `not running`
    supervise.py status --state DIR                            one line of JSON

DIR holds pid.json (pid and start time: a reused pid is not mistaken for ours), state.json and log. Every
descendant belongs to the supervisor (PR_SET_CHILD_SUBREAPER), so that nothing outlives it. Linux; Python's
standard library alone.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PR_SET_CHILD_SUBREAPER = 36
BACKOFF_S = 5.0
USER = 2  # the exit code of what a person is to mend: another start would end with it, too


def stat_of(pid: int) -> tuple[int, str] | None:
    """(parent, start time) of a living process, or None."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if words[0] in "ZX" else (int(words[1]), words[19])


def descendants(root: int) -> list[int]:
    """All living processes below root, parents first."""
    parents = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (found := stat_of(int(entry))):
            parents[int(entry)] = found[0]
    out, layer = [], [root]
    while layer:
        layer = [pid for pid, parent in parents.items() if parent in layer]
        out += layer
    return out


def send(pids: list[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def write(path: Path, value: dict[str, Any]) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value))
    part.replace(path)


def read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def alive(state: Path) -> int | None:
    """The supervisor's pid, if it runs."""
    found = read(state / "pid.json")
    now = stat_of(found["pid"]) if found else None
    return found["pid"] if now and now[1] == found["started"] else None


class Supervisor:
    """restarts: how often a failed program is started again. deadline: seconds from SIGTERM to SIGKILL."""

    def __init__(self, state: Path, command: list[str], restarts: int, deadline: float) -> None:
        self.state, self.command = state, command
        self.restarts, self.deadline = restarts, deadline
        self.stopping = False
        self.child = 0

    def run(self) -> int:
        """Until the program ends well, is stopped, wants something mended, or has failed too often."""
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        own = stat_of(os.getpid())
        assert own is not None
        write(self.state / "pid.json", {"pid": os.getpid(), "started": own[1]})
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, self._stop)
        signal.signal(signal.SIGALRM, lambda *_: send(descendants(os.getpid()), signal.SIGKILL))
        code, tries = 0, 0
        while True:
            self._note("running", tries, None)
            code = self._once()
            if self.stopping or code in (0, USER) or tries == self.restarts:
                break
            tries += 1
            self._note("restarting", tries, code)
            print(f"supervise: exit code {code}; start {tries} of {self.restarts}", flush=True)
            self._pause(BACKOFF_S)
            if self.stopping:
                break
        self._note("stopped" if self.stopping else "failed" if code else "done", tries, code)
        (self.state / "pid.json").unlink(missing_ok=True)
        return 0 if self.stopping else code

    def _pause(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not self.stopping and time.monotonic() < end:
            time.sleep(0.1)

    def _once(self) -> int:
        """One life of the program, and of whatever it leaves behind."""
        # Kept until it is over: a Popen that is collected takes the exit code of its process away.
        process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL, start_new_session=True)
        self.child = process.pid
        if self.stopping:  # the signal came before there was a child
            self._stop()
        code = None
        while code is None:
            try:
                pid, status = os.wait()
            except ChildProcessError:
                return 1
            if pid == self.child:
                code = os.waitstatus_to_exitcode(status)
        self.child, process.returncode = 0, code
        send(descendants(os.getpid()), signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while True:
                os.wait()
        signal.alarm(0)
        return code

    def _stop(self, *_: object) -> None:
        self.stopping = True
        if self.child:
            signal.alarm(max(1, round(self.deadline)))
            send([self.child], signal.SIGTERM)

    def _note(self, word: str, tries: int, code: int | None) -> None:
        facts = {"state": word, "restarts": tries, "code": code, "time": round(time.time(), 1)}
        write(self.state / "state.json", {**facts, "deadline": self.deadline})


def start(one: Supervisor) -> int:
    """Leave the supervisor behind as a daemon."""
    with open(one.state / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if alive(one.state):
            print("running")
            return 0
        (one.state / "pid.json").unlink(missing_ok=True)
        if os.fork():
            os.wait()
            end = time.monotonic() + 20
            while not (one.state / "pid.json").exists() and time.monotonic() < end:
                time.sleep(0.02)
            print("started")
            return 0
        os.setsid()
        if os.fork():
            os._exit(0)
        lock.close()
    log = os.open(one.state / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o640)
    null = os.open(os.devnull, os.O_RDONLY)
    for number, file in enumerate((null, log, log)):
        os.dup2(file, number)
    os.closerange(3, 256)
    os._exit(one.run())


def stop(state: Path) -> int:
    pid = alive(state)
    if pid is None:
        print("not running")
        return 0
    end = time.monotonic() + float(read(state / "state.json").get("deadline", 60)) + 15
    send([pid], signal.SIGTERM)
    while alive(state) == pid and time.monotonic() < end:
        time.sleep(0.1)
    if alive(state) == pid:  # cannot be: it kills by its own deadline
        send([*descendants(pid), pid], signal.SIGKILL)
    print("stopped")
    return 0


def status(state: Path) -> int:
    facts = read(state / "state.json") or {"state": "never started"}
    pid = alive(state)
    if pid is None and facts["state"] in ("running", "restarting"):
        facts["state"] = "killed"
    print(json.dumps({**facts, "pid": pid}))
    return 0


def main(argv: list[str]) -> int:
    p = argparse.ArgumentParser(prog="supervise.py", description="Keep one program running.")
    p.add_argument("action", choices=("start", "run", "stop", "status"))
    p.add_argument("--state", type=Path, required=True, metavar="DIR")
    p.add_argument("--restarts", type=int, default=3, metavar="N")
    p.add_argument("--deadline", type=float, default=60.0, metavar="SECONDS")
    words, command = (
        (argv, []) if "--" not in argv else (argv[: argv.index("--")], argv[argv.index("--") + 1 :])
    )
    args = p.parse_args(words)
    if args.action == "stop":
        return stop(args.state)
    if args.action == "status":
        return status(args.state)
    if not command:
        p.error("want a command after --")
    args.state.mkdir(parents=True, exist_ok=True)
    one = Supervisor(args.state.resolve(), command, args.restarts, args.deadline)
    return start(one) if args.action == "start" else one.run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
