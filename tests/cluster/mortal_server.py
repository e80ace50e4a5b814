"""`train serve`, dying by SIGKILL in the middle of its N-th push: after the journal, before or after θ moves.

python -m tests.cluster.mortal_server N before|after SERVE_OPTIONS...
"""

from __future__ import annotations

import os
import signal
import sys

import numpy as np

from train.outer.coordinator import Coordinator
from train.outer.watch import serve


def arm(count: int, when: str) -> None:
    whole, left = Coordinator.push, count

    def push(self: Coordinator, name: str, lease: int, seconds: float, code: np.ndarray, now: float) -> str:
        nonlocal left
        left -= 1
        if not left and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        verdict = whole(self, name, lease, seconds, code, now)
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        return verdict

    Coordinator.push = push  # type: ignore[method-assign]


if __name__ == "__main__":
    arm(int(sys.argv[1]), sys.argv[2])
    sys.exit(serve(sys.argv[3:]))
