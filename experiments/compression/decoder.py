"""The study's small decoder: pretrained by the lab's own loop, then handed to transformers as a Llama.

Our attention and MLP carry the parameter names and conventions of transformers' Llama, so that a plain stack
of them is one, tensor by tensor.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import model
from experiments.commands import ROOT, pretrain
from model.compress import load_decoder
from model.lm import LanguageModel

ARCH = Path(__file__).with_name("decoder.yaml")


def pretrained(out: Path, data: Path, steps: int) -> Any:
    """The decoder in `out`/decoder; made first where it is not there yet. A begun run goes on."""
    folder = (ROOT / out / "decoder").resolve()
    if not (folder / "config.json").exists():
        run = (ROOT / out / "pretraining").resolve()
        pretrain([ARCH], "--data", (ROOT / data).resolve(), "--run", run, sets=(f"run.steps={steps}",))
        made = folder.with_name("decoder.partial")
        as_llama(model.load(run)).save_pretrained(made)
        made.rename(folder)
    return load_decoder(folder)


def as_llama(lm: LanguageModel) -> Any:
    """A transformers Llama with the weights of a stack of `attention`, `mlp`, `attention`, ...

    Raises ValueError for any other plan, and for options that a Llama does not have.
    """
    blocks: list[Any] = list(lm.bank.values())
    pairs = list(zip(blocks[::2], blocks[1::2]))
    attention, mlp = (b.block for b in blocks[:2])
    kinds = [b.block.registered_name for b in blocks]
    if kinds != ["attention", "mlp"] * len(pairs) or list(lm.heads) != ["next"] or mlp.act != "swiglu":
        raise ValueError(f"a Llama is attention and swiglu in turn with one head, not {kinds}")
    config = LlamaConfig(
        vocab_size=lm.vocab, hidden_size=lm.config.dim, num_hidden_layers=len(pairs),
        num_attention_heads=attention.heads, num_key_value_heads=attention.kv_heads,
        head_dim=attention.head_dim, intermediate_size=mlp.hidden, rms_norm_eps=lm.config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": attention.theta},
        max_position_embeddings=2 * lm.config.run.context,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    made: Any = AutoModelForCausalLM.from_config(config)
    tensors: dict[str, Any] = {
        "model.embed_tokens.weight": lm.embed.table(),
        "lm_head.weight": lm.embed.table(),
    }
    head: Any = lm.heads["next"]
    tensors["model.norm.weight"] = head.norm.weight
    names = (("input_layernorm", "self_attn"), ("post_attention_layernorm", "mlp"))
    for i, pair in enumerate(pairs):
        for (norm, part), residual in zip(names, pair):
            tensors[f"model.layers.{i}.{norm}.weight"] = residual.norm.weight
            for key, value in residual.block.state_dict().items():
                tensors[f"model.layers.{i}.{part}.{key}"] = value
    made.load_state_dict({k: v.detach().to(torch.float32) for k, v in tensors.items()}, strict=True)
    return made.eval()
