"""The AutoCompressor as a model one calls: summary vectors out, summary vectors in.

    out = model(input_ids, attention_mask, output_softprompt=True)
    out = model(next_ids, softprompt=out.softprompt)
    out = model(input_ids, segment_lengths=[2048, 2048, 2048])
    ids = model.generate(prompt_ids, softprompt=out.softprompt, max_new_tokens=50)

`from_pretrained` reads what `save_pretrained` wrote and the published checkpoints of princeton-nlp: a
decoder's
weights with one tensor more, `embed_summary.weight` [kappa, E], and kappa in its config.

Shape legend: B batch  T time  M memory slots  E embedding width.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import safe_open
from torch import Tensor, nn

from model.compress.autocompressor import DocumentOutput, SegmentCompressor
from model.compress.context import CompressedContext
from model.compress.decoder import load_decoder
from model.compress.rows import checked_mask, pack
from model.compress.segments import given_segments
from model.compress.wrap import load_compressor, wrap


class AutoCompressorModel(nn.Module):
    """A fixed or variable AutoCompressor under the names its published code uses."""

    family: ClassVar[str | None] = None

    def __init__(self, compressor: SegmentCompressor) -> None:
        super().__init__()
        kind = compressor.decoder.config.model_type
        if self.family is not None and kind != self.family:
            raise ValueError(
                f"{type(self).__name__} wraps a decoder of type {self.family}, this one is {kind}"
            )
        self.compressor = compressor

    @classmethod
    def from_pretrained(cls, path: str | Path, base_model: Any = None) -> AutoCompressorModel:
        """A folder of ours (with its base by name, or `base_model`), or a published AutoCompressor: a folder,
        or a name on the hub (`princeton-nlp/AutoCompressor-Llama-2-7b-6k`), which is downloaded.

        Raises ValueError where the folder holds neither.
        """
        if (Path(path) / "compressor_config.json").exists():
            loaded = load_compressor(path, base_model)
            if not isinstance(loaded, SegmentCompressor):
                raise ValueError(f"{path} holds a {loaded.registered_name}, not an AutoCompressor")
            return cls(loaded).eval()
        return cls(load_published(local_folder(path))).eval()

    def save_pretrained(self, path: str | Path) -> None:
        self.compressor.save(path)

    def _softprompt(self, value: CompressedContext | Tensor | None) -> CompressedContext | None:
        """Bare summary vectors [B, M, E] stand for a memory without padding."""
        if not isinstance(value, Tensor):
            return value
        shown = torch.ones(value.shape[:2], dtype=torch.bool, device=value.device)
        source = torch.zeros(value.shape[0], dtype=torch.int64, device=value.device)
        nowhere = None if self.compressor.decoder.rotary else torch.full_like(shown, -1, dtype=torch.int64)
        return self.compressor._embeds(value, shown, source, positions=nowhere)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        softprompt: CompressedContext | Tensor | None = None,
        segment_lengths: Sequence[int] = (),
        output_softprompt: bool = False,
    ) -> DocumentOutput:
        """Read [B, T], in segments if lengths are given; see `SegmentCompressor.document`."""
        with torch.set_grad_enabled(self.training and torch.is_grad_enabled()):
            return self.compressor.document(
                input_ids, attention_mask, labels=labels, softprompt=self._softprompt(softprompt),
                segment_lengths=segment_lengths, output_softprompt=output_softprompt,
            )  # fmt: skip

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        softprompt: CompressedContext | Tensor | None = None,
        segment_lengths: Sequence[int] = (),
        **options: Any,
    ) -> Tensor:
        """Continue a prompt after a memory. segment_lengths: all segments but the last go into the memory
        first;
        what is returned begins with the last one. Raises ValueError unless they add up to the prompt."""
        c, memory = self.compressor, self._softprompt(softprompt)
        mask = checked_mask(input_ids, attention_mask, c.decoder.config.pad_token_id, "generate")
        if segment_lengths:
            *_, last = given_segments(input_ids, mask, segment_lengths)
            if len(segment_lengths) > 1:
                head = sum(segment_lengths[:-1])
                with torch.no_grad():
                    memory = c.document(
                        input_ids[:, :head], mask[:, :head], segment_lengths=segment_lengths[:-1],
                        softprompt=memory, output_softprompt=True,
                    ).softprompt  # fmt: skip
            input_ids, mask = pack(*last, left=False)
        return c.generate(input_ids, memory, mask, **options)


class LlamaAutoCompressorModel(AutoCompressorModel):
    family = "llama"


class OPTAutoCompressorModel(AutoCompressorModel):
    family = "opt"


def local_folder(path: str | Path) -> Path:
    """The folder itself, or the hub's copy of a name that is no folder."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(path)))


def load_published(folder: str | Path) -> SegmentCompressor:
    """An AutoCompressor from the layout of the published checkpoints: the decoder's own files, in which
    `embed_summary.weight` lies beside its weights, and `summary_length`, `accumulate_summary` in config.json.

    Raises ValueError where there is no embed_summary or its size is not the config's.
    """
    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text())
    summary = _stored(folder, "embed_summary.weight")
    kappa = int(config.get("summary_length", 0))
    if summary is None or summary.shape[0] != kappa:
        found = "none" if summary is None else tuple(summary.shape)
        raise ValueError(
            f"{folder}: embed_summary.weight is {found}, and config.json says summary_length={kappa}"
        )
    made = wrap(
        load_decoder(folder), "autocompressor", tune="full",
        summary_length=kappa, accumulate_summary=bool(config.get("accumulate_summary", True)),
    )  # fmt: skip
    assert isinstance(made, SegmentCompressor)
    made.get_parameter("embed_summary").data.copy_(summary)
    return made


def _stored(folder: Path, name: str) -> Tensor | None:
    """One tensor of a checkpoint folder, whichever of its files holds it (safetensors,
    or .bin as weights only)."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(str(file), "pt") as tensors:
            if name in tensors.keys():  # noqa: SIM118 (it is no dict)
                return tensors.get_tensor(name)
    for file in sorted(folder.glob("*.bin")):
        tensors = torch.load(file, map_location="cpu", weights_only=True)
        if name in tensors:
            return tensors[name]
    return None
