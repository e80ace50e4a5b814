"""The grammar of a stack: its nodes as dataclasses, and where each was written.

A field's name is its YAML key (a trailing underscore is dropped: `as_` is `as`). A node is known by its first
field's name, so a new form is one dataclass in the union `Node`, and one function in `model.plan`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Mark:
    """Where a value was written: file:line:column, and its path in the document (`stack[0].swa`)."""

    file: str = "<mapping>"
    line: int = 0
    column: int = 0
    path: str = ""

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}:{self.column}" if self.line else self.file
        return f"{place} {self.path}" if self.path else place


class ConfigError(ValueError):
    """Everything that is wrong with a configuration, one line an error, each with its place."""

    def __init__(self, errors: list[str]) -> None:
        self.errors = list(dict.fromkeys(errors))
        super().__init__("\n".join(self.errors))


NO_MARK = Mark()


def _mark() -> Any:
    """A field that says where its node stands; not part of the configuration's identity."""
    return field(default=NO_MARK, compare=False, repr=False, metadata={"mark": True})


# ----------------------------------------------------------------------------- grammar


@dataclass(frozen=True)
class BlockNode:
    """`mamba2` or `{mamba2: {state: 64}, as: m1}`: one block; `as` names its weights for `use`.

    params: the block's own keyword parameters with the file's `defaults` merged in, typed.
    """

    name: str
    params: dict[str, Any] = field(default_factory=dict)
    as_: str | None = None
    mark: Mark = _mark()


@dataclass(frozen=True)
class UseNode:
    """`{use: m1}`: visit again the weights that were named m1 (state stays its own)."""

    use: str
    mark: Mark = _mark()


@dataclass(frozen=True)
class RepeatNode:
    """`{repeat: 6, of: [...]}`: the list n times; fresh weights each time unless `tied`.

    order: of the visits of tied weights (Takase & Kiyono, arXiv 2104.06022), here of A B three times:
           cycle      A B A B A B
           sequence   A A A B B B
           cycle_rev  A B A B B A
           A and B are the entries of the list, or the rounds of an entry that is an untied `repeat` itself.
    frozen: what the list builds is not trained, as the first layers of a stack that is grown layer by layer.
    """

    repeat: int
    of: list[Node]
    tied: bool = False
    frozen: bool = False
    order: Literal["cycle", "sequence", "cycle_rev"] = "cycle"
    mark: Mark = _mark()


@dataclass(frozen=True)
class MirrorNode:
    """`{mirror: [a, b, c]}`: a b c c b a, the way back with the weights of the way in.

    The same as `{repeat: 2, tied: true, order: cycle_rev, of: [a, b, c]}`; see there for what is one of
    a, b, c. A sandwich, whose first and last layers are free, is `[first, {mirror: [...]}, last]`.
    """

    mirror: list[Node]
    mark: Mark = _mark()


@dataclass(frozen=True)
class QuantSpec:
    """`int8` or `{fsq: {levels: 8}}`: a registered quantizer and its parameters."""

    name: str
    params: dict[str, Any] = field(default_factory=dict)
    mark: Mark = _mark()


@dataclass(frozen=True)
class Blend:
    """How a new shell is faded in: hold at 0 for `hold` steps, then a cosine 0 -> 1 over `steps`.

    While it is below 1, the shell is also trained to give back the code that it was given, weighted
    from `code` (start) to a tenth of it (end), since at 0 the task's loss gives it no gradient.
    steps: 0 means that the shell is simply there, at full strength, as every shell but the innermost is.
    """

    steps: int = 0
    hold: int = 0
    code: float = 1.0


@dataclass(frozen=True)
class Merge:
    """`{size: 4, pool: gated}`: `size` positions become one, by a `pool` of `model.quant.adapter`."""

    size: int
    pool: Literal["mean", "gated", "mlp"] = "mean"


@dataclass(frozen=True)
class ShellNode:
    """One shell of an onion: body, quantizer of its inner face, and how it hangs in the outer shell.

    to:       channels of its code (width of the quantizer's grid).
    width:    width inside this shell; default the outer one's.
    tie:      the two visits of the body share weights.
    frozen:   body and quantizer are not trained.
    residual: add the inner shells' result to this shell's outer code instead of replacing it.
    merge:    positions of the outer code that make one position here (needs `residual: true`): a number,
              or a `Merge`.
    blend:    fading in, for a shell that is grown into a trained model.
    """

    name: str
    body: list[Node]
    to: int
    quant: QuantSpec = QuantSpec("int8")
    width: int | None = None
    tie: bool = True
    frozen: bool = False
    residual: bool = False
    merge: int | Merge = 1
    blend: Blend = Blend()
    mark: Mark = _mark()

    @property
    def merging(self) -> Merge:
        return Merge(self.merge) if isinstance(self.merge, int) else self.merge


@dataclass(frozen=True)
class OnionNode:
    """`{onion: [shells], reading: split}`: shells from the outermost in.

    reading: `split` puts shell n+1 between the halves of quantizer n; `whole` makes a full round
             trip through quantizer n at both sites, at constant width.
    """

    onion: list[ShellNode]
    reading: Literal["split", "whole"] = "split"
    mark: Mark = _mark()


@dataclass(frozen=True)
class Keep:
    """`{ratio: 0.25, recent: 128}`: the memory drops tokens by a learned score; see `blocks.memory`.

    ratio:  share of the tokens that are kept for ever, on average; 1 keeps all.
    recent: the last so many tokens are seen whether kept or not.
    decay:  of the moving average behind the score's threshold, per optimizer step.
    """

    ratio: float = 0.25
    recent: int = 128
    decay: float = 0.5


@dataclass(frozen=True)
class MemorySpec:
    """The one key/value memory of a yoco, its only cache that grows with the context.

    head_dim: width of a key and of a value.
    group:    query heads (dim / head_dim of them) that share one key/value head.
    position: `rope` turns the keys when they are written, and the queries that read them.
    ring:     only the last so many tokens are held: a state that does not grow (a bounded yoco).
    keep:     only tokens that a learned score keeps are held, and the newest. Not with `ring`.
    """

    head_dim: int = 64
    group: int = 1
    position: Literal["rope", "none"] = "rope"
    theta: float = 10_000.0
    ring: int | None = None
    keep: Keep | None = None
    mark: Mark = _mark()


@dataclass(frozen=True)
class YocoSpec:
    """The two halves of a yoco and the memory in between.

    skip: whether a prompt's prefill runs the cross half on its last token alone. `auto`: where that
          changes no logit, that is, where nothing in the cross half or after it keeps a state; `on` is
          refused elsewhere.
    """

    self_: list[Node]
    memory: MemorySpec
    cross: list[Node]
    skip: Literal["auto", "on", "off"] = "auto"


@dataclass(frozen=True)
class YocoNode:
    """`{yoco: {self: [...], memory: {...}, cross: [...]}}`: "you only cache once", arXiv 2405.05254.

    The self half makes x; one memory is written from it; every `xattn` of the cross half reads it.
    """

    yoco: YocoSpec
    mark: Mark = _mark()


@dataclass(frozen=True)
class BySpec:
    """`patch` or `{mod: {keep: 0.25}}`: a registered wrap and its parameters."""

    name: str
    params: dict[str, Any] = field(default_factory=dict)
    mark: Mark = _mark()


@dataclass(frozen=True)
class WrapSpec:
    """inner sees fewer tokens, chosen or merged by `by`.

    width: of the stream inside; default the outer one's, and for `mod` always that.
    """

    by: BySpec
    inner: list[Node]
    width: int | None = None


@dataclass(frozen=True)
class WrapNode:
    """`{wrap: {by: patch, inner: [...]}}`: a bracket whose inside has another length."""

    wrap: WrapSpec
    mark: Mark = _mark()


Node = BlockNode | UseNode | RepeatNode | MirrorNode | OnionNode | YocoNode | WrapNode
