"""What a type cannot say: ranges, and keys that must agree. One generator a dataclass.

A check gets the values by YAML key, defaults included; keys whose value could not be read are missing,
so that the others are still checked. It yields (key, message); the key may be dotted, or a Mark.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

from model import schema, sections

Found = Iterator[tuple[str | schema.Mark, str]]
Values = dict[str, Any]

AT_LEAST: dict[type, dict[str, int]] = {
    schema.Config: {"dim": 1, "vocab": 1, "init_std": 0, "norm_eps": 0},
    schema.RepeatNode: {"repeat": 1},
    schema.ShellNode: {"to": 1, "width": 1},
    schema.Merge: {"size": 1},
    schema.WrapSpec: {"width": 1},
    schema.MemorySpec: {"head_dim": 1, "group": 1, "theta": 1, "ring": 1},
    schema.Keep: {"recent": 1},
    schema.Blend: {"steps": 0, "hold": 0, "code": 0},
    schema.EmbedConfig: {"project": 1},
    schema.TableVQ: {"groups": 1, "codes": 2},
    schema.HeadConfig: {
        "shift": 0,
        "weight": 0,
        **dict.fromkeys(("size", "depth", "layers", "window"), 1),
        "codes": 2,
    },
    sections.RunConfig: {
        **dict.fromkeys(("steps", "tokens", "batch", "micro", "context", "eval_tokens", "log_every"), 1),
        "shard": 1,
        **dict.fromkeys(("eval_every", "save_every", "keep", "seed"), 0),
        **dict.fromkeys(("ema", "spike_sigma", "stats_every", "sample"), 0),
        "spike_window": 8,
    },
    sections.BatchWarmup: {"from": 1, "steps": 1},
    sections.OptimConfig: {"lr": 0, "eps": 0, "decay": 0, "clip": 0, "momentum": 0},
    sections.MupConfig: {"base": 1},
    sections.LossConfig: {"z": 0, "gamma": 0, "alpha": 1},
    sections.RhoConfig: {"warm": 0, "soften": 0},
    sections.NowcastConfig: {"every": 0, "history": 2, "gate": 1},
    sections.ScheduleConfig: {"warmup": 0, "decay": 0, "final": 0},
    sections.OuterConfig: {
        **dict.fromkeys(("every", "fragments", "shards", "stale"), 1),
        **dict.fromkeys(
            ("workers", "lr", "momentum", "overlap", "blend", "delay", "carry", "grace", "patience"), 0
        ),
    },
    sections.GrowConfig: {
        "delta": 0,
        "window": 1,
        "patience": 1,
        "tokens_per_param": 0,
        "head_lr": 0,
        "slope": 0,
    },
}


OPTIMIZERS_WITH = {  # options of `optim` that only some optimizers have
    "kahan": ("stableadamw", "lion", "adan"),
    "release": ("stableadamw", "lion", "adan", "adalomo"),
    "wiener": ("adamw", "stableadamw"),
    "mup": ("adamw", "stableadamw", "lion", "adan", "adam_mini", "schedulefree"),
}


HEAD_KEYS: dict[str, tuple[str, ...]] = {  # what only some kinds of head have
    "shift": ("single",),
    "size": ("parallel", "mask", "var"),
    "depth": ("chain",),
    "layers": ("mask", "var"),
    "window": ("chain", "mask", "var"),
    "attn": ("chain", "mask", "var"),
    "codes": ("var",),
}


LOSS_KEYS: dict[str, tuple[str, ...]] = {"gamma": ("mile",), "alpha": ("alpha",)}


def check(cls: type, values: Values) -> Found:
    """Everything that is wrong with the values of one mapping."""
    for key, low in AT_LEAST.get(cls, {}).items():
        if values.get(key) is not None and values[key] < low:
            yield key, f"want at least {low}, got {values[key]}"
    if cls in _CHECKS:
        yield from _CHECKS[cls](values)


def _config(v: Values) -> Found:
    name = v.get("name", "x")
    if not name or name.startswith(".") or any(c in '/\\:*?"<>|' or not c.isprintable() for c in name):
        yield "name", f"want a name that can be a folder's, got {name!r}"
    if v.get("stack") == []:
        yield "stack", "is empty: want at least one block"
    if v.get("heads") == {}:
        yield "heads", "is empty: nothing would be trained; want at least one, like {next: {shift: 1}}"
    elif v.get("heads") and _only_drafts(v["heads"].values()):
        yield "heads", "need one that says the next token, like {next: {shift: 1}}; the others only draft"
    embed = v.get("embed")
    if embed is not None and "dim" in v and embed.project not in (None, v["dim"]):
        yield "embed.project", f"{embed.project} is not dim: {v['dim']}; both are the width of the model"


def _of_kind(v: Values, cls: type, keys: dict[str, tuple[str, ...]], what: str) -> Found:
    """Keys that only some kinds of a section have, given for another."""
    kind = v.get("kind", getattr(cls, "kind", None))
    for key, kinds in keys.items():
        if key in v and v[key] != getattr(cls, key, None) and kind not in kinds:
            yield key, f"is for the kinds {', '.join(kinds)}, and this {what} is {kind}"


def _only_drafts(heads: Collection[schema.HeadConfig]) -> bool:
    """Whether some of the heads draft, and none says the next token, from which they go on."""
    says = any(h.kind == "parallel" or (h.kind == "single" and h.shift == 1) for h in heads)
    return not says and any(h.kind in ("chain", "mask", "var") for h in heads)


def _head(v: Values) -> Found:
    kind = v.get("kind", "single")
    yield from _of_kind(v, schema.HeadConfig, HEAD_KEYS, "head")
    if kind in ("parallel", "mask", "var") and (v.get("ffn") or {}).get("act") == "rwkv":
        yield "ffn", f"act: rwkv looks at the token before, which a {kind} head does not keep"


def _run(v: Values) -> Found:
    if v.get("steps") is not None and v.get("tokens") is not None:
        yield "tokens", "give steps or tokens, not both; `steps: null` drops steps"
    if v.get("shard") is not None and v.get("parallel", "hybrid") != "hybrid":
        yield "shard", f"is for `parallel: hybrid`, not {v['parallel']!r}"
    if v.get("ema", 0.0) >= 1:
        yield "ema", f"want a decay below 1, like 0.999, got {v['ema']}"
    warm = v.get("batch_warmup")
    if warm is not None and "batch" in v and warm.from_ > v["batch"]:
        yield "batch_warmup.from", f"{warm.from_} sequences are more than run.batch: {v['batch']}"


def _optim(v: Values) -> Found:
    betas, name = v.get("betas", [0.9, 0.95]), v.get("name", "adamw")
    want = 3 if name == "adan" else 2
    if len(betas) != want or not all(0 <= b < 1 for b in betas):
        example = ", like [0.98, 0.92, 0.99]" if want == 3 else ""
        yield "betas", f"want {'three' if want == 3 else 'two'} numbers in [0, 1){example}, got {betas}"
    elif name == "schedulefree" and betas[0] == 0:
        yield "betas", f"the first must be above 0: schedulefree averages by it; got {betas}"
    for key, names in OPTIMIZERS_WITH.items():
        if v.get(key) and name not in names:
            yield key, f"the optimizer {name!r} cannot; those that can: {', '.join(names)}"
    if v.get("release") and v.get("clip", 1.0):
        yield "release", "there is no global gradient norm when gradients are released: set clip: 0"
    if v.get("momentum", 0.95) >= 1:
        yield "momentum", f"want a number in [0, 1), got {v['momentum']}"


def _loss(v: Values) -> Found:
    yield from _of_kind(v, sections.LossConfig, LOSS_KEYS, "loss")


def _rho(v: Values) -> Found:
    if "keep" in v and not 0 < v["keep"] <= 1:
        yield "keep", f"want a share in (0, 1], got {v['keep']}"


def _select(v: Values) -> Found:
    if v.get("rho") is not None and v.get("weights") is not None:
        yield "weights", "a run reads one sidecar: give rho or weights, not both"


def _activations(v: Values) -> Found:
    if v.get("bits") not in (None, 2, 4, 8):
        yield "bits", f"want 2, 4 or 8, or null for none, got {v['bits']}"
    only = v.get("only", ["mlp"])
    if v.get("bits") is None and only != ["mlp"]:
        yield "only", f"{only}: nothing is stored in few bits without `bits`; set it to 2, 4 or 8"
    if v.get("bits") is not None and not only:
        yield "only", "is empty: name blocks, bank modules or sites, like [mlp], or leave out `bits`"


def _outer(v: Values) -> Found:
    if v.get("momentum", 0) >= 1:
        yield "momentum", f"want a number below 1, got {v['momentum']}"
    if not 0 < v.get("density", 1) <= 1:
        yield "density", f"want a share in (0, 1], got {v['density']}"
    for key in ("blend", "carry"):
        if v.get(key, 0) > 1:
            yield key, f"want a share in [0, 1], got {v[key]}"
    if v.get("heartbeat", 1) <= 0:
        yield "heartbeat", f"want more than 0 seconds, got {v['heartbeat']}"
    every = v.get("every", 1)
    if v.get("kind") == "streaming":
        if v.get("overlap", 0) >= every:
            yield (
                "overlap",
                f"{v['overlap']} steps: a fragment must arrive before it is sent again (every: {every})",
            )
        if v.get("fragments", 1) > every:
            yield "fragments", f"{v['fragments']} in {every} steps: at most one is sent a step"
    if v.get("kind") == "async" and not v.get("server"):
        yield "server", "kind: async needs the HOST:PORT of `python -m train serve`"


def _repeat(v: Values) -> Found:
    if v.get("of") == []:
        yield "of", "is empty: nothing to repeat"
    if v.get("order", "cycle") != "cycle" and not v.get("tied", True):
        yield "order", f"{v['order']} is an order of shared weights: add `tied: true`"


def _mirror(v: Values) -> Found:
    if v.get("mirror") == []:
        yield "mirror", "is empty: nothing to mirror"


def _yoco(v: Values) -> Found:
    if v.get("cross") == []:
        yield "cross", "is empty: want blocks that read the memory, like [xattn, mlp]"


def _memory(v: Values) -> Found:
    if v.get("ring") is not None and v.get("keep") is not None:
        yield "keep", "not with `ring`, which drops tokens by their age: give one of them"


def _keep(v: Values) -> Found:
    if not 0 < v.get("ratio", 1) <= 1:
        yield "ratio", f"want a share of the tokens, above 0 and up to 1, got {v['ratio']}"
    if not 0 <= v.get("decay", 0) < 1:
        yield "decay", f"want at least 0 and below 1, got {v['decay']}"


def _wrap(v: Values) -> Found:
    if v.get("inner") == []:
        yield "inner", "is empty: nothing to wrap"


def _shell(v: Values) -> Found:
    merge = v.get("merge", 1)
    size = merge.size if isinstance(merge, schema.Merge) else merge
    if size < 1:
        yield "merge", f"want at least 1, got {size}"
    if size > 1 and not v.get("residual", True):
        yield (
            "merge",
            f"{size} without `residual: true`: only one position in {size} would ever see its own"
            " token; the outer codes must bypass a shorter shell",
        )


def _onion(v: Values) -> Found:
    if v.get("onion") == []:
        yield "onion", "is empty: want at least one shell"
    seen: set[str] = set()
    for shell in v.get("onion", []):
        if shell.name in seen:
            yield shell.mark, f"a second shell called {shell.name!r}; shell names are unique"
        seen.add(shell.name)


_CHECKS: dict[type, Callable[[Values], Found]] = {
    schema.Config: _config,
    schema.HeadConfig: _head,
    sections.RunConfig: _run,
    sections.OptimConfig: _optim,
    sections.OuterConfig: _outer,
    sections.LossConfig: _loss,
    sections.RhoConfig: _rho,
    sections.SelectConfig: _select,
    sections.ActivationsConfig: _activations,
    schema.RepeatNode: _repeat,
    schema.MirrorNode: _mirror,
    schema.YocoSpec: _yoco,
    schema.MemorySpec: _memory,
    schema.Keep: _keep,
    schema.WrapSpec: _wrap,
    schema.ShellNode: _shell,
    schema.OnionNode: _onion,
}
