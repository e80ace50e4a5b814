"""Low-rank adapters that are on only inside a `with` block and never touch the layers they adapt.

y = W x + (alpha / r) B A x   (Hu et al. 2021, arXiv 2106.09685)

They are forward hooks on whole modules, so `nn.Linear`, GPT-2's transposed `Conv1D` with its fused
query/key/value, and quantized linears (whose weights cannot be read) are all adapted the same way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn


def _sizes(module: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of a linear map, whatever class it is."""
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]
    if hasattr(module, "nx") and hasattr(module, "nf"):  # Conv1D of transformers: weight [inputs, outputs]
        return int(module.nx), int(module.nf)  # type: ignore[arg-type]
    raise TypeError(f"LoRA adapts linear maps; {type(module).__name__} has neither in_features nor nx")


class LoRA(nn.Module):
    """Adapters for `targets` (name -> module). B starts at zero, so a fresh adapter changes nothing.

    rank: r; 0 makes no adapter at all.  alpha: scale numerator; the update is multiplied by alpha / r.
    """

    def __init__(self, targets: Mapping[str, nn.Module], rank: int, alpha: float) -> None:
        super().__init__()
        self._targets = dict(targets) if rank > 0 else {}
        self.scale = alpha / rank if rank else 0.0
        self.down = nn.ParameterDict()
        self.up = nn.ParameterDict()
        for name, module in self._targets.items():
            inputs, outputs = _sizes(module)
            key = name.replace(".", "/")
            self.down[key] = nn.Parameter(torch.randn(rank, inputs) / inputs**0.5)
            self.up[key] = nn.Parameter(torch.zeros(outputs, rank))

    @contextmanager
    def on(self) -> Iterator[None]:
        """Adapters are active inside the block; hooks are removed even if it raises."""
        handles = []
        try:
            for name, module in self._targets.items():
                handles.append(module.register_forward_hook(self._hook(name.replace(".", "/"))))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def load_published(self, path: str | Path) -> None:
        """Load an adapter saved in the usual layout, `...layers.0.self_attn.q_proj.lora_A.weight` and
        lora_B, from
        a safetensors file or a folder with `adapter_model.safetensors`.

        Raises KeyError where a target has no tensors there, RuntimeError for tensors of another shape.
        """
        path = Path(path)
        stored = load_file(str(path / "adapter_model.safetensors" if path.is_dir() else path))
        for name in self._targets:
            key, layer = name.replace(".", "/"), f".{name}."
            for ours, theirs in ((self.down, "lora_A"), (self.up, "lora_B")):
                found = [v for k, v in stored.items() if layer in k and theirs in k]
                if len(found) != 1:
                    raise KeyError(f"{path}: no {theirs} for layer {name}")
                want, got = tuple(ours[key].shape), tuple(found[0].shape)
                if want != got:
                    raise RuntimeError(f"{path}: {theirs} of layer {name} is {got}, here {want}")
                ours[key].data.copy_(found[0])

    def _hook(self, key: str):
        def add(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
            x = args[0]
            low = nn.functional.linear(x.to(self.down[key].dtype), self.down[key])
            return y + (self.scale * nn.functional.linear(low, self.up[key])).to(y.dtype)

        return add
