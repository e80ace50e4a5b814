"""Compose, build, grow and run latent and hybrid language models.

import model
lm = model.build("samba.yaml", overrides={"dim": 384})
out = lm(tokens, labels=tokens)
ids = lm.generate(tokens, max_new_tokens=50)
block = model.make_block("mamba2", dim=256, state=64, head_dim=32)
"""

from model.build import DEFAULT_VOCAB, build, load
from model.core import Ctx, Docs, Step
from model.lm import LanguageModel, Output
from model.registry import make_block, make_quantizer
from model.schema import Config, ConfigError

__all__ = [
    "DEFAULT_VOCAB",
    "Config",
    "ConfigError",
    "Ctx",
    "Docs",
    "LanguageModel",
    "Output",
    "Step",
    "build",
    "load",
    "make_block",
    "make_quantizer",
]
