"""A LAN whose nodes are machines of their own: n1, n2, ... with sshd, pid and mount namespaces, and their own
/srv, /run and /dev/shm; n0 is the controller and has only its place on the network.

Root logs in by a key made for the occasion; host keys are known, so checking stays on. A node is powered off
by killing pid 1 after its cable is cut, so that no peer sees a FIN. The machine's own sshd is not touched.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from tests.cluster import lan
from tests.cluster.lan import Lan, run

SSHD = """\
ListenAddress 0.0.0.0
HostKey {folder}/ssh/host
AuthorizedKeysFile {folder}/ssh/id.pub
PidFile none
UsePAM no
StrictModes no
PasswordAuthentication no
PermitRootLogin prohibit-password
PrintMotd no
Subsystem sftp internal-sftp
"""
# bash as pid 1 reaps orphans; /run without systemd in it. What root's shell does on this machine at its start
# (bash reads .bashrc under sshd) is none of the nodes' business: it would run for every command of a play.
BOOT = """\
mount --make-rprivate / && hostname "$1" && mount --bind "$2/srv/$1" /srv && mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /dev/shm && mkdir -p -m 755 /run/sshd
for file in ~root/.bashrc ~root/.ssh/rc; do test ! -e "$file" || mount --bind /dev/null "$file"; done
"$3" -D -e -f "$2/ssh/sshd_config" &
touch "$2/booted.$1"
while :; do sleep 3600 & wait $!; done
"""


def missing() -> str | None:
    """Why there can be no such LAN on this machine, or None."""
    if why := lan.missing():
        return why
    for tool in ("ssh", "ssh-keygen", "unshare", "git"):
        if shutil.which(tool) is None:
            return f"needs {tool}"
    return None if sshd() else "needs openssh-server's sshd"


def sshd() -> str | None:
    return shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def nft() -> str | None:
    return shutil.which("nft", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


class SshLan(Lan):
    """machines: so many nodes with sshd besides the controller n0."""

    def __init__(self, machines: int, folder: Path, **cables: float) -> None:
        self.inits: dict[str, subprocess.Popen[Any]] = {}
        super().__init__(machines + 1, folder, **cables)

    def _build(self, *cables: float) -> None:
        super()._build(*cables)
        ssh = self.folder / "ssh"
        ssh.mkdir(mode=0o700)
        for key in ("id", "host"):
            run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "lan", "-f", str(ssh / key))
        (ssh / "sshd_config").write_text(SSHD.format(folder=self.folder))
        public = " ".join((ssh / "host.pub").read_text().split()[:2])
        (ssh / "known_hosts").write_text("".join(f"{self.address(i)} {public}\n" for i in range(self.size)))
        for node in self.machines:
            (self.folder / "srv" / node).mkdir(parents=True)
            self.boot(node)

    @property
    def machines(self) -> list[str]:
        return self.nodes[1:]

    def boot(self, node: str) -> None:
        """Power on."""
        flag = self.folder / f"booted.{node}"
        flag.unlink(missing_ok=True)
        self.heal(node)
        words = [
            "unshare",
            "--uts",
            "--mount",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
            "bash",
            "-c",
        ]
        words += [BOOT, "init", node, str(self.folder), str(sshd())]
        with open(self.folder / f"{node}.log", "ab") as log:
            self.inits[node] = self.popen(node, words, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        end = time.monotonic() + 120
        while not flag.exists():
            if time.monotonic() > end or self.inits[node].poll() is not None:
                raise RuntimeError(f"{node} did not start: {(self.folder / f'{node}.log').read_text()}")
            time.sleep(0.05)

    def power_off(self, node: str) -> None:
        """The cable first, then everything on the node at once."""
        self.cut(node)
        self.inits[node].kill()  # --kill-child: pid 1 of the node goes with it, and all the others with that
        self.inits[node].wait()

    def inventory(self, path: Path, common: dict[str, Any], server: str) -> None:
        """Write an inventory of all machines as workers. common: what stands under all.vars besides ssh."""
        ssh = self.folder / "ssh"
        known = f"-o UserKnownHostsFile={ssh}/known_hosts -o IdentitiesOnly=yes -o ConnectTimeout=10"
        every = {
            "ansible_user": "root",
            "ansible_ssh_private_key_file": str(ssh / "id"),
            "ansible_ssh_common_args": f"{known} -o StrictHostKeyChecking=yes -o ServerAliveInterval=5",
            "ansible_python_interpreter": shutil.which("python3", path="/usr/bin") or sys.executable,
            "ansible_remote_tmp": "/srv/.ansible/tmp",
            **common,
        }
        hosts = {
            name: {"ansible_host": self.address(i), "lab_interface": "eth0", "lab_ranks": 1}
            for i, name in enumerate(self.nodes)
            if i
        }
        groups = {"server": {"hosts": {server: None}}, "workers": {"hosts": hosts}}
        path.write_text(yaml.safe_dump({"all": {"vars": every, "children": groups}}, sort_keys=False))

    def close(self) -> None:
        for init in self.inits.values():
            if init.poll() is None:
                init.kill()
        for name in self._made:  # whatever else runs in our namespaces: ssh's shared connections
            found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False)
            for pid in found.stdout.split():
                try:
                    os.kill(int(pid), signal.SIGKILL)
                except ProcessLookupError:
                    continue
        super().close()
