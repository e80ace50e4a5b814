"""One rank of `bandwidth`: trains on random tokens and says how fast, and what it sent.

python -m tests.cluster.rank MODE RANK SIZE MASTER PORT H ROUNDS DIM

MODE: ddp, diloco, streaming or streaming_e3m0. Prints one line of JSON.
"""

from __future__ import annotations

import json
import sys
import time
from datetime import timedelta
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import model
from model.sections import OuterConfig
from train.outer.diloco import DiLoCo
from train.outer.exchange import Collective
from train.outer.lockstep import Lockstep, parts_of
from train.outer.streaming import Streaming

B, T = 2, 128
OUTER = {
    "diloco": {"kind": "diloco"},
    "streaming": {"kind": "streaming", "fragments": 4},
    "streaming_e3m0": {"kind": "streaming", "fragments": 4, "codec": "e3m0"},
}


def main(mode: str, rank: int, size: int, master: str, port: int, every: int, rounds: int, dim: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    where = {"rank": rank, "world_size": size, "timeout": timedelta(seconds=600)}
    dist.init_process_group("gloo", init_method=f"tcp://{master}:{port}", **where)
    lm = model.build("samba", overrides={"dim": dim, "vocab": 4096}, vocab=4096)
    forward = DistributedDataParallel(lm) if mode == "ddp" else lm
    steps = 5 if mode == "ddp" else every * rounds
    # The last step of a run is left out: the exchange that ends a stage is not what is measured.
    state = SimpleNamespace(step=0, schedule=SimpleNamespace(total=10**9))
    outer: Lockstep | None = None
    if mode != "ddp":
        overlap = max(1, every // 5)
        config = OuterConfig(every=every, overlap=overlap, **OUTER[mode])  # type: ignore[arg-type]
        kind = Streaming if mode.startswith("streaming") else DiLoCo
        outer = kind(config, parts_of(lm, config), Collective(None), {"plan": "bandwidth"})
    optimizer = torch.optim.AdamW(lm.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        tokens = torch.randint(0, 4096, (B, T))
        forward(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    if outer is not None:
        step()  # warm up: allocations and lazy imports (under DDP this, too, would take its seconds)
        outer.begin(state)
    dist.barrier()
    began = time.perf_counter()
    for i in range(steps):
        step()
        state.step = i + 1
        if outer is not None:
            outer.maybe_sync(state)
    seconds = time.perf_counter() - began
    parameters = sum(p.numel() for p in lm.parameters())
    sent = outer.traffic.sent if outer else steps * 4 * parameters * 2 * (size - 1) // size
    facts = {"mode": mode, "steps": steps, "seconds": seconds, "parameters": parameters, "sent": sent}
    facts["tokens_per_s"] = steps * B * T / seconds
    print(json.dumps(facts), flush=True)
    if outer is not None:
        outer.close()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], *map(int, sys.argv[5:]))
