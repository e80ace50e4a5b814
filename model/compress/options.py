"""What every method can be told, and what a forward pass gives back.

Shape legend: B batch  T time  V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from model.compress.context import CompressedContext


@dataclass(frozen=True)
class CompressorConfig:
    """Options every method has.

    ratio: source tokens per slot where a call names neither ratio nor budget: as if the call had named it, so
    a method that cannot meet it says so. None: the method's own size (4 where it has none).
    gradient_checkpointing: recompute activations layer by layer in the backward pass.
    seed: of whatever a method draws at random.
    """

    ratio: float | None = None
    gradient_checkpointing: bool = False
    seed: int = 0


@dataclass
class CompressorOutput:
    """loss: 0-d, None without labels.  logits [B, T, V] for the text.  losses: its parts, weighted.
    stats: detached 0-d values to look at.  context: what was compressed."""

    loss: Tensor | None
    logits: Tensor
    context: CompressedContext | None = None
    losses: dict[str, Tensor] = field(default_factory=dict)
    stats: dict[str, Tensor] = field(default_factory=dict)
