"""`python -m tests.oracles [--only WORD]`: compare the operators with the peers' real kernels.

Makes `.venv-oracles` beside this environment (the peers must not be importable in it: transformers picks
its kernels by what can be imported), runs Triton's interpreter there,
and writes the table of errors to model/ops/ORACLES.md. Exit code 1 when an error is out of tolerance.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
REQUIREMENTS = Path(__file__).with_name("requirements.txt")
# Without these, the two packages ask for a CUDA toolkit; their kernels here are Triton's and torch's.
NO_CUDA = {
    "MAMBA_FORCE_BUILD": "TRUE",
    "MAMBA_SKIP_CUDA_BUILD": "TRUE",
    "CAUSAL_CONV1D_FORCE_BUILD": "TRUE",
    "CAUSAL_CONV1D_SKIP_CUDA_BUILD": "TRUE",
}


def environment(folder: Path) -> Path:
    """The environment's python; made or made anew when the pins have changed."""
    python = folder / "bin" / "python"
    stamp = folder / ".pins"
    pins = hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()
    if stamp.is_file() and stamp.read_text() == pins:
        return python
    print(f"making {folder.name} (some minutes)", flush=True)
    venv.create(folder, with_pip=True, clear=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    ours = folder / "lib" / version / "site-packages" / "project.pth"
    ours.write_text(sysconfig.get_path("purelib") + "\n")
    pip = [str(python), "-m", "pip", "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, "wheel", "setuptools", "ninja"], check=True)
    subprocess.run(
        [*pip, "--no-build-isolation", "-r", str(REQUIREMENTS)], check=True, env={**os.environ, **NO_CUDA}
    )
    stamp.write_text(pins)
    return python


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.oracles", description=__doc__)
    parser.add_argument("--only", default="", metavar="WORD", help="comparisons whose name contains WORD")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv-oracles")
    parser.add_argument("--setup", action="store_true", help="only make the environment; print its python")
    args = parser.parse_args()
    if args.setup:
        print(environment(args.venv))
        return 0
    command = [str(environment(args.venv)), "-W", "ignore", "-m", "tests.oracles.compare"]
    return subprocess.run(
        [*command, *(["--only", args.only] if args.only else [])],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
