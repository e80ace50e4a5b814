"""The decoder behind a context: its cache, its adapter, and transformers' own `generate`.

Shape legend: B batch  T time  D hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from model.compress.context import CompressedContext, LayerSlots
from model.compress.rows import checked_mask, pack, text_positions
from model.compress.saving import Saved


def asked(model: Any, options: Mapping[str, Any], prompt: int) -> tuple[int, int]:
    """(new tokens at most, copies of each row) of a call of the model's `generate` with a prompt of so many
    tokens, as transformers reads it: options come before a generation_config among them, that before the
    model's own; max_new_tokens before max_length, which counts the prompt; 20 where nobody says anything."""
    configs = (options.get("generation_config"), model.generation_config)

    def look(name: str) -> Any:
        said = (options.get(name), *(getattr(config, name, None) for config in configs))
        return next((value for value in said if value is not None), None)

    new, longest = look("max_new_tokens"), look("max_length")
    if new is None:
        new = 20 if longest is None else max(longest - prompt, 0)
    return new, max(look("num_beams") or 1, look("num_return_sequences") or 1)


class Reading(Saved):
    """A saved method as far as it reads what it has compressed."""

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Entered around everything read after a context, where a method adapts the decoder itself."""
        yield

    def lower(self, context: CompressedContext) -> tuple[LayerSlots, ...]:
        """The cache that a context stands for, one `LayerSlots` per layer."""
        with self.reading():
            return self.decoder.lower(context)

    def _check_context(self, context: CompressedContext, rows: int) -> None:
        if context.fingerprint != self.decoder.fingerprint:
            raise ValueError(
                f"this context was made for another decoder (fingerprint {context.fingerprint}, "
                f"this one has {self.decoder.fingerprint})"
            )
        if context.extras and context.method != self.registered_name:
            raise ValueError(
                f"this context holds a code that its own method {context.method} reads; see its `lower`"
            )
        if context.batch_size != rows:
            raise ValueError(
                f"the context has {context.batch_size} rows, the ids have {rows}; see repeat and select"
            )

    def generate_inputs(
        self,
        context: CompressedContext,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        cache: str = "dynamic",
        copies: int = 1,
        max_new_tokens: int = 0,
    ) -> dict[str, Any]:
        """What the decoder's own `generate` needs to read a prompt after a context: ids padded on the left, a
        mask over slots and prompt, positions, and a cache filled with copies of the slots.

        cache: dynamic | static | quantized.  copies: beams or returned sequences per row.
        """
        self._check_context(context, input_ids.shape[0])
        mask = checked_mask(input_ids, attention_mask, self.decoder.config.pad_token_id, "generate")
        ids, mask = pack(input_ids, mask, left=False)
        if ids.shape[1] == 0:
            raise ValueError("generate needs a prompt of at least one token")
        with torch.no_grad():
            layers = self.lower(context)
        positions = text_positions(mask, context.next_position)
        width = max(layer.keys.shape[2] for layer in layers) + ids.shape[1] + max_new_tokens
        self.decoder.check_length(int(positions.max()) + 1 + max_new_tokens, width)
        slot_mask = layers[0].mask
        layers = tuple(
            LayerSlots(*(t.repeat_interleave(copies, 0) for t in (x.keys, x.values, x.mask))) for x in layers
        )
        return {
            "input_ids": ids,
            "attention_mask": torch.cat([slot_mask, mask], 1).long(),
            "position_ids": positions,
            "past_key_values": self.decoder.cache(layers, cache, width),
        }

    def generate(
        self,
        input_ids: Tensor,
        context: CompressedContext | None = None,
        attention_mask: Tensor | None = None,
        *,
        cache: str = "dynamic",
        **options: Any,
    ) -> Tensor:
        """Prompt and continuation, int64 [B * returned sequences, T + new], by the decoder's own `generate`.

        options: any of transformers' (max_new_tokens, do_sample, num_beams, ...). A context is never
        changed: ask as many questions of it as you like. Raises ValueError where slots, prompt and the
        most new tokens (see `asked`) need more positions than the decoder has.
        """
        model = self.decoder.model
        mask = checked_mask(input_ids, attention_mask, self.decoder.config.pad_token_id, "generate")
        ids, mask = pack(input_ids, mask, left=False)
        new, copies = asked(model, options, ids.shape[1])
        if context is None:
            self.decoder.check_length(ids.shape[1] + new, ids.shape[1] + new)
            with self.reading():
                return model.generate(ids, attention_mask=mask.long(), **options)
        inputs = self.generate_inputs(context, ids, mask, cache=cache, copies=copies, max_new_tokens=new)
        if self.decoder.is_attached:
            return model.generate(**inputs, **options)
        with self.decoder.attach(), self.reading():
            return model.generate(**inputs, **options)

    @contextmanager
    def attached(self) -> Iterator[Any]:
        """The decoder itself, able to use this method's caches and transformed by its layer hooks, if any.

        Hooks are removed on the way out, whatever happens. Raises RuntimeError when already attached.
        """
        with self.decoder.attach(self.layer_hooks()), self.reading():
            yield self.decoder.model

    def layer_hooks(self) -> dict[int, Any]:
        """Layer index -> a function of the residual stream [B, T, D] that leaves the layer."""
        return {}
