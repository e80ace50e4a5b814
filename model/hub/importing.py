"""A transformers folder -> a folder that `model.load`, `python -m model generate` and `--init-from` take.

config.yaml  the arch      model.safetensors  fp32 weights by our names      tokenizer.json
origin.json  where they come from
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from model import config as configs
from model.embed import stored_rows
from model.hub.families import ImportRefused, Outline, outline
from model.hub.folders import new_folder, taken
from model.hub.sources import PACKAGES, WEIGHTS, SourceError, hub_folder, weight_files
from model.items import Cross, Visit
from model.lm import LanguageModel
from model.plan import make_plan
from model.schema import Config, ConfigError

MODEL_TYPE = "latent_lab"  # of the folders that `exporting` writes
SKIPPED = ("rotary_emb.inv_freq", "masked_bias")  # recomputed, not learned


def import_model(source: str | Path, out: str | Path) -> Config:
    """Write the model of a transformers folder, a hub id or a packaged name to the folder `out`.

    Returns its configuration. Raises ConfigError when `out` is taken, the source is not there, or the model
    cannot be rebuilt exactly; nothing is left behind.
    """
    out = Path(out)
    if taken(out):
        raise ConfigError([f"{out}: is not empty; give another folder with --out"])
    try:
        folder = _folder(str(source))
        config, tensors = read_model(folder, name=out.resolve().name)
    except (SourceError, ImportRefused) as error:
        raise ConfigError([f"{source}: {error}"]) from error
    with new_folder(out) as partial:
        save_file(tensors, partial / "model.safetensors")
        (partial / "config.yaml").write_text(configs.dumps(config), encoding="utf-8")
        (partial / "origin.json").write_text(json.dumps(_origin(source, folder), indent=1))
        if (folder / "tokenizer.json").is_file():
            shutil.copyfile(folder / "tokenizer.json", partial / "tokenizer.json")
    return config


def read_model(folder: Path, name: str) -> tuple[Config, dict[str, Tensor]]:
    """(the arch, its fp32 state_dict) of a transformers folder. Raises SourceError or ImportRefused."""
    about = _json(folder / "config.json")
    theirs = _tensors(folder)
    if about.get("model_type") == MODEL_TYPE:
        if not isinstance(about.get("arch"), dict):
            raise SourceError("its config.json has no `arch`: want a folder that `export` wrote")
        config = configs.load({**about["arch"], "name": name})
        ours = {n.removeprefix("lm."): t for n, t in theirs.items()}
        check_fit(config, ours)
        return config, ours
    from transformers import AutoConfig

    try:
        found = outline(AutoConfig.from_pretrained(folder, local_files_only=True))
    except (ValueError, KeyError, TypeError, ArithmeticError, AttributeError, StrictDataclassError) as error:
        if isinstance(error, ImportRefused):
            raise
        raise SourceError(f"its config.json is not understood: {error}") from error
    config = configs.load({"name": name, **found.arch})
    ours = rename(config, found, theirs)
    check_fit(config, ours)
    return config, ours


def rename(config: Config, found: Outline, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors by our names, in fp32. Raises ImportRefused when some have no place."""
    theirs = {n: t for n, t in theirs.items() if not n.endswith(SKIPPED)}
    if found.head is None:
        theirs.pop("lm_head.weight", None)  # the table again
    where = {found.embed: "embed.weight", found.norm: "heads.next.norm.weight"}
    if found.head is not None:
        where[found.head] = "embed.unembed"
    modules = [i.module for i in make_plan(config).walk() if isinstance(i, Visit | Cross)]
    for module, (norm, block) in zip(modules, found.layers, strict=True):
        for name in theirs:
            if name.startswith(f"{norm}."):
                where[name] = f"bank.{module}.norm{name[len(norm) :]}"
            elif name.startswith(f"{block}."):
                where[name] = f"bank.{module}.block{name[len(block) :]}"
    lost = sorted(theirs.keys() - where.keys())
    missing = sorted(where.keys() - theirs.keys())
    if lost or missing:
        what = [f"no place for {', '.join(lost[:4])}"] if lost else []
        what += [f"no {', '.join(missing[:4])}"] if missing else []
        raise ImportRefused(f"{len(lost) + len(missing)} tensors do not match: {'; '.join(what)}")
    ours = {where[name]: tensor.float().contiguous() for name, tensor in theirs.items()}
    return {**ours, "embed.scale": torch.tensor(1.0)}


def check_fit(config: Config, ours: Mapping[str, Tensor]) -> None:
    """Names and shapes are those of the model that the arch builds. Raises ImportRefused."""
    if "embed.weight" not in ours:
        raise ImportRefused("there is no token table among the tensors")
    vocab, rows = stored_rows(ours)
    if vocab != config.vocab:
        raise ImportRefused(f"the token table has {vocab} rows, and the vocabulary {config.vocab}")
    with torch.device("meta"):
        lm = LanguageModel(config, vocab, None if config.embed.from_ is None else rows)
    want = {n: t.shape for n, t in lm.state_dict().items()}
    have = {n: t.shape for n, t in ours.items()}
    wrong = sorted(n for n in want.keys() | have.keys() if want.get(n) != have.get(n))
    if wrong:
        lines = [f"{n}: {_shape(have.get(n))} instead of {_shape(want.get(n))}" for n in wrong[:4]]
        raise ImportRefused(f"{len(wrong)} tensors do not fit: {'; '.join(lines)}")


# ----------------------------------------------------------------------------- files


def _folder(source: str) -> Path:
    if source in PACKAGES:
        from model.hub.packaged import packaged_folder

        return packaged_folder(source)
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.suffix or source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise SourceError(
            f"no such folder: want a transformers folder, one of {sorted(PACKAGES)}, or a hub id"
        )
    return hub_folder(source, (*WEIGHTS, "config.json", "tokenizer.json"))


def _json(path: Path) -> dict[str, Any]:
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SourceError("has no config.json: want a folder that save_pretrained wrote") from None
    except (OSError, ValueError) as error:
        raise SourceError(f"its config.json cannot be read ({error})") from error
    if not isinstance(about, dict):
        raise SourceError("its config.json is no mapping: want a folder that save_pretrained wrote")
    return about


def _tensors(folder: Path) -> dict[str, Tensor]:
    files = weight_files(folder)
    if not files:
        raise SourceError("has no safetensors file: load it with transformers and save_pretrained it again")
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            tensors |= load_file(file)
        except (SafetensorError, OSError) as error:
            raise SourceError(f"{file.name} cannot be read ({error})") from error
    return tensors


def _origin(source: str | Path, folder: Path) -> dict[str, Any]:
    files = {f.name: f.stat().st_size for f in weight_files(folder)}
    about = _json(folder / "config.json")
    return {"source": str(source), "model_type": about.get("model_type"), "bytes": files}


def _shape(shape: torch.Size | None) -> str:
    return "nothing" if shape is None else str(list(shape))
