"""The one module that knows transformers: five decoder families behind one adapter.

Layers are called one by one with explicit positions and an explicit 4-D mask, so that the length of the
stream and of the cache may differ from layer to layer, and nothing depends on what a model infers by itself.

Shape legend: B batch  T time  S slots  E embedding width  D hidden width  H heads  G key/value heads  K head
width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as run_checkpointed
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.cache_utils import Cache, DynamicLayer, Fp8QuantizedLayer, StaticLayer

from model.compress.context import CompressedContext, LayerSlots, tight
from model.compress.families import FAMILIES, fingerprint
from model.compress.masks import attention_mask, mask_hook
from model.hub.packaged import packaged_folder


class Run(NamedTuple):
    """hidden [B, T, D] after the last layer run; kv: per layer run, the new (keys, values) [B, G, T, K];
    states: the residual stream [B, T, D] entering each layer run."""

    hidden: Tensor
    kv: list[tuple[Tensor, Tensor]]
    states: list[Tensor]


class _Tape:
    """Stands in for a cache during one layer: joins the past to the new keys and values,
    and notes the new."""

    def __init__(self, past: LayerSlots | None) -> None:
        self.past = past
        self.new: tuple[Tensor, Tensor] | None = None

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.new = (keys, values)
        if self.past is None:
            return keys, values
        return torch.cat([self.past.keys, keys], 2), torch.cat([self.past.values, values], 2)

    def get_seq_length(self, *_: Any) -> int:
        return 0 if self.past is None else self.past.keys.shape[2]


class Decoder:
    """A frozen causal decoder of one of the five families. Holds the model; owns no parameter of its own.

    Raises ValueError for an unknown family, for an attention implementation that takes no 4-D mask, and
    for a model whose own gradient checkpointing is on (ours keeps adapters and caches right).
    """

    def __init__(self, model: nn.Module) -> None:
        kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        if kind not in FAMILIES:
            raise ValueError(
                f"no adapter for decoders of type {kind!r}; there is one for {', '.join(FAMILIES)}"
            )
        config: Any = model.config
        implementation = getattr(config, "_attn_implementation", "sdpa")
        if implementation not in ("sdpa", "eager"):
            raise ValueError(
                f"attention implementation {implementation!r} takes no per-layer mask; "
                "load the decoder with attn_implementation='sdpa' or 'eager'"
            )
        if getattr(model, "is_activation_checkpointing", False):
            raise ValueError(
                "the decoder's own gradient checkpointing is on, which drops caches and adapters; call model."
                "gradient_checkpointing_disable() and set gradient_checkpointing in the compressor's config"
            )
        self.model: Any = model
        self.config = config
        self.family = FAMILIES[kind]
        self.body: Any = model.get_submodule(self.family.decoder)
        self.layers: Any = getattr(self.body, self.family.layers)
        self.attentions = [layer.get_submodule(self.family.attention) for layer in self.layers]
        self.embedding: Any = getattr(self.body, self.family.embed)
        self.n_layers = len(self.layers)
        self.width = int(config.hidden_size)
        self.embed_width = int(self.embedding.embedding_dim)
        self.n_heads = int(config.num_attention_heads)
        self.n_kv_heads = int(getattr(config, "num_key_value_heads", None) or self.n_heads)
        self.head_dim = int(getattr(config, "head_dim", None) or self.width // self.n_heads)
        self.rotary = self.family.positions is None
        self.max_positions = int(config.max_position_embeddings)
        self.window = getattr(config, "sliding_window", None)
        self.fingerprint = fingerprint(model)

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    # ------------------------------------------------------------------ parts

    def lora_targets(self, names: Sequence[str] | None = None) -> dict[str, nn.Module]:
        """Modules to adapt, by path, for names such as q_proj or up_proj (None: all); a fused module comes
        once.

        Raises ValueError for a name that the family does not have.
        """
        known = self.family.projections
        names = list(known) if names is None else names
        for name in names:
            if name not in known:
                raise ValueError(f"lora target {name!r}: {self.config.model_type} has {', '.join(known)}")
        paths = dict.fromkeys(known[name] for name in names)
        return {f"{i}.{p}": layer.get_submodule(p) for i, layer in enumerate(self.layers) for p in paths}

    def embed(self, ids: Tensor) -> Tensor:
        """ids int64 [B, T] -> [B, T, E]."""
        return self.embedding(ids)

    def stem(self, embeds: Tensor, positions: Tensor) -> Tensor:
        """embeds [B, T, E], positions int64 [B, T] -> residual stream [B, T, D]. Position -1 adds none."""
        project = getattr(self.body, "project_in", None)
        h = embeds if project is None else project(embeds)
        if self.rotary:
            return h
        table: Any = self.body.get_submodule(self.family.positions or "")
        offset = getattr(table, "offset", 0)
        rows = nn.functional.embedding(positions.clamp_min(0) + offset, table.weight)
        return h + rows * (positions >= 0)[..., None]

    def norm(self, h: Tensor) -> Tensor:
        norm = getattr(self.body, self.family.norm)
        return h if norm is None else norm(h)

    def head(self, h: Tensor) -> Tensor:
        """Residual stream [B, T, D] after the last layer -> logits [B, T, V]."""
        h = self.features(h)
        return self.model.lm_head(h)

    def features(self, h: Tensor) -> Tensor:
        """Residual stream after the last layer -> what the head reads, in the width of the embeddings
        [B, T, E]."""
        h = self.norm(h)
        project = getattr(self.body, "project_out", None)
        return h if project is None else project(h)

    def attention_input(self, i: int, h: Tensor) -> Tensor:
        """What layer i's projections read, from the residual stream that enters it."""
        if getattr(self.layers[i], "do_layer_norm_before", True) is False:
            return h
        return self.layers[i].get_submodule(self.family.attention_norm)(h)

    def qkv(self, i: int, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, H, T, K], keys and values [B, G, T, K] of layer i, before any rotation."""
        x, attention = self.attention_input(i, h), self.attentions[i]
        if hasattr(attention, "c_attn"):
            q, k, v = attention.c_attn(x).chunk(3, -1)
        else:
            q, k, v = attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in (q, k, v))
        if hasattr(attention, "q_norm"):
            q, k = attention.q_norm(q), attention.k_norm(k)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def rotation(self, like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor] | None:
        """cos and sin [B, T, K] at `positions`, or None for learned positions."""
        return self.body.rotary_emb(like, position_ids=positions.clamp_min(0)) if self.rotary else None

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """x [B, *, T, K] rotated to `positions` [B, T]; unchanged for learned positions."""
        rotation = self.rotation(x, positions)
        if rotation is None:
            return x
        cos, sin = (t[:, None] for t in rotation)
        left, right = x.chunk(2, -1)
        return x * cos + torch.cat([-right, left], -1) * sin

    def check_length(self, positions: int, keys: int) -> None:
        """Raises ValueError when a run needs positions or keys that the decoder does not have."""
        if positions > self.max_positions:
            raise ValueError(
                f"{positions} positions are needed and the decoder has {self.max_positions}; "
                "shorten the context or the text, or compress the context in segments"
            )
        if self.window is not None and keys > self.window:
            raise ValueError(
                f"{keys} keys are needed and the decoder attends to the last {self.window} alone: compressed "
                "slots would fall out of its window; shorten the input or load it with sliding_window=None"
            )

    # ------------------------------------------------------------------ running layers

    def run(
        self,
        h: Tensor,
        positions: Tensor,
        mask: Tensor,
        *,
        bias: Tensor | None = None,
        past: Sequence[LayerSlots] | None = None,
        start: int = 0,
        stop: int | None = None,
        keep_states: bool = False,
        checkpoint: bool = False,
        adapters: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> Run:
        """Layers start..stop-1 over the residual stream h [B, T, D].

        positions: int64 [B, T].  mask: bool [B, T], keys that may be attended to.  bias: [B, T] added to the
        scores of those keys.  past: slots of every layer of the decoder, visible to all of h.
        checkpoint: recompute activations in the backward pass, layer by layer.  adapters: entered around
        every layer, in the recomputation too.
        """
        stop = self.n_layers if stop is None else stop
        rotation = self.rotation(h, positions)
        masks: dict[int, Tensor] = {}
        kv, states = [], []
        for i in range(start, stop):
            slots = past[i] if past is not None else None
            key = -1 if slots is None else id(slots.mask)
            if key not in masks or (slots is not None and slots.bias is not None):
                masks[key] = attention_mask(h, mask, bias, slots)
            if keep_states:
                states.append(h)
            step = self._step(i, masks[key], positions, rotation, slots, adapters)
            if checkpoint and torch.is_grad_enabled():
                h, k, v = run_checkpointed(step, h, use_reentrant=False)
            else:
                h, k, v = step(h)
            kv.append((k, v))
        return Run(h, kv, states)

    def _step(self, i: int, mask, positions, rotation, slots, adapters):
        def step(h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            tape = _Tape(slots)
            options = {
                "past_key_values": tape,
                "attention_mask": mask,
                "use_cache": True,
                "position_ids": positions,
            }
            if rotation is not None:
                options["position_embeddings"] = rotation
            with adapters():
                out = self.layers[i](h, **options)
            assert tape.new is not None
            return (out[0] if isinstance(out, tuple) else out), *tape.new

        return step

    def lower(self, context: CompressedContext) -> tuple[LayerSlots, ...]:
        """The cache that a context stands for: embeddings are run through the layers once."""
        if context.layers is not None:
            return context.layers
        assert (
            context.embeds is not None
            and context.slot_mask is not None
            and context.slot_positions is not None
        )
        B, S = context.slot_mask.shape
        if S == 0:
            empty = context.embeds.new_zeros(B, self.n_kv_heads, 0, self.head_dim)
            return tuple(LayerSlots(empty, empty, context.slot_mask) for _ in range(self.n_layers))
        h = self.stem(context.embeds, context.slot_positions)
        run = self.run(h, context.slot_positions, context.slot_mask, bias=context.slot_bias)
        return tuple(LayerSlots(tight(k), tight(v), context.slot_mask, context.slot_bias) for k, v in run.kv)

    # ------------------------------------------------------------------ transformers' own generate

    def cache(
        self, layers: Sequence[LayerSlots], kind: str = "dynamic", capacity: int | None = None
    ) -> Cache:
        """A fresh transformers cache holding copies of the slots.

        kind: dynamic | static (capacity: keys per layer) | quantized (8-bit floats, one scale per layer).
        """
        made: list[Any] = []
        for slots in layers:
            if kind == "static":
                made.append(StaticLayer(max_cache_len=capacity or 0))
            elif kind == "quantized":
                made.append(Fp8QuantizedLayer())
            elif kind == "dynamic":
                made.append(DynamicLayer())
            else:
                raise ValueError(f"cache={kind!r}; there are dynamic, static and quantized")
            if slots.keys.shape[2]:
                made[-1].update(slots.keys.detach().clone(), slots.values.detach().clone())
        cache = Cache(layers=made)
        cache.slot_masks = [slots.mask for slots in layers]  # type: ignore[attr-defined]
        return cache

    @property
    def is_attached(self) -> bool:
        return getattr(self.model, "_context_attached", False)

    @contextmanager
    def attach(
        self, layer_hooks: Mapping[int, Callable[[Tensor, Tensor], Tensor]] | None = None
    ) -> Iterator[None]:
        """Inside, the model's own forward masks every layer for that layer's own slots (`cache.slot_masks`),
        and
        the residual stream [B, T, D] that leaves a layer named in `layer_hooks` goes through its function,
        which
        also gets the mask of tokens [B, T].

        Everything is removed on the way out, after an exception too. Raises RuntimeError when nested.
        """
        if self.is_attached:
            raise RuntimeError("a compressor is already attached to this decoder; leave its block first")
        handles = []
        self.model._context_attached = True
        try:
            for i, attention in enumerate(self.attentions):
                hook = mask_hook(i, self.config)
                handles.append(attention.register_forward_pre_hook(hook, with_kwargs=True))
            for i, change in (layer_hooks or {}).items():
                handles.append(self.layers[i].register_forward_hook(_changed(i, change), with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()
            del self.model._context_attached


def _changed(i: int, change: Callable[[Tensor, Tensor], Tensor]):
    """A hook for a layer's output; steps that go on from a cache are left alone."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        h = out[0] if isinstance(out, tuple) else out
        given = [*args, *kwargs.values()]
        cache = next((a for a in given if isinstance(a, Cache)), None)
        if cache is not None and int(cache.get_seq_length(i)) > h.shape[1]:
            return None
        scores = next((a for a in given if isinstance(a, Tensor) and a.dim() == 4), None)
        mask = torch.ones(h.shape[:2], dtype=torch.bool, device=h.device)
        if scores is not None:  # a token sees itself, padding does not
            own = scores[:, 0].diagonal(dim1=-2, dim2=-1)
            mask = mask & (own if own.dtype == torch.bool else own == 0)
        h = change(h, mask)
        return (h, *out[1:]) if isinstance(out, tuple) else h

    return hook


# ---------------------------------------------------------------------- loading

PACKAGED = "smollm2-135m-instruct"


def load_decoder(name: str | Path, folder: str | Path = "models", dtype: torch.dtype = torch.float32) -> Any:
    """A causal decoder from a folder, a hub name, or `smollm2-135m-instruct` (packaged,
    cached in `folder`)."""
    path = packaged_folder(PACKAGED, folder) if str(name) == PACKAGED else name
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()


def load_in_bits(name: str | Path, bits: int) -> Any:
    """A decoder in 8 or 4 bits through bitsandbytes; its linears are adapted by hooks, never read."""
    quantized = BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4)
    return AutoModelForCausalLM.from_pretrained(name, quantization_config=quantized).eval()


def load_tokenizer(name: str | Path, folder: str | Path = "models") -> Any:
    """The tokenizer that belongs to `load_decoder(name)`."""
    return AutoTokenizer.from_pretrained(packaged_folder(PACKAGED, folder) if str(name) == PACKAGED else name)
