"""Any arch as a transformers AutoModelForCausalLM: config, forward, and a cache that `generate` carries on.

Importing this module registers both classes, so that `AutoModelForCausalLM.from_pretrained(DIR)` knows an
exported folder; without the import, the folder's own modeling file does it (`trust_remote_code=True`).

Shape legend: B batch  T time  V vocabulary  W width of the stored token rows
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from model import config as configs
from model.core import Docs, reorder
from model.lm import LanguageModel
from model.run import States


class LatentLabConfig(PreTrainedConfig):
    """config.json of an exported folder.

    arch:        the architecture, as our YAML says it, every key spelled out; of the rest `optim.mup` alone.
    embed_width: W, the width of the stored token rows; None: the model's.
    """

    model_type = "latent_lab"
    keys_to_ignore_at_inference = ["past_key_values"]

    arch: dict[str, Any] | None = None
    embed_width: int | None = None
    vocab_size: int = 1
    hidden_size: int = 1
    num_hidden_layers: int = 1
    tie_word_embeddings: bool = False  # the arch says it, and its one tensor is stored once
    use_cache: bool = True


class StateCache:
    """The states of all sites, and how many columns of `input_ids` they have seen."""

    is_compileable = False

    def __init__(self, states: States) -> None:
        self.states, self.seen = states, 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows by index: beam search."""
        self.states = reorder(self.states, beam_idx)


class LatentLabForCausalLM(PreTrainedModel, GenerationMixin):
    """`forward` and `generate` of transformers over `model.lm.LanguageModel`, which is `self.lm`."""

    config_class = LatentLabConfig
    base_model_prefix = "lm"
    main_input_name = "input_ids"
    _is_stateful = True  # a state cannot be cut back: no assisted decoding

    def __init__(self, config: LatentLabConfig) -> None:
        super().__init__(config)
        if config.arch is None:
            raise ValueError("LatentLabConfig.arch is not set: want an exported folder's config.json")
        arch = configs.load(config.arch)
        rows = None
        with torch.device("cpu"):  # transformers builds on `meta`, which cannot hold what is not stored
            if arch.embed.from_ is not None:
                # quantized rows are loaded with their codes: only their shape counts
                device = "cpu" if arch.embed.vq is None else "meta"
                rows = torch.ones(config.vocab_size, config.embed_width or arch.dim, device=device)
            self.lm = LanguageModel(arch, config.vocab_size, rows)
        stored = self.lm.state_dict()
        self._unstored = {n: b.clone() for n, b in self.lm.named_buffers() if n not in stored}
        self._frozen = {n for n, p in self.lm.named_parameters() if not p.requires_grad}
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; every tensor must be there. Raises ValueError otherwise."""
        want_info = kwargs.pop("output_loading_info", False)
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = loaded
        wrong = {k: sorted(map(str, v)) for k, v in info.items() if v and k.endswith("_keys")}
        if wrong:
            raise ValueError(f"the weights do not fit the architecture of config.json: {wrong}")
        model.restore()
        return (model, info) if want_info else model

    def restore(self) -> None:
        """What loading forgets: buffers that are not stored, and which parameters are frozen."""
        with torch.no_grad():
            for name, value in self._unstored.items():
                self.lm.get_buffer(name).copy_(value)
        for name, p in self.lm.named_parameters():
            p.requires_grad_(name not in self._frozen)

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: `LanguageModel` initialises itself."""

    def get_input_embeddings(self) -> nn.Module:
        return self.lm.embed

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: StateCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        **ignored: Any,
    ) -> Any:
        """input_ids [B, T] int64; attention_mask [B, T or seen + T], 0 at padding on either side.

        labels: [B, T] unshifted, -100 ignored: returns the arch's training loss (all heads) and no logits.
        Positions follow from the mask. Raises ValueError without input_ids.
        """
        if input_ids is None:
            raise ValueError("input_ids are needed: this model takes no inputs_embeds")
        T = input_ids.shape[1]
        docs = None
        if attention_mask is not None:
            mask = attention_mask[:, -T:].bool()
            docs = None if bool(mask.all()) else Docs.from_mask(mask)
        if labels is not None:
            out = self.lm(input_ids, labels=labels, docs=docs)
            return CausalLMOutputWithPast(loss=out.loss)
        cache = past_key_values
        if cache is None and (self.config.use_cache if use_cache is None else use_cache):
            cache = StateCache(self.lm.init_state(input_ids.shape[0], dtype=self.dtype))
        states = None if cache is None else cache.states
        out = self.lm(input_ids, docs=docs, state=states, last=logits_to_keep == 1)
        if cache is not None:
            cache.states, cache.seen = out.state, cache.seen + T
        past: Any = cache  # it does for `generate` what a transformers Cache does
        result = CausalLMOutputWithPast(logits=out.logits[:, -logits_to_keep:], past_key_values=past)
        return result.to_tuple() if return_dict is False else result


AutoConfig.register(LatentLabConfig.model_type, LatentLabConfig, exist_ok=True)
AutoModelForCausalLM.register(LatentLabConfig, LatentLabForCausalLM, exist_ok=True)
