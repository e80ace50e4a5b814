"""muP-style width scaling: a learning rate found at a small width holds at a large one.

Yang et al. 2022 (arXiv 2203.03466, table 8, Adam), against the same configuration at `dim: base`:

    weights of hidden matrices   lr and updates by  base_in / in    (`in`: columns, where they grew)
    tokens in, vectors           lr as it is                    (also vectors that are stacked)
    logits                       times  base / dim                  (model.lm)

Hidden matrices are initialised with variance ~ 1 / in by the blocks already. Weight decay is multiplied by
in / base_in, so that lr * decay, which decides how long a weight remembers, does not change with the width.
Sizes that stay the same at both widths (a head's, a shell's fixed width) stay as they are.
"""

from __future__ import annotations

from dataclasses import replace

import torch

import model
from model.lm import LanguageModel
from model.schema import Config, ConfigError
from train.optim.groups import traits_of


def scales(lm: LanguageModel, config: Config) -> tuple[dict[str, float], dict[str, float]]:
    """({name: factor on lr}, {name: factor on decay}); empty without `optim.mup`. Raises ConfigError."""
    if config.optim.mup is None:
        return {}, {}
    base = shapes_at(config, config.optim.mup.base, lm.vocab)
    matrices = traits_of(lm, set(), {}).matrix
    lr, decay = {}, {}
    for name, p in lm.named_parameters():
        if name not in base or len(base[name]) != p.dim():
            raise ConfigError([f"optim.mup.base: at that width the model has no weight {name}"])
        if name in matrices and base[name][1] != p.shape[1]:
            lr[name] = base[name][1] / p.shape[1]
            decay[name] = 1 / lr[name]
    return lr, decay


def shapes_at(config: Config, width: int, vocab: int) -> dict[str, tuple[int, ...]]:
    """{name: shape} of the same configuration at another width; nothing is allocated. Raises ConfigError."""
    embed = replace(config.embed, project=width) if config.embed.project is not None else config.embed
    small = replace(config, dim=width, embed=embed)
    try:
        with torch.device("meta"):
            table = torch.empty(vocab, width) if config.embed.from_ is not None else None
            lm = model.build(small, vocab=vocab, table=table)
    except (ConfigError, ValueError) as error:
        raise ConfigError([f"optim.mup.base: the model cannot be built at width {width}: {error}"]) from error
    return {name: tuple(p.shape) for name, p in lm.named_parameters()}
