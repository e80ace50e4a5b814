"""What a compressor writes: its own tensors, and a description that binds them to a decoder."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

from safetensors.torch import save_file
from torch import Tensor, nn

from model.compress.decoder import Decoder

FORMAT = "latent-lab-compressor-1"


def write_json(path: Path, value: dict[str, Any]) -> None:
    """A JSON file that is whole or absent."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
    os.replace(partial, path)


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """The state dict as safetensors takes it: a tensor that lies in the storage of an earlier one, as tied
    heads and embeddings do, is copied."""
    out: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in module.state_dict().items():
        place = tensor.untyped_storage().data_ptr()
        out[name] = tensor.detach().clone() if place in seen else tensor.detach().contiguous()
        seen.add(place)
    return out


class Saved(nn.Module):
    """A module with a method name, a config and a decoder that is no submodule."""

    registered_name: ClassVar[str] = ""
    decoder: Decoder
    config: Any

    def description(self) -> dict[str, Any]:
        """What `compressor_config.json` holds."""
        name = getattr(self.decoder.config, "_name_or_path", "") or None
        return {
            "format": FORMAT,
            "method": self.registered_name,
            "config": asdict(self.config),
            "base": None if name and os.path.isabs(name) else name,
            "fingerprint": self.decoder.fingerprint,
        }

    def save(self, folder: str | Path) -> None:
        """Write compressor_config.json and adapter_model.safetensors:
        the method's own tensors and nothing else."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / "adapter_model.safetensors.partial"
        save_file(tensors_of(self), str(partial), metadata={"format": "pt"})
        os.replace(partial, folder / "adapter_model.safetensors")
        write_json(folder / "compressor_config.json", self.description())

    def push_to_hub(self, repo_id: str, folder: str | Path) -> None:
        """Save to `folder` and upload it; needs a network and a login of huggingface_hub."""
        from huggingface_hub import HfApi

        self.save(folder)
        api = HfApi()
        api.create_repo(repo_id, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=str(folder))
