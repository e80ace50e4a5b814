"""One rank of `test_gloo`: the small problem under an outer loop over torch.distributed.

python -m tests.outer.gloo_worker RANK SIZE STORE OUT
"""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from tests.outer.conftest import run, values
from train.outer.exchange import Collective

CASES = {
    "diloco_fp32": {"kind": "diloco"},
    "diloco_e3m0": {"kind": "diloco", "codec": "e3m0"},
    "streaming_int8": {"kind": "streaming", "codec": "int8", "overlap": 2},
}
STEPS = 23


def results(rank: int, size: int, store: Path) -> dict[str, np.ndarray]:
    """Final tensors of every case, one vector each, and the bytes that were sent."""
    torch.set_num_threads(1)
    where = {"rank": rank, "world_size": size, "timeout": timedelta(seconds=600)}
    dist.init_process_group("gloo", init_method=f"file://{store}", **where)
    try:
        out = {}
        for name, options in CASES.items():
            net, outer = run(Collective(None), STEPS, **options)
            outer.close()
            out[name] = np.concatenate([t.numpy().ravel() for t in values(net).values()])
            out[f"{name}_sent"] = np.array(outer.traffic.sent)
        return out
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    np.savez(sys.argv[4], **results(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])))
