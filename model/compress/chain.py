"""Several methods in a row, each compressing what the one before it kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from model.compress.base import ContextCompressor
from model.compress.context import CompressedContext, LayerSlots
from model.compress.saving import FORMAT, write_json


def writer(stages: Sequence[ContextCompressor]) -> ContextCompressor:
    """The stage that wrote the slots: the last one that does not merely select among those it is given."""
    return next((stage for stage in reversed(stages) if not stage.selects), stages[0])


class Chain(ContextCompressor):
    """`Chain([first, second, ...])`: the first reads tokens, every later one the carrier of the one before.

    Embeddings are lowered to a cache where the next stage wants one. Slots are lowered, and the text after
    them is read, with the adapter of the stage that wrote them. A ratio or budget given to
    `compress` is that of the whole chain; the stages before the last use their own configs.
    Raises ValueError, when built, for fewer than one stage, stages on different decoders, and a carrier that
    the next stage cannot take.
    """

    registered_name = "chain"

    def __init__(self, stages: Sequence[ContextCompressor]) -> None:
        if not stages:
            raise ValueError("a chain needs at least one stage")
        for before, after in pairwise(stages):
            if after.decoder.model is not before.decoder.model:
                raise ValueError("all stages of a chain wrap the same decoder")
            if not {before.gives, "cache"} & after.accepts:
                raise ValueError(
                    f"{after.registered_name} accepts {', '.join(sorted(after.accepts))}, and "
                    f"{before.registered_name} gives {before.gives}"
                )
        super().__init__(stages[0].decoder, stages[-1].config)
        self.stages: Any = nn.ModuleList(stages)
        self.eval()

    @property
    def gives(self) -> str:  # type: ignore[override]
        return self.stages[-1].gives

    def reading(self):
        return writer(self.stages).reading()

    def lower(self, context: CompressedContext) -> tuple[LayerSlots, ...]:
        return writer(self.stages).lower(context)

    def _wanted(self, mask, state, ratio, budget):
        """A later stage compresses all that is kept, an earlier state included."""
        earlier = 0 if state is None or len(self.stages) == 1 else state.source_length
        return self.stages[-1].slots_wanted(mask.sum(1) + earlier, ratio, budget)

    @property
    def reader(self):
        return self.stages[0].reader

    def context_tokenizer(self, tokenizer: Any) -> Any:
        return self.stages[0].context_tokenizer(tokenizer)

    def _compress(self, ids, mask, slots, state):
        if len(self.stages) == 1:
            return replace(self.stages[0]._compress(ids, mask, slots, state), method=self.registered_name)
        context = self.stages[0].compress(ids, mask, state=state)
        last = len(self.stages) - 1
        for i in range(1, last):
            stage = self.stages[i]
            wanted = stage.slots_wanted(context.source_length, stage.config.ratio, None)
            context = self._next(i, context, wanted)
        return replace(self._next(last, context, slots), method=self.registered_name)

    def _next(self, i: int, context: CompressedContext, wanted: Tensor) -> CompressedContext:
        stage = self.stages[i]
        if context.carrier not in stage.accepts or context.extras:
            layers = writer(self.stages[:i]).lower(context)
            context = CompressedContext(
                context.method,
                context.fingerprint,
                context.source_length,
                context.next_position,
                layers=layers,
            )
        held = context.slot_counts if context.carrier == "embeds" else context.slot_counts[0]
        return stage.recompress(context, wanted.minimum(held))

    def save(self, folder: str | Path) -> None:
        """Every stage in a folder of its own, and compressor_config.json naming them; `load_compressor` reads
        it back."""
        folder = Path(folder)
        names = [f"{i}_{stage.registered_name}" for i, stage in enumerate(self.stages)]
        for name, stage in zip(names, self.stages):
            stage.save(folder / name)
        write_json(folder / "compressor_config.json", {"format": FORMAT, "chain": names})
