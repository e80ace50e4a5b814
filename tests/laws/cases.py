"""What the laws are run on: block parameters small enough that windows, chunks and heads bite.

CASES[name] is a list of cases, each a dict with any of dim, T (longer than every window and chunk), params
and around (what the block needs around it). A registered block that is missing is judged with its defaults.
EXEMPT[(name, law)] is the written reason why a law does not hold.
"""

from __future__ import annotations

from typing import Any

from .memory import remembering, visiting

CASES: dict[str, list[dict[str, Any]]] = {
    "attention": [
        {"params": {"head_dim": 16}},
        {"params": {"head_dim": 8, "group": 2, "qk_norm": True, "position": "none"}},
        {"params": {"head_dim": 8, "position": "alibi", "sinks": True, "conv": 3, "gate": True}},
    ],
    # T is longer than a chunk: 64, and 32 for kda.
    "gla": [
        {"dim": 16, "T": 70, "params": {"heads": 2}},
        {"dim": 16, "params": {"heads": 2, "conv": 3, "gate_floor": -0.5, "gate": True}},
    ],
    "pair_attn": [
        {"params": {"head_dim": 16, "window": 3, "r": 0.6, "M": 2}},
        {"params": {"head_dim": 8, "group": 2, "window": 4, "r": 0.0, "hidden": 5}},
    ],
    "retention": [{"dim": 16, "T": 70, "params": {"heads": 2, "gate": True}}],
    "deltanet": [
        {"dim": 16, "T": 70, "params": {"heads": 2}},
        {"dim": 16, "params": {"heads": 2, "conv": 0, "negative": True, "use_gate": True, "gate": True}},
    ],
    "compressed_attn": [
        {"params": {"head_dim": 8, "group": 2, "pool": 4, "stride": 2, "block": 4, "count": 4, "window": 5}},
        {"params": {"head_dim": 16, "pool": 2, "stride": 2, "block": 2, "count": 3, "window": 3}},
    ],
    "gated_deltanet": [{"dim": 16, "T": 70, "params": {"heads": 2, "gate": True}}],
    "kda": [{"dim": 16, "T": 40, "params": {"heads": 2, "gate": True}}],
    "recall": [
        {"params": {"head_dim": 16, "window": 4, "reach": 11}, "around": remembering(group=2, ring=11)},
        {
            "params": {"head_dim": 8, "window": 3, "offset": 2, "gate": True, "position": "none"},
            "around": remembering(group=4),
        },
    ],
    "rwkv6": [{"dim": 16, "T": 70, "params": {"heads": 2, "shift_rank": 3, "decay_rank": 4, "gate": True}}],
    "mamba2": [
        {"params": {"head_dim": 8, "state": 4, "groups": 2, "chunk": 8}},
        {"params": {"head_dim": 16, "state": 3, "chunk": 5, "dt_limit": [0.001, 0.5], "gate": True}},
        {"params": {"head_dim": 16, "state": 4, "groups": 2, "chunk": 8, "ring": {"slots": 2, "stride": 4}}},
    ],
    "mix": [
        {"params": {"of": [{"mamba2": {"head_dim": 16, "state": 3}}, {"deltanet": {"heads": 2, "conv": 2}}]}},
        {
            "params": {
                "of": [{"gla": {"heads": 2}}, {"swa": {"head_dim": 16, "window": 5}}],
                "combine": "sum",
            }
        },
    ],
    "mlp": [
        *({"params": {"act": act}} for act in ("swiglu", "gelu", "relu2", "rwkv")),
        {"params": {"act": "swiglu", "mult": 2.0, "gate": 4}},
        {"params": {"act": "rwkv", "gate": 7}},
    ],
    "samba": [
        {
            "params": {
                "mamba2": {"head_dim": 16, "state": 3, "chunk": 5},
                "swa": {"head_dim": 16, "window": 5},
                "mlp": {"act": "rwkv", "mult": 2.0},
            }
        }
    ],
    "sparsek": [
        {"params": {"head_dim": 8, "group": 2, "keep": 2, "slots": 4, "window": 3}},
        {"params": {"head_dim": 16, "keep": 3, "slots": 5, "window": 1}},
    ],
    "shared_mlp": [
        {"params": {"fresh": 0.25, "mult": 2.0, "visits": 3}, "around": visiting},
        {"params": {"fresh": 0.1, "slide": True, "act": "gelu", "visits": 3}, "around": visiting},
        {"params": {"fresh": 1.0, "order": "mirror", "act": "relu2", "visits": 3}, "around": visiting},
    ],
    "steer": [
        {
            "params": {
                "mlp": {"act": "rwkv", "mult": 2.0},
                "swa": {"head_dim": 8, "group": 2, "window": 4, "sinks": True, "qk_norm": True},
                "keep": 0.6,
            }
        },
        {"params": {"how": "gates", "swa": {"head_dim": 16, "window": 5, "position": "alibi"}}},
    ],
    "summary": [
        {"params": {"head_dim": 8, "group": 2, "every": 3, "vectors": 3, "window": 5}},
        {"params": {"head_dim": 8, "group": 2, "every": 4, "vectors": 2, "mode": "recompress"}},
    ],
    "swa": [
        {"params": {"head_dim": 16, "window": 5}},
        {"params": {"head_dim": 8, "group": 4, "window": 2}},
        {
            "params": {
                "head_dim": 16,
                "window": 6,
                "position": "alibi",
                "sinks": True,
                "conv": 3,
                "gate": True,
            }
        },
    ],
    "xattn": [
        {"params": {"head_dim": 16}, "around": remembering(group=2)},
        {"params": {"head_dim": 16, "window": 6}, "around": remembering(group=1, ring=6)},
        {
            "params": {"head_dim": 8, "sinks": True, "gate": True},
            "around": remembering(group=1, position="none"),
        },
    ],
}

EXEMPT: dict[tuple[str, str], str] = {}

QUANT_CASES: dict[str, list[dict[str, Any]]] = {
    "int8": [{"params": {"channels": 6}}, {"params": {"channels": 40}}],
    "fsq": [{"params": {"channels": 6}}, {"params": {"levels": [2, 3, 8, 255]}}],
    "none": [{"params": {"channels": 6}}],
    "vq": [
        {"params": {"channels": 6, "codes": 16}},
        {"params": {"channels": 6, "groups": 3, "cosine": True}},
    ],
    "rvq": [{"params": {"channels": 6, "codes": 16, "stages": 3}}],
    "simvq": [{"params": {"channels": 6, "codes": 16}}],
    "lfq": [{"params": {"channels": 6}}],
    "bsq": [{"params": {"channels": 6}}],
}

QUANT_EXEMPT: dict[tuple[str, str], str] = {
    ("rvq", "codes_survive_a_round_trip"): "a greedy search: a sum of codes may have other codes as near",
    ("simvq", "flops_equal_the_counter"): "turning the table is done once a call, whatever B and T",
}
