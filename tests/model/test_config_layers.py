"""Layers of a configuration (lookup, `extends`, overrides) and the way back (dump, digests, round trips)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import config
from model.config import sources
from model.config.yamlnodes import parse, write
from model.registry import BLOCKS, QUANTIZERS
from model.schema import BlockNode, Config, ConfigError, OnionNode, RepeatNode
from tests.model.config_toys import FULL, errors, params, stack, toys

__all__ = ["toys"]

PLAIN = "dim: 64\nstack: [mlp]\n"


@pytest.fixture
def archs(toys: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of archs of its own."""
    folder = toys / "archs"
    folder.mkdir()
    monkeypatch.setattr(sources, "ARCHS", folder)
    return folder


# ----------------------------------------------------------------------------- where files are found


def test_an_arch_is_looked_up_by_name(archs: Path, tmp_path: Path) -> None:
    (archs / "samba.yaml").write_text(PLAIN)
    assert config.load("samba") == config.load("samba.yaml") == config.load(archs / "samba.yaml")
    assert config.load("samba").name == "samba"
    Path("samba").mkdir()  # a folder of that name is no file
    assert config.load("samba").dim == 64
    other = tmp_path / "other"
    other.mkdir()
    (other / "samba.yaml").write_text("dim: 32\nstack: [mlp]")
    assert config.load("samba", search=[other]).dim == 32
    Path("samba.yaml").write_text("dim: 16\nstack: [mlp]")
    assert config.load("samba", search=[other]).dim == 16


def test_a_missing_file_says_where_it_was_looked_for(archs: Path) -> None:
    (archs / "samba.yaml").write_text(PLAIN)
    assert errors("sambo") == ["sambo.yaml: no such file; looked in ., archs; did you mean 'samba'?"]
    assert errors("zzz.yaml") == ["zzz.yaml: no such file; looked in ., archs; known: samba"]
    Path("x.yaml").write_text("extends: smba\nstack: [mlp]")
    assert errors("x") == [
        "x.yaml:1:10 extends: smba.yaml: no such file; looked in ., archs; did you mean 'samba'?"
    ]


# ----------------------------------------------------------------------------- extends


def test_extends_merges_mappings_and_replaces_lists(archs: Path) -> None:
    (archs / "base.yaml").write_text(
        "dim: 64\nname: base\nstack: [mlp, gla]\nheads: {next: {weight: 2}, recon: {shift: 0}}\n"
        "defaults: {gla: {heads: 2, rate: 0.5}}\nrun: {steps: 5}\n"
    )
    Path("mid.yaml").write_text("extends: base\nheads: {next: {shift: 3}}\nstack: [gla]")
    Path("top.yaml").write_text("extends: mid.yaml\nheads: {recon: null}\nrun: {steps: null, tokens: 7}")
    cfg = config.load("top")
    assert cfg.name == "top" and cfg.dim == 64
    assert [n for n in cfg.stack] == [BlockNode("gla", {"heads": 2, "rate": 0.5})]
    assert list(cfg.heads) == ["next"]
    assert (cfg.heads["next"].shift, cfg.heads["next"].weight) == (3, 2.0)
    assert (cfg.run.steps, cfg.run.tokens) == (None, 7)


def test_extends_is_relative_to_the_file(archs: Path) -> None:
    (archs / "a.yaml").write_text("extends: b\n")
    (archs / "b.yaml").write_text(PLAIN)
    Path("b.yaml").write_text("dim: 8\nstack: [mlp]")
    assert config.load("a").dim == 64
    assert config.load({"extends": "b"}).dim == 8


def test_extends_in_a_circle_is_refused(archs: Path) -> None:
    for a, b in ("ab", "bc", "cb"):
        Path(f"{a}.yaml").write_text(f"# {a}\nextends: {b}.yaml\n")
    assert errors("a") == ["c.yaml:2:10 extends: goes round in a circle: b.yaml -> c.yaml -> b.yaml"]


def test_an_error_in_a_base_has_its_place_there(archs: Path) -> None:
    (archs / "base.yaml").write_text("dim: 64\nstack: [mlp]\noptim: {lrr: 1, clip: no}\n")
    Path("x.yaml").write_text("extends: base\nrun: {step: 5}\noptim: {clip: 1}")
    assert errors("x") == [
        "x.yaml:2:7 run: unknown key 'step'; did you mean 'steps'?",
        "archs/base.yaml:3:9 optim: unknown key 'lrr'; did you mean 'lr'?",
    ]


# ----------------------------------------------------------------------------- overrides

SHELLS: list[Any] = [{"name": n, "body": ["mlp"], "to": 8} for n in ("s1", "s2")]
TREE = stack(
    "mlp",
    {"gla": {"heads": 2}},
    {"repeat": 2, "of": ["mlp", "gla"]},
    {"gla": None, "as": "g"},
    {"onion": SHELLS},
)


@pytest.mark.parametrize(
    "text, index, expected",
    [
        ("stack.0.mlp.act=gelu", 0, {"act": "gelu"}),  # a bare name is opened
        ("stack.mlp.mult=3", 0, {"mult": 3.0}),  # by block name
        ("stack.1.gla.heads=8", 1, {"heads": 8}),  # by index
        ("stack.1.gla={rate: 2}", 1, {"rate": 2.0}),  # = replaces
        ("stack.g.heads=16", 3, {"heads": 16}),  # by `as`
        ("stack.1.gla.ring={slots: 1e-3}", 1, {"heads": 2, "ring": {"slots": 1e-3}}),
        ("stack.1.gla.memory=[1, 2]", 1, {"heads": 2, "memory": [1, 2]}),
    ],
)
def test_set_walks_lists(text: str, index: int, expected: dict[str, Any], toys: Path) -> None:
    assert params(TREE, index, [text]) == expected


def test_set_reaches_everything_else(toys: Path) -> None:
    sets = [
        "stack.repeat=3",
        "stack.2.of.gla.heads=8",
        "stack.onion.s2.quant.int8.bits=4",
        "stack.4.onion.0.frozen=true",
        "stack.4.onion.s1.quant=none",
        "heads.next.ffn.mult=2",
        "heads.second={shift: 2}",
        "run.tokens=1e6",
        "wandb=off",
        "defaults.mlp.act=a=b",
        " optim.lr = 1e-3 ",
    ]
    cfg = config.load(TREE, sets)
    repeat, onion = cfg.stack[2], cfg.stack[4]
    assert isinstance(repeat, RepeatNode) and isinstance(onion, OnionNode)
    assert repeat.repeat == 3 and repeat.of[1] == BlockNode("gla", {"heads": 8})
    assert onion.onion[1].quant.params == {"bits": 4}
    assert onion.onion[0].frozen and onion.onion[0].quant.name == "none"
    assert cfg.heads["next"].ffn == {"act": "a=b", "mult": 2.0} and cfg.heads["second"].shift == 2
    assert (cfg.run.tokens, cfg.wandb, cfg.optim.lr) == (10**6, "off", 1e-3)
    assert TREE["stack"][0] == "mlp"  # the source is left alone


@pytest.mark.parametrize(
    "text, message",
    [
        ("run.steps", "--set #1: want key.path=value, got 'run.steps'"),
        ("run..steps=1", "--set #1: want key.path=value, got 'run..steps=1'"),
        ("run.steps=x", "--set #1 run.steps: want int, got 'x'"),
        ("run.setps=1", "--set #1 run: unknown key 'setps'; did you mean 'steps'?"),
        ("rum.steps=1", "--set #1: unknown key 'rum'; did you mean 'run'?"),
        ("dim.x=1", "--set #1 dim.x: nothing to set in 64"),
        (
            "dim=]",
            "--set #1 dim: not YAML: while parsing a block node, expected the node content, but found ']'",
        ),
        (
            "stack.4.onion.s3.frozen=true",
            "--set #1 stack.4.onion.s3: want an index below 2 or one of ['s1', 's2'], unique",
        ),
        (
            "stack.gla.heads=8",
            "--set #1 stack.gla: want an index below 5 or one of"
            " ['mlp', 'repeat', 'of', 'g', 'onion', 'reading'], unique; 'gla' is there 2 times",
        ),
        (
            "stack.9=mlp",
            "--set #1 stack.9: want an index below 5 or one of"
            " ['mlp', 'repeat', 'of', 'g', 'onion', 'reading'], unique",
        ),
        ("stack.0.mlp.wide=8", "--set #1 stack[0].mlp: unknown key 'wide'; known: act, mult"),
        ("stack.0=mlpp", "--set #1 stack[0]: no block called 'mlpp'; did you mean 'mlp'?"),
        (
            "stack.4.onion.s1.quant.fsq.levels=8",
            "--set #1 stack.4.onion.s1.quant.fsq: nothing to set in 'int8'",
        ),
        ("dim=null", "<mapping>: missing key 'dim'"),
    ],
)
def test_a_wrong_override_is_named_by_its_number(text: str, message: str, toys: Path) -> None:
    tree = config.dump(config.load(TREE))
    tree["stack"][4]["onion"][0]["quant"] = "int8"
    tree["stack"][1:4] = TREE["stack"][1:4]
    assert message in errors(tree, [text])


def test_overrides_as_a_mapping(toys: Path) -> None:
    cfg = config.load(TREE, {"dim": 32, "run": {"steps": 3}, "optim.lr": 0.5, "stack.g.heads": 8})
    assert (cfg.dim, cfg.run.steps, cfg.run.context, cfg.optim.lr) == (32, 3, 256, 0.5)
    assert "overrides run.steps: want int, got '3'" in errors(TREE, {"run": {"steps": "3"}})
    assert "overrides optim.lr: want plain data, got object" in errors(TREE, {"optim.lr": object()})


# ----------------------------------------------------------------------------- the way back


def again(cfg: Config) -> None:
    """The laws of `dump`: equal through plain data and through text, with the same digests."""
    plain = config.load(config.dump(cfg))
    Path("again.yaml").write_text(config.dumps(cfg))
    text = config.load("again.yaml")
    assert plain == cfg == text
    assert config.dump(plain) == config.dump(cfg) == config.dump(text)
    assert config.digest(plain) == config.digest(cfg) == config.digest(text)


def test_a_config_that_uses_everything_goes_there_and_back(toys: Path) -> None:
    again(config.load(FULL))


scalars = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
)
data = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
)


@settings(max_examples=100)
@given(data)
def test_what_is_written_is_read_back(value: Any) -> None:
    tree = parse(write({"a": value}), "x", lambda *error: pytest.fail(str(error)))
    assert tree is not None and tree.plain() == {"a": value}


def optional(**keys: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=keys)


numbers = st.floats(0, 1e6)
gla = optional(
    heads=st.sampled_from([1, 2, 4, None]),
    gate=st.booleans() | st.none(),
    drop=numbers | st.none(),
    kind=st.sampled_from(["plain", "delta"]),
    taps=st.lists(st.integers(), max_size=3),
    span=st.tuples(st.integers(), numbers).map(list),
    memory=st.integers() | st.lists(st.integers(), max_size=2) | st.text(),
    ring=st.none() | st.dictionaries(st.text(max_size=3), scalars, max_size=3),
    rate=numbers | st.integers(-5, 5),
)
mlp = optional(act=st.text(max_size=4), mult=numbers)
pair = optional(gla=gla | st.none(), mlp=mlp | st.none(), eps=numbers)
blocks = st.sampled_from(["gla", "mlp", "pair"]) | st.one_of(
    *(
        st.tuples(st.just(n), p).map(lambda t: {t[0]: t[1]})
        for n, p in [("gla", gla), ("mlp", mlp), ("pair", pair)]
    )
)
quants = st.sampled_from(["int8", "fsq", "none", None]) | optional(bits=st.integers()).map(
    lambda p: {"int8": p}
)
nodes = st.recursive(
    blocks,
    lambda inner: st.builds(
        lambda n, of, tied: {"repeat": n, "of": of, "tied": tied},
        st.integers(1, 3),
        st.lists(inner | st.lists(inner, min_size=1, max_size=2), min_size=1, max_size=3),
        st.booleans() | st.none(),
    ),
    max_leaves=6,
)
shells = st.lists(
    st.fixed_dictionaries(
        {"body": st.lists(nodes, max_size=2), "to": st.integers(1, 32)},
        optional={"quant": quants, "frozen": st.booleans(), "width": st.sampled_from([None, 32, 128])},
    ),
    min_size=1,
    max_size=3,
).map(lambda found: {"onion": [{"name": f"s{i}", **shell} for i, shell in enumerate(found)]})
configs = st.fixed_dictionaries(
    {"dim": st.just(64), "stack": st.lists(nodes | shells, min_size=1, max_size=4)},
    optional={
        "defaults": optional(gla=gla, mlp=mlp, pair=pair, int8=optional(bits=st.integers())),
        "heads": st.dictionaries(
            st.text(max_size=4),
            optional(shift=st.integers(0, 3), ffn=mlp | st.none()),
            min_size=1,
            max_size=3,
        ),
        "run": optional(steps=st.integers(1, 9) | st.none(), seed=st.integers(0)),
        "optim": optional(lr=numbers, betas=st.just([0.8, 0])),
        "vocab": st.integers(1) | st.none(),
    },
)


@settings(max_examples=30)
@given(configs)
def test_any_config_goes_there_and_back(toys: Path, source: dict[str, Any]) -> None:
    again(config.load(source))


def test_digests(toys: Path) -> None:
    one = config.load({"dim": 64, "stack": ["mlp"], "optim": {"lr": 1}})
    same = config.load({"optim": {"lr": 1.0}, "stack": [{"mlp": {}}], "dim": 64})
    assert config.digest(one) == config.digest(same) and len(config.digest(one)) == 32
    longer = config.load({"dim": 64, "stack": ["mlp"], "optim": {"lr": 1}}, ["run.steps=3"])
    assert config.digest(longer) != config.digest(one)
    assert config.arch_digest(longer) == config.arch_digest(one)
    for change in ("dim=32", "stack.0.mlp.act=gelu", "heads.next.shift=2", "embed.frozen=true"):
        assert config.arch_digest(config.load(TREE, [change])) != config.arch_digest(config.load(TREE))


# ----------------------------------------------------------------------------- the real library


@pytest.mark.parametrize("kind", ["block", "quantizer"])
def test_every_registered_name_can_be_configured(kind: str) -> None:
    """Each parameter of each class, set to its own default, is read and goes there and back."""
    registry = BLOCKS if kind == "block" else QUANTIZERS
    assert registry.names()
    for name in registry.names():
        known = {
            p.name: p.default
            for p in registry.params(name).values()
            if p.name != "channels" or kind == "block"
        }
        if kind == "block":
            node: Any = {name: known}
        else:
            node = {"onion": [{"name": "s", "body": ["mlp"], "to": 32, "quant": {name: known}}]}
        cfg = config.load({"dim": 256, "stack": [node]})
        assert config.digest(config.load(config.dump(cfg))) == config.digest(cfg)


@pytest.mark.parametrize("value", [0, -1, 10**30, 7])
def test_an_absurd_number_never_ends_in_a_traceback(value: int) -> None:
    tried = 0
    for name in BLOCKS.names():
        for param in BLOCKS.params(name).values():
            if param.type not in (int, int | None):
                continue
            tried += 1
            try:
                config.load({"dim": 64, "stack": [{name: {param.name: value}}]})
            except ConfigError as error:
                assert all(f"stack[0].{name}" in line for line in error.errors)
    assert tried > 5


def test_reading_draws_no_random_numbers() -> None:
    before = torch.get_rng_state()
    config.load("samba")
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("path", sorted(sources.ARCHS.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_arch_goes_there_and_back(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cfg = config.load(path.stem)
    assert cfg.name == path.stem
    again(cfg)


def test_the_error_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="no such file"):
        config.load("there is no such arch")
    assert issubclass(ConfigError, ValueError)
