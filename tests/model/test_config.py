"""The config reader: every mistake is named with its place, and what is read can be written again."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model import config
from model.config import kinds
from model.config.yamlnodes import parse, write
from model.schema import BlockNode, ConfigError, Node, OnionNode, QuantSpec
from tests.model.config_toys import FULL, errors, params, stack, toys

__all__ = ["toys"]

# ----------------------------------------------------------------------------- messages

BAD = """\
dim: 60
stack:
  - onion:
    - {name: s1, to: 8, body: [swaa], quant: int8}
    - {name: s2, to: 8, body: [mlp],  quant: {fsq: {level: 8}}, frozen: no}
    - {name: s2, to: 8, body: [gla: {heads: 7}], to: 9}
  - {repeat: 2, off: [mlp]}
"""


def test_all_errors_of_a_file_at_once(toys: Path) -> None:
    Path("bad.yaml").write_text(BAD)
    assert errors("bad.yaml") == [
        "bad.yaml:4:32 stack[0].onion[0].body[0]: no block called 'swaa'; did you mean 'swa'?",
        "bad.yaml:5:53 stack[0].onion[1].quant.fsq: unknown key 'level'; did you mean 'levels'?",
        "bad.yaml:5:73 stack[0].onion[1].frozen: want bool, got 'no'",
        "bad.yaml:6:37 stack[0].onion[2].body[0].gla: heads=7 does not divide 60",
        "bad.yaml:6:50 stack[0].onion[2]: key 'to' given twice (first on line 6)",
        "bad.yaml:7:5 stack[1]: missing key 'of'",
        "bad.yaml:7:17 stack[1]: unknown key 'off'; did you mean 'of'?",
    ]


SHELL = "{name: s1, body: [mlp], to: 8"
MISTAKES = {
    "dim: 8\nstack: [mlp]\noptim: {lrr: 1}": "x.yaml:3:9 optim: unknown key 'lrr'; did you mean 'lr'?",
    "dim: 8\nstack: [mlp]\noptm: {}": "x.yaml:3:1: unknown key 'optm'; did you mean 'optim'?",
    "dim: wide\nstack: [mlp]": "x.yaml:1:6 dim: want int, got 'wide'",
    "dim: 0\nstack: [mlp]": "x.yaml:1:6 dim: want at least 1, got 0",
    "dim: 8.5\nstack: [mlp]": "x.yaml:1:6 dim: want int, got 8.5",
    "dim: true\nstack: [mlp]": "x.yaml:1:6 dim: want int, got true",
    "stack: [mlp]": "x.yaml:1:1: missing key 'dim'",
    "dim: null\nstack: [mlp]": "x.yaml:1:1: missing key 'dim'",
    "dim: 8\nstack: mlp": "x.yaml:2:8 stack: want a list, got 'mlp'",
    "dim: 8\nstack: []": "x.yaml:2:8 stack: is empty: want at least one block",
    "dim: 8\nstack: [7]": "x.yaml:2:9 stack[0]: " + kinds.WANT_NODE + ", got 7",
    "dim: 8\nstack: [{as: m}]": ("x.yaml:2:9 stack[0]: " + kinds.WANT_NODE + ", got a mapping"),
    "dim: 8\nstack: [gla: {heads: [1]}]": "x.yaml:2:22 stack[0].gla.heads: want int, got a list",
    "dim: 8\nstack: [gla: 8]": "x.yaml:2:14 stack[0].gla: want a mapping of parameters, got 8",
    "dim: 8\nstack: [gla: {drop: a}]": "x.yaml:2:21 stack[0].gla.drop: want float, got 'a'",
    "dim: 8\nstack: [gla: {kind: delt}]": (
        "x.yaml:2:21 stack[0].gla.kind: want one of 'plain', 'delta', got 'delt'; did you mean 'delta'?"
    ),
    "dim: 8\nstack: [gla: {taps: [1, b]}]": "x.yaml:2:25 stack[0].gla.taps[1]: want int, got 'b'",
    "dim: 8\nstack: [gla: {span: [1]}]": "x.yaml:2:21 stack[0].gla.span: want 2 values, got 1",
    "dim: 8\nstack: [gla: {memory: {}}]": (
        "x.yaml:2:23 stack[0].gla.memory: want int or a list or str, got a mapping"
    ),
    "dim: 8\nstack: [gla: {memory: [x]}]": "x.yaml:2:24 stack[0].gla.memory[0]: want int, got 'x'",
    "dim: 8\nstack: [gla: {ring: 3}]": "x.yaml:2:21 stack[0].gla.ring: want a mapping, got 3",
    "dim: 8\nstack: [gla: {rate: .nan}]": "x.yaml:2:21 stack[0].gla.rate: want a finite number",
    "dim: 8\nstack: [gla: {ring: {a: .inf}}]": "x.yaml:2:25 stack[0].gla.ring.a: want a finite number",
    "dim: 8\nstack: [pair: {gla: {head: 2}}]": (
        "x.yaml:2:22 stack[0].pair.gla: unknown key 'head'; did you mean 'heads'?"
    ),
    "dim: 9\nstack: [pair: {gla: 5}]": "x.yaml:2:21 stack[0].pair.gla: want a mapping of parameters, got 5",
    "dim: 9\nstack: [pair: {gla: {rate: 2}}]": "x.yaml:2:15 stack[0].pair.gla: heads=4 does not divide 9",
    "dim: 8\nstack: [{mlp: {}, as: 3}]": "x.yaml:2:23 stack[0].as: want str, got 3",
    "dim: 8\nstack: [{repat: 2, of: [mlp]}]": (
        "x.yaml:2:10 stack[0]: no block called 'repat'; did you mean 'repeat'?"
    ),
    "dim: 8\nstack:\n- gla:\n  heads: 2": (
        "x.yaml:4:3 stack[0]: 'heads' stands beside the block 'gla': indent its parameters further, and give"
        " every block an item of its own"
    ),
    "dim: 8\nstack: [{repeat: 0, of: [mlp]}]": "x.yaml:2:18 stack[0].repeat: want at least 1, got 0",
    "dim: 8\nstack: [{repeat: 2, of: []}]": "x.yaml:2:25 stack[0].of: is empty: nothing to repeat",
    "dim: 8\nstack: [{mlp: {}, as: one}, {use: onee}]": (
        "x.yaml:2:29 stack[1]: no block was named 'onee'; did you mean 'one'?"
    ),
    "dim: 8\nstack: [mlp, {use: m2}]": "x.yaml:2:14 stack[1]: no block was named 'm2'; nothing has `as:`",
    "dim: 8\nstack: [onion: []]": "x.yaml:2:16 stack[0].onion: is empty: want at least one shell",
    f"dim: 8\nstack: [onion: [{SHELL}, quant: int9}}]]": (
        "x.yaml:2:55 stack[0].onion[0].quant: no quantizer called 'int9'; did you mean 'int8'?"
    ),
    f"dim: 8\nstack: [onion: [{SHELL}, quant: {{a: 1, b: 2}}}}]]": (
        "x.yaml:2:55 stack[0].onion[0].quant: want one quantizer, `name` or `name: {...}`,"
        " got the keys ['a', 'b']"
    ),
    f"dim: 8\nstack: [onion: [{SHELL}, quant: {{int8: {{channels: 3}}}}}}]]": (
        "x.yaml:2:63 stack[0].onion[0].quant.int8: 'channels' is set by `to` of the shell"
    ),
    "dim: 8\nstack: [onion: [{name: s1, body: [mlp], to: 9}]]": (
        "x.yaml:2:17 stack[0].onion[0].quant.int8: 9 channels are more than the 8 outside"
    ),
    f"dim: 8\nstack: [onion: [{SHELL}}}, {SHELL}}}]]": (
        "x.yaml:2:49 stack[0].onion[1]: a second shell called 's1'; shell names are unique"
    ),
    f"dim: 8\nstack: [onion: [{SHELL}, merge: 4}}]]": (
        "x.yaml:2:55 stack[0].onion[0].merge: 4 without `residual: true`: only one position in 4 would ever"
        " see its own token; the outer codes must bypass a shorter shell"
    ),
    f"dim: 8\nstack: [onion: [{SHELL}}}], reading: hole]": (
        "x.yaml:2:50 stack[1]: no block called 'reading'; known: "
        + ", ".join(sorted(["gla", "mlp", "pair", "swa", *kinds.FORMS]))
    ),
    f"dim: 8\nstack: [{{onion: [{SHELL}}}], reading: hole}}]": (
        "x.yaml:2:60 stack[0].reading: want one of 'split', 'whole', got 'hole'; did you mean 'whole'?"
    ),
    "dim: 8\nstack: [mlp]\ndefaults: {gl: {}}": (
        "x.yaml:3:12 defaults.gl: no block called 'gl'; did you mean 'gla'?"
    ),
    "dim: 8\nstack: [gla]\ndefaults: {gla: {heads: x}}": "x.yaml:3:25 defaults.gla.heads: want int, got 'x'",
    "dim: 8\nstack: [mlp]\ndefaults: {gla: 3}": (
        "x.yaml:3:17 defaults.gla: want a mapping of parameters, got 3"
    ),
    "dim: 8\nstack: [mlp]\nrun: {steps: 5, tokens: 5}": (
        "x.yaml:3:25 run.tokens: give steps or tokens, not both; `steps: null` drops steps"
    ),
    "dim: 8\nstack: [mlp]\nembed: {project: 9}": (
        "x.yaml:3:18 embed.project: 9 is not dim: 8; both are the width of the model"
    ),
    "dim: 8\nstack: [mlp]\nheads: {next: {weight: -1}}": (
        "x.yaml:3:24 heads.next.weight: want at least 0, got -1.0"
    ),
    "dim: 8\nstack: [mlp]\nheads: {next: {ffn: {wide: 1}}}": (
        "x.yaml:3:22 heads.next.ffn: unknown key 'wide'; known: act, mult"
    ),
    "dim: 8\nstack: [mlp]\nheads: {next: null}": (
        "x.yaml:3:8 heads: is empty: nothing would be trained; want at least one, like {next: {shift: 1}}"
    ),
    "dim: 8\nstack: [mlp]\noptim: {betas: [1, 2]}": (
        "x.yaml:3:16 optim.betas: want two numbers in [0, 1), got [1.0, 2.0]"
    ),
    "dim: 8\nstack: [mlp]\nname: ../x": "x.yaml:3:7 name: want a name that can be a folder's, got '../x'",
    "dim: 8\nstack: [mlp]\nextends: 3": "x.yaml:3:10 extends: want a file or an arch name, got 3",
    "dim: 8\n  stack: [mlp]": "x.yaml:2:8: not YAML: mapping values are not allowed here",
    "dim: 8\nstack: [mlp": (
        "x.yaml:2:12: not YAML: while parsing a flow sequence, expected ',' or ']', but got '<stream end>'"
    ),
    "dim: &a [*a]\nstack: [mlp]": "x.yaml:1:6 dim[0]: an alias contains itself",
    "dim: 8\nstack: !!python/name:os.system [mlp]": (
        "x.yaml:2:8 stack: the tag 'tag:yaml.org,2002:python/name:os.system' is not allowed"
    ),
    "dim: 8\n? [a]\n: 3\nstack: [mlp]": "x.yaml:2:3: a key must be a plain name",
    "- mlp": "x.yaml:1:1: want a mapping with the keys `dim` and `stack`, got a list",
    "": "x.yaml:1:1: want a mapping with the keys `dim` and `stack`, got null",
}


@pytest.mark.parametrize("text", MISTAKES, ids=[str(i) for i in range(len(MISTAKES))])
def test_each_mistake_has_its_message(text: str, toys: Path) -> None:
    Path("x.yaml").write_text(text)
    assert MISTAKES[text] in errors("x.yaml")


@pytest.mark.parametrize("text", ["dim: 8\nstack: [gla, gla]\ndefaults: {gla: {heads: x}}", BAD])
def test_no_error_is_said_twice(text: str, toys: Path) -> None:
    Path("x.yaml").write_text(text)
    found = errors("x.yaml")
    assert len(found) == len(set(found)) == text.count("{heads: x}") + 7 * (text == BAD)


def test_depth_and_size_are_bounded(toys: Path) -> None:
    Path("deep.yaml").write_text("dim: 8\nstack: " + "[" * 3000 + "]" * 3000)
    assert errors("deep.yaml") == ["deep.yaml: nested too deeply"]
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{c}: &{c} [{', '.join([f'*{b}'] * 9)}]\n" for b, c in zip("abcdefgh", "bcdefghi")
    )
    Path("bomb.yaml").write_text(bomb)
    assert any("unfolds to more than 20000 nodes" in e for e in errors("bomb.yaml"))
    Path("bytes.yaml").write_bytes(b"dim: \xff\xfe")
    assert errors("bytes.yaml") == ["bytes.yaml: cannot be read: not UTF-8 at byte 5"]
    Path("null.yaml").write_bytes(b"dim: \x00")
    assert errors("null.yaml")[0].startswith("null.yaml: not YAML: unacceptable character #x0000")


# ----------------------------------------------------------------------------- typos everywhere


def places(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of every key and index, at any depth."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def at(data: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        data = data[key]
    return data


def spelled(path: tuple[Any, ...]) -> str:
    return "".join(f"[{k}]" if isinstance(k, int) else f".{k}" for k in path).lstrip(".")


def is_free(path: tuple[Any, ...]) -> bool:
    """Whether the key is the user's own choice (names of heads, contents of a free mapping)."""
    return (len(path) == 2 and path[0] == "heads") or "ring" in path[:-1]


def test_a_misspelt_key_is_found_wherever_it_stands(toys: Path) -> None:
    data = config.dump(config.load(FULL))
    tried = 0
    for path in places(data):
        if isinstance(path[-1], int) or is_free(path):
            continue
        broken = copy.deepcopy(data)
        parent = at(broken, path[:-1])
        typo = path[-1] + "q"
        items = [(typo if k == path[-1] else k, v) for k, v in parent.items()]
        parent.clear()
        parent.update(items)
        found = errors(broken)
        assert any(repr(typo) in line and spelled(path[:-1]) in line for line in found), (path, found)
        tried += 1
    assert tried > 90


def test_a_wrong_type_is_found_wherever_it_stands(toys: Path) -> None:
    data = config.dump(config.load(FULL))
    tried = 0
    for path in places(data):
        if is_free(path) and len(path) > 2:
            continue
        wrong: Any = 7 if isinstance(at(data, path), dict) else {"zzz": 1}
        broken = copy.deepcopy(data)
        at(broken, path[:-1])[path[-1]] = wrong
        found = errors(broken)
        assert any(spelled(path) in line for line in found), (path, found)
        tried += 1
    assert tried > 110


@settings(max_examples=40)
@given(st.randoms(use_true_random=False))
def test_damaged_text_gives_a_config_or_a_config_error(toys: Path, rnd: random.Random) -> None:
    text = write(config.dump(config.load(FULL)))
    for _ in range(rnd.randint(1, 4)):
        i = rnd.randrange(len(text))
        text = text[:i] + rnd.choice("{}[]:,&*!|>'\"%@`#\n\t -x0\0é") * rnd.randint(0, 2) + text[i + 1 :]
    (toys / "x.yaml").write_text(text)
    try:
        config.load("x.yaml")
    except ConfigError as error:
        assert all(line.startswith("x.yaml") for line in error.errors)


# ----------------------------------------------------------------------------- scalars


@pytest.mark.parametrize(
    "text, value",
    [
        ("1e-3", 1e-3),
        ("1E5", 1e5),
        (".5", 0.5),
        ("-1.", -1.0),
        ("12", 12),
        ("012", 12),
        ("0x1F", 31),
        ("0o17", 15),
        ("true", True),
        ("False", False),
        ("no", "no"),
        ("on", "on"),
        ("Yes", "Yes"),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("2020-01-01", "2020-01-01"),
        ("'12'", "12"),
        ("~", None),
        ("", None),
        ("null", None),
        ("!!str 12", "12"),
        ("!!float 12", 12.0),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text: str, value: Any) -> None:
    tree = parse(f"a: {text}", "x", pytest.fail)
    assert tree is not None
    got = tree.plain()["a"]
    assert got == value and type(got) is type(value)


def test_whole_floats_are_integers_and_integers_are_floats_where_wanted(toys: Path) -> None:
    cfg = config.load(stack({"gla": {"rate": 2}}, run={"tokens": 1e9}))
    assert cfg.run.tokens == 10**9 and type(cfg.run.tokens) is int
    assert type(params(stack({"gla": {"rate": 2}}))["rate"]) is float
    digits = "9" * 5000
    Path("x.yaml").write_text(f"dim: {digits}\nstack: [mlp]")
    assert errors("x.yaml")[0].startswith("x.yaml:1:6 dim: want int, got '999")


# ----------------------------------------------------------------------------- defaults and composites


def test_defaults_lie_under_a_block_and_under_those_inside_a_composite(toys: Path) -> None:
    source = stack(
        "gla",
        {"gla": {"heads": 8}},
        "pair",
        {"pair": {"gla": {"heads": None}, "mlp": None}},
        "mlp",
        defaults={"gla": {"heads": 2, "rate": 0.5}, "pair": {"gla": {"rate": 0.25}}},
    )
    assert params(source, 0) == {"heads": 2, "rate": 0.5}
    assert params(source, 1) == {"heads": 8, "rate": 0.5}
    assert params(source, 2) == {"gla": {"heads": 2, "rate": 0.25}}
    # null drops the default's key (back to the signature's), but is a value where the type admits it
    assert params(source, 3) == {"gla": {"heads": 4, "rate": 0.25}, "mlp": None}
    assert params(source, 4) == {}


def test_defaults_reach_quantizers_and_heads(toys: Path) -> None:
    shells = [
        {"name": "s1", "body": ["mlp"], "to": 8},
        {"name": "s2", "body": ["mlp"], "to": 8, "quant": None},
    ]
    source = stack(
        {"onion": shells},
        defaults={"int8": {"bits": 4}, "mlp": {"mult": 3}},
        heads={"next": {"ffn": {"act": "gelu"}}},
    )
    cfg = config.load(source)
    onion = cfg.stack[0]
    assert isinstance(onion, OnionNode)
    assert [s.quant for s in onion.onion] == [QuantSpec("int8", {"bits": 4}), QuantSpec("none")]
    assert cfg.heads["next"].ffn == {"act": "gelu", "mult": 3.0}


def test_a_block_is_asked_about_the_width_where_it_stands(toys: Path) -> None:
    inner = [
        {"name": "s1", "body": ["gla"], "to": 8},
        {"name": "s2", "body": ["gla"], "to": 8, "width": 30},
        {"name": "s3", "body": ["gla"], "to": 8},
    ]
    assert errors(stack({"onion": inner}, "gla")) == [
        "<mapping> stack[0].onion[1].body[0].gla: heads=4 does not divide 30",
        "<mapping> stack[0].onion[2].body[0].gla: heads=4 does not divide 30",
    ]
    assert errors({"dim": 30.0, "stack": ["gla"]}) == ["<mapping> stack[0].gla: heads=4 does not divide 30"]
    assert errors({"dim": True, "stack": ["gla"]}) == ["<mapping> dim: want int, got true"]


def test_marks_say_where_a_node_was_written(toys: Path) -> None:
    Path("x.yaml").write_text("dim: 64\nstack:\n  - mlp\n  - gla: {heads: 2}\n")
    first, second = config.load("x.yaml").stack
    assert (str(first.mark), str(second.mark)) == ("x.yaml:3:5 stack[0].mlp", "x.yaml:4:5 stack[1].gla")


def test_a_new_form_is_one_dataclass(toys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kinds.FORMS, "wrap", WrapNode)
    (node,) = config.load(stack({"wrap": {"by": "patch", "inner": ["mlp", ["gla"]]}})).stack
    assert isinstance(node, WrapNode)
    assert node.wrap.inner == [BlockNode("mlp"), BlockNode("gla")]
    assert errors(stack({"wrap": {"by": "path", "inner": ["mlq"]}})) == [
        "<mapping> stack[0].wrap.by: want one of 'mod', 'patch', got 'path'; did you mean 'patch'?",
        "<mapping> stack[0].wrap.inner[0]: no block called 'mlq'; did you mean 'mlp'?",
    ]


@dataclass(frozen=True)
class WrapSpec:
    by: Literal["mod", "patch"]
    inner: list[Node]


@dataclass(frozen=True)
class WrapNode:
    wrap: WrapSpec
