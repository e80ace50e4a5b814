"""Which tensors travel, and as what vectors. Frozen parameters never do.

Shape legend: P fragments  N values of a fragment.

A fragment is a list of tensors that travel together, as one flat vector. Trainable parameters are dealt to
P fragments by bank module, strided, so that each fragment holds modules from every depth. Statistics that
training moves (codebooks, thresholds: persistent floating-point buffers beside trainable parameters) form a
fragment of their own, which is averaged and takes no outer momentum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from train.outer import arrays
from train.outer.arrays import Array

if TYPE_CHECKING:
    from torch import Tensor, nn


def _own(t: Tensor) -> Tensor:
    """The part of a sharded tensor that is here; others as they are."""
    return (t.to_local() if hasattr(t, "to_local") else t).detach()


@dataclass(frozen=True)
class Fragment:
    """names and tensors in order; `plain`: statistics, averaged without momentum.

    Of sharded tensors the part on this rank travels: the same rank of every worker has the same part.
    """

    names: list[str]
    tensors: list[Tensor]
    plain: bool = False

    @property
    def size(self) -> int:
        return sum(_own(t).numel() for t in self.tensors)

    def get(self, offload: bool = True) -> Array:
        """A fresh fp32 vector [N] (fp64 when the tensors are)."""
        import torch

        with torch.no_grad():
            flat = torch.cat([_own(t).reshape(-1) for t in self.tensors])
            return arrays.from_tensor(flat if flat.dtype == torch.float64 else flat.float(), offload)

    def put(self, vector: Array) -> None:
        """Copy a vector [N] into the tensors, in place. Raises ValueError for another length."""
        import torch

        if vector.shape != (self.size,):
            raise ValueError(f"a vector of {vector.shape} values for a fragment of {self.size}")
        source, at = arrays.to_tensor(vector), 0
        with torch.no_grad():
            for t in map(_own, self.tensors):
                t.copy_(source[at : at + t.numel()].view(t.shape))
                at += t.numel()


def fragments(model: nn.Module, pieces: int = 1) -> list[Fragment]:
    """`pieces` fragments of parameters (fewer when there are fewer modules), then one of statistics."""
    import torch

    groups: dict[str, list[tuple[str, Tensor]]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups.setdefault(_module_of(name), []).append((name, p))
    pieces = max(1, min(pieces, len(groups)))
    dealt: list[list[tuple[str, Tensor]]] = [[] for _ in range(pieces)]
    for i, members in enumerate(groups.values()):
        dealt[i % pieces] += members
    out = [Fragment([n for n, _ in d], [p for _, p in d]) for d in dealt]
    stored = set(model.state_dict())
    statistics = [
        (n, b)
        for n, b in model.named_buffers()
        if n in stored and b.dtype in (torch.float32, torch.float64) and _module_of(n) in groups
    ]
    if statistics:
        out.append(Fragment([n for n, _ in statistics], [b for _, b in statistics], plain=True))
    return out


def _module_of(name: str) -> str:
    """`bank.b0_mamba2.block.A_log` -> `bank.b0_mamba2`; `embed.weight` -> `embed`."""
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] in ("bank", "heads") else parts[0]


def signature(parts: list[Fragment]) -> str:
    """Hash of names, shapes and order: equal on every worker, or their vectors do not fit together."""
    text = [(n, list(t.shape), f.plain) for f in parts for n, t in zip(f.names, f.tensors)]
    return xxhash.xxh3_128_hexdigest(repr(text).encode())


def fingerprint(vectors: list[Array]) -> int:
    """xxh3-64 of the bits of some vectors."""
    h = xxhash.xxh3_64()
    for v in vectors:
        h.update(np.ascontiguousarray(arrays.to_host(v)).data)
    return h.intdigest()


def saved(x: Array | None) -> Any:
    """An array for a checkpoint (a copy on the host), or None."""
    import torch

    return None if x is None else torch.from_numpy(np.array(arrays.to_host(x)))


def restored(x: Any, like: Array) -> Array | None:
    """What `saved` gave, in the memory where `like` is."""
    return None if x is None else arrays.namespace(like).asarray(x.numpy())
