"""Parts of tensors, joined into the file that one process would have written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from train import shards
from train.errors import CheckpointError

KINDS = [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float64, torch.uint8]


def split(tensors: dict[str, torch.Tensor], ranks: int, folder: Path) -> None:
    """As the ranks write them: cut along the first dimension, what has none on the last rank alone."""
    folder.mkdir(parents=True)
    for rank in range(ranks):
        parts, places = {}, {}
        for name, t in tensors.items():
            if not t.dim():
                if rank == ranks - 1:
                    parts[name], places[name] = t, {"saved_offsets": []}
                continue
            n = -(-len(t) // ranks)
            first = min(rank * n, len(t))
            parts[name] = t[first : first + n].clone()
            places[name] = {"saved_offsets": [first, *[0] * (t.dim() - 1)]}
        save_file(parts, folder / f"shard-{rank}.safetensors", {shards.OFFSETS: json.dumps(places)})


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(KINDS), st.lists(st.integers(0, 5), max_size=3)), min_size=1, max_size=6
    ),
    st.integers(1, 4),
    st.integers(0, 1000),
)
def test_joined_parts_are_the_tensors(tmp_path_factory, shapes, ranks, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"t{i}": torch.randint(0, 2, shape, generator=generator).to(kind)
        for i, (kind, shape) in enumerate(shapes)
    }
    folder = tmp_path_factory.mktemp("join")
    split(tensors, ranks, folder / "x.parts")
    shards.join(folder / "x.parts", folder / "x.safetensors")
    found = load_file(folder / "x.safetensors")
    assert found.keys() == tensors.keys() and not (folder / "x.parts").exists()
    for name, t in tensors.items():
        assert found[name].dtype == t.dtype and torch.equal(found[name], t), name


def test_a_missing_part_is_noticed(tmp_path) -> None:
    split({"w": torch.arange(6.0), "b": torch.ones(4)}, 3, tmp_path / "x.parts")
    (tmp_path / "x.parts" / "shard-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match="missing or double"):
        shards.join(tmp_path / "x.parts", tmp_path / "x.safetensors")
