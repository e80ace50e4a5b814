"""Writing tensors that are cut among ranks into one safetensors file.

Every rank writes its own part through torch.distributed.checkpoint, in safetensors form; rank 0 then joins
the parts. The result is the file that a single process would have written, so whatever reads checkpoints
reads these, at any number of ranks. No rank ever holds more than its part and one tensor.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

from train.errors import CheckpointError
from train.world import World

OFFSETS = "DCP_SHARDING_INFO"  # where the writer says what part of a tensor a file holds


def write(tensors: Mapping[str, Tensor], path: Path, world: World) -> None:
    """Write full tensors to `path` from the ranks' parts. Called on every rank, with the same names.

    Raises CheckpointError on every rank when any of them fails.
    """
    parts = path.with_suffix(".parts")
    if world.any(not path.parent.is_dir()):
        raise CheckpointError(
            f"{path.parent}: not every rank sees this folder; a sharded model is saved where all ranks can "
            f"write (a shared disk), or with run.parallel=ddp"
        )
    state = {name: t.detach() for name, t in tensors.items()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns of its own internals
            writer = HuggingFaceStorageWriter(str(parts), save_distributed=True)
            dcp.save(state, storage_writer=writer, process_group=world.group)
    except CheckpointException as error:  # a BaseException, with one error a rank
        first = next(iter(error.failures.values()))[0]
        raise CheckpointError(f"{path}: cannot be written ({first})") from first
    world.on_main(lambda: join(parts, path))


def join(parts: Path, path: Path) -> None:
    """One file of full tensors from the parts in a folder, which is removed. Raises CheckpointError."""
    files = sorted(parts.glob("*.safetensors"))
    shapes: dict[str, list[int]] = {}
    kinds: dict[str, torch.dtype] = {}
    for _, name, offset, part in pieces(files):
        shape = [o + n for o, n in zip(offset, part.shape)]
        shapes[name] = [max(a, b) for a, b in zip(shapes.get(name, shape), shape)]
        kinds[name] = part.dtype
    header, size = layout(shapes, kinds)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(start + size)
    content = np.memmap(path, np.uint8, "r+")
    filled = dict.fromkeys(shapes, 0)
    for _, name, offset, part in pieces(files):
        first, last = header[name]["data_offsets"]
        full = torch.from_numpy(content[start + first : start + last]).view(kinds[name]).view(shapes[name])
        full[tuple(slice(o, o + n) for o, n in zip(offset, part.shape))] = part
        filled[name] += part.numel()
    content.flush()
    if holes := [n for n, shape in shapes.items() if filled[n] != int(np.prod(shape))]:
        raise CheckpointError(f"{path}: parts of {', '.join(holes[:3])} are missing or double")
    shutil.rmtree(parts)


def pieces(files: list[Path]):
    """(file, tensor name, its place in the full tensor, the part) of every part in some files."""
    for path in files:
        with safe_open(path, framework="pt") as file:
            places = json.loads((file.metadata() or {}).get(OFFSETS, "{}"))
            for name in file.keys():  # noqa: SIM118 - not a mapping
                part = file.get_tensor(name)
                yield path, name, places.get(name, {}).get("saved_offsets") or [0] * part.dim(), part


def layout(shapes: Mapping[str, list[int]], kinds: Mapping[str, torch.dtype]) -> tuple[dict[str, dict], int]:
    """The header of a safetensors file and the size of what follows it. Wider types come first, so that
    every tensor is aligned."""
    header, at = {}, 0
    for name in sorted(shapes, key=lambda n: (-kinds[n].itemsize, n)):
        size = int(np.prod(shapes[name])) * kinds[name].itemsize
        header[name] = {
            "dtype": DTYPES[kinds[name]],
            "shape": shapes[name],
            "data_offsets": [at, at + size],
        }
        at += size
    return header, at


DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip
