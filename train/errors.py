"""What a user can put right: told in one message, without a traceback, with exit code 2.

Exit codes: 0 done, 2 something the user can put right, 3 training diverged, 130 SIGINT and 143 SIGTERM
(both after the step was finished and saved), 1 a fault of ours.
"""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

EXIT_USER = 2
EXIT_DIVERGED = 3
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143


class UserError(Exception):
    """A message that says where, what was given, what is allowed, and what to do."""


class CheckpointError(UserError):
    """A checkpoint that is missing, half-written, damaged, or of another model."""


class DiskFull(UserError):
    """No room for what was to be written; what was there before is untouched."""


class Diverged(Exception):
    """The loss or the gradients stayed non-finite."""


def disk_full(path: Path, need: int | None = None) -> DiskFull:
    """The message for a full disk at `path` (need: bytes that were to be written)."""
    where = path
    while not where.exists() and where != where.parent:
        where = where.parent
    free = shutil.disk_usage(where).free
    wanted = f" for {need / 1e6:.1f} MB" if need else ""
    return DiskFull(
        f"{path}: no space left{wanted} ({free / 1e6:.1f} MB free on that disk); earlier checkpoints are "
        f"untouched. Free some space and go on with --resume, or lower run.keep."
    )


def is_disk_full(error: BaseException) -> bool:
    """Whether an error, or what it was raised from, says that the disk or the user's share of it is full.

    safetensors reports errors of the operating system as text only.
    """
    if error.__cause__ is not None and is_disk_full(error.__cause__):
        return True
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    codes = (f"os error {code}" for code in (errno.ENOSPC, errno.EDQUOT))
    return type(error).__name__ == "SafetensorError" and any(c in str(error) for c in codes)
