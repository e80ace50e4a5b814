"""The artefact: a compressed context, carried as input embeddings or as a key/value cache.

Shape legend: B batch  S slots  E embedding width of the decoder  H key/value heads  K head width.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from model.core import NO_AUX, Aux

FORMAT = "latent-lab-context-1"


@dataclass(frozen=True)
class LayerSlots:
    """What one layer keeps of a context.

    keys, values: [B, H, S, K], keys already rotated where the decoder rotates.
    mask:         [B, S] bool, False where a row has fewer slots than the widest row.
    bias:         [B, S] added to the attention scores of a slot (log survival), or None.
    """

    keys: Tensor
    values: Tensor
    mask: Tensor
    bias: Tensor | None = None


def tight(t: Tensor) -> Tensor:
    """The tensor in storage of its own size: a view of something larger would keep all of that alive."""
    return (
        t
        if t.untyped_storage().nbytes() == t.numel() * t.element_size()
        else t.clone(memory_format=torch.contiguous_format)
    )


@dataclass(frozen=True)
class CompressedContext:
    """What a method keeps of a batch of contexts, and where the text after it begins.

    method:        name of the method that made it.
    fingerprint:   of the decoder it was made for (`Decoder.fingerprint`).
    source_length: [B] int64, real tokens that went in.
    next_position: [B] int64, position of the first token that follows.
    Carrier `embeds`: embeds [B, S, E], slot_mask [B, S] bool, slot_positions [B, S] int64 (-1: no position
    at all, which only decoders with learned positions know) and slot_bias [B, S] or None.
    Carrier `cache`: layers, one `LayerSlots` per decoder layer; layers may differ in S.
    extras: further tensors that the method keeps, rows first (codes of a stream, with their residuals and
    indices); counted in `bytes`, and made into slots by the method's own `lower` alone.
    aux: losses and statistics of the compression, for training; neither counted, nor copied, nor saved.
    """

    method: str
    fingerprint: str
    source_length: Tensor
    next_position: Tensor
    embeds: Tensor | None = None
    slot_mask: Tensor | None = None
    slot_positions: Tensor | None = None
    slot_bias: Tensor | None = None
    layers: tuple[LayerSlots, ...] | None = None
    extras: dict[str, Tensor] = field(default_factory=dict)
    aux: Aux = NO_AUX

    def __post_init__(self) -> None:
        if (self.embeds is None) == (self.layers is None):
            raise ValueError("a compressed context has exactly one carrier: `embeds` or `layers`")

    @property
    def carrier(self) -> str:
        return "embeds" if self.embeds is not None else "cache"

    @property
    def batch_size(self) -> int:
        return self.source_length.shape[0]

    @property
    def slot_counts(self) -> Tensor:
        """[B] int64 for `embeds`, [L, B] for `cache`: slots that hold something."""
        if self.layers is not None:
            return torch.stack([layer.mask.sum(1) for layer in self.layers])
        assert self.slot_mask is not None
        return self.slot_mask.sum(1)

    @property
    def uniform(self) -> bool:
        """Whether one slot mask holds for all layers, so that one attention mask serves them all."""
        if self.layers is None:
            return True
        first = self.layers[0].mask
        return all(
            layer.mask is first or (layer.mask.shape == first.shape and torch.equal(layer.mask, first))
            for layer in self.layers
        )

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor that is kept, by name; a tensor shared by several layers comes once."""
        for name in ("source_length", "next_position", "embeds", "slot_mask", "slot_positions", "slot_bias"):
            value = getattr(self, name)
            if value is not None:
                yield name, value
        seen: set[int] = set()
        for i, layer in enumerate(self.layers or ()):
            for name in ("keys", "values", "mask", "bias"):
                value = getattr(layer, name)
                if value is not None and id(value) not in seen:
                    seen.add(id(value))
                    yield f"layers.{i}.{name}", value
        for name, value in self.extras.items():
            yield f"extras.{name}", value

    def bytes(self) -> int:
        """Bytes of storage held by all tensors kept; a view is charged with the storage it keeps alive."""
        storages = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for _, t in self.named_tensors()
        }
        return sum(storages.values())

    def map(self, fn: Callable[[Tensor], Tensor]) -> CompressedContext:
        """The same context with `fn` applied to every tensor; sharing between layers is kept."""
        done: dict[int, Tensor] = {}

        def once(t: Tensor | None) -> Any:
            if t is None:
                return None
            if id(t) not in done:
                done[id(t)] = fn(t)
            return done[id(t)]

        layers = self.layers and tuple(
            LayerSlots(once(x.keys), once(x.values), once(x.mask), once(x.bias)) for x in self.layers
        )
        return replace(
            self,
            source_length=once(self.source_length),
            next_position=once(self.next_position),
            embeds=once(self.embeds),
            slot_mask=once(self.slot_mask),
            slot_positions=once(self.slot_positions),
            slot_bias=once(self.slot_bias),
            layers=layers,
            extras={k: once(v) for k, v in self.extras.items()},
            aux=NO_AUX,
        )

    def to(self, device: torch.device | str) -> CompressedContext:
        return self.map(lambda t: t.to(device))

    def select(self, rows: Tensor) -> CompressedContext:
        """Rows int64 [B'] of the batch, in that order, copied."""
        return self.map(lambda t: t.index_select(0, rows.to(t.device)))

    def repeat(self, n: int) -> CompressedContext:
        """Every row n times in a row: for beams, or n questions about one context."""
        return self.map(lambda t: t.repeat_interleave(n, 0))

    def detach(self) -> CompressedContext:
        return self.map(Tensor.detach)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, atomically; `CompressedContext.load` reads it back bit for bit."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        meta = {"format": FORMAT, "method": self.method, "fingerprint": self.fingerprint}
        meta["layers"] = json.dumps(self._layout())
        tensors = {k: v.detach().contiguous().clone() for k, v in self.named_tensors()}
        partial = path.with_name(path.name + ".partial")
        save_file(tensors, str(partial), metadata=meta)
        os.replace(partial, path)

    def _layout(self) -> list[dict[str, str]]:
        """For every layer, the stored name of each tensor: shared masks are stored once."""
        stored = {id(t): name for name, t in self.named_tensors()}
        return [
            {k: stored[id(v)] for k, v in vars(layer).items() if v is not None} for layer in self.layers or ()
        ]

    @staticmethod
    def load(path: str | Path) -> CompressedContext:
        """Raises ValueError when the file is not a compressed context."""
        with safe_open(str(path), framework="pt") as f:
            meta = f.metadata() or {}
            if meta.get("format") != FORMAT:
                raise ValueError(f"{path}: not a compressed context (format {meta.get('format')!r})")
            tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
        layout = json.loads(meta["layers"])
        layers = tuple(LayerSlots(**{k: tensors[name] for k, name in one.items()}) for one in layout)
        top = {k: v for k, v in tensors.items() if "." not in k}
        extras = {k.removeprefix("extras."): v for k, v in tensors.items() if k.startswith("extras.")}
        return CompressedContext(
            meta["method"], meta["fingerprint"], layers=layers or None, extras=extras, **top
        )


def join_embeds(state: CompressedContext | None, new: CompressedContext) -> CompressedContext:
    """Embedding slots of `state` followed by those of `new`, whose positions go on from there."""
    if state is None:
        return new
    assert new.embeds is not None and new.slot_mask is not None and new.slot_positions is not None
    if state.embeds is None or state.slot_mask is None or state.slot_positions is None:
        raise ValueError(f"{new.method} carries embeddings and cannot continue a {state.carrier} state")
    moved = torch.where(new.slot_positions < 0, -1, new.slot_positions + state.next_position[:, None])
    return CompressedContext(
        new.method, new.fingerprint, state.source_length + new.source_length,
        state.next_position + new.next_position,
        embeds=torch.cat([state.embeds, new.embeds], 1),
        slot_mask=torch.cat([state.slot_mask, new.slot_mask], 1),
        slot_positions=torch.cat([state.slot_positions, moved], 1),
        slot_bias=_join_bias(state, new), aux=new.aux,
    )  # fmt: skip


def _bias(context: CompressedContext) -> Tensor:
    """[B, S] slot bias, zero where a context has none."""
    assert context.embeds is not None
    return (
        context.embeds.new_zeros(context.embeds.shape[:2]) if context.slot_bias is None else context.slot_bias
    )


def _join_bias(state: CompressedContext, new: CompressedContext) -> Tensor | None:
    if state.slot_bias is None and new.slot_bias is None:
        return None
    return torch.cat([_bias(state), _bias(new)], 1)


def replaced(memory: CompressedContext, new: CompressedContext) -> CompressedContext:
    """`new` in the rows where its segment held tokens, `memory` elsewhere; widths are padded to the wider."""
    assert memory.embeds is not None and new.embeds is not None
    rows, width = new.source_length > 0, max(memory.embeds.shape[1], new.embeds.shape[1])

    def both(a: Tensor, b: Tensor) -> Tensor:
        a, b = (nn.functional.pad(t, (0,) * (2 * t.dim() - 3) + (width - t.shape[1],)) for t in (a, b))
        return torch.where(rows.view(-1, *(1,) * (a.dim() - 1)), b, a)

    fields: dict[str, Any] = {
        k: both(getattr(memory, k), getattr(new, k)) for k in ("embeds", "slot_mask", "slot_positions")
    }
    bias = None
    if memory.slot_bias is not None or new.slot_bias is not None:
        bias = both(_bias(memory), _bias(new))
    return replace(
        new, **fields, slot_bias=bias,
        source_length=memory.source_length + new.source_length,
        next_position=torch.where(rows, new.next_position, memory.next_position),
    )  # fmt: skip
