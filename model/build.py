"""From a configuration to a model, and from a run's folder back to the model that it holds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from model import config as reader
from model.embed import stored_rows
from model.hub import SourceError, pretrained_rows
from model.lm import LanguageModel
from model.schema import Config, ConfigError

DEFAULT_VOCAB = 49152  # SmolLM2's; used when neither the configuration nor a dataset says otherwise


def build(
    source: Config | str | Path | Mapping[str, Any],
    overrides: Mapping[str, Any] | Sequence[str] = (),
    *,
    vocab: int | None = None,
    rows: np.ndarray | None = None,
    table: Tensor | None = None,
) -> LanguageModel:
    """A freshly initialised model.

    source:    a Config, a path, a name in model/archs/, or a mapping.
    overrides: `{"dim": 384, "run.steps": 10}` or `["dim=384"]`.
    vocab:     the dataset's; checked against the configuration's, when it names one.
    rows:      int64 [V] rows of the pretrained table that the dataset's tokens stand for (a cut
               tokenizer); None: the table as it is.
    table:     [V, W] token rows to use instead of reading `embed.from`.
    Raises ConfigError for whatever is wrong with the configuration or the pretrained source.
    """
    config = source if isinstance(source, Config) else reader.load(source, overrides)
    if vocab is not None and config.vocab not in (None, vocab):
        raise ConfigError(
            [
                f"{config.name}: vocab: {config.vocab}, but the dataset's tokenizer has {vocab};"
                f" drop the key (--set vocab=null) to take the dataset's"
            ]
        )
    if table is None and config.embed.from_ is not None:
        try:
            table = pretrained_rows(config.embed.from_, rows)
        except SourceError as error:
            raise ConfigError([f"{config.name}: embed.from: {error}"]) from error
    size = vocab or config.vocab or (table.shape[0] if table is not None else DEFAULT_VOCAB)
    try:
        return LanguageModel(config, size, table)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError([f"{config.name}: {error}"]) from error


def load(source: str | Path) -> LanguageModel:
    """The model of a run's latest complete checkpoint (or of one checkpoint, or of an exported folder).

    The folder says what it is (`config.yaml`) and holds every weight (`model.safetensors`), so neither
    dataset nor pretrained source is needed. In evaluation mode, on the CPU.
    Raises ConfigError when there is nothing complete to load.
    """
    folder = checkpoint_folder(Path(source))
    config = reader.load(folder / "config.yaml")
    file = folder / "model.safetensors"
    try:
        tensors = load_file(file)
        vocab, rows = stored_rows(tensors)
        lm = LanguageModel(config, vocab, rows if config.embed.from_ is not None else None)
        lm.load_state_dict(tensors)
    except (SafetensorError, KeyError) as error:
        raise ConfigError(
            [f"{file}: cannot be read as a model ({error}); take another checkpoint"]
        ) from error
    except RuntimeError as error:  # of load_state_dict: other names or shapes
        raise ConfigError([f"{file}: does not fit the config.yaml beside it: {error}"]) from error
    return lm.eval()


def checkpoint_folder(path: Path) -> Path:
    """The newest complete checkpoint below a run, or the folder itself when it holds a model.

    Complete: its manifest is there and every file has the size that it says.
    """
    for folder in [path, *sorted((path / "checkpoints").glob("step_*[0-9]"), reverse=True)]:
        if (
            (folder / "config.yaml").is_file()
            and (folder / "model.safetensors").is_file()
            and _sizes_fit(folder)
        ):
            return folder
    raise ConfigError([f"{path}: no complete checkpoint here; want a run folder, a checkpoint or an export"])


def _sizes_fit(folder: Path) -> bool:
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        return not folder.name.startswith("step_")  # an export has none
    try:
        files = json.loads(manifest.read_text())["files"]
        return all((folder / name).stat().st_size == entry["bytes"] for name, entry in files.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False
