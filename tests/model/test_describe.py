"""`model show`: its numbers are those of the real model; its forms are well-formed; its errors are lines."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import model
from model import config
from model.__main__ import main
from model.config import sources
from model.core import state_bytes
from model.describe import Description, describe, diagram, fold, mermaid, si, size_of
from model.hub import pretrained_rows, table_shape
from model.hub.sources import PACKAGE_SHAPES

BLOCKS: dict[str, Any] = {
    "mamba2": {"state": 8, "head_dim": 16},
    "swa": {"head_dim": 16, "group": 2, "window": 8},
    "mlp": {"act": "swiglu", "mult": 2},
}
SHELLS: list[dict[str, Any]] = [
    {"name": "s1", "body": ["samba"], "to": 16, "quant": "int8", "frozen": True},
    {"name": "s2", "body": ["samba"], "to": 8, "width": 32, "quant": {"fsq": {"levels": 4}}},
]
HEADS = {"next": {"shift": 1}, "recon": {"shift": 0, "ffn": {"act": "rwkv"}}}


def tiny(*stack: Any, **rest: Any) -> dict[str, Any]:
    return {"dim": 32, "vocab": 64, "defaults": BLOCKS, "stack": list(stack), "heads": HEADS, **rest}


def onion(**inner: Any) -> dict[str, Any]:
    return tiny({"onion": [SHELLS[0], {**SHELLS[1], "blend": {"steps": 5}, **inner}]})


CASES = {
    "plain": tiny({"repeat": 3, "of": ["mamba2", "mlp", "swa", "mlp"]}),
    "attention": tiny("attention", "mlp", defaults={"attention": {"head_dim": 16}}),
    "tied": tiny({"repeat": 3, "of": ["swa", "mlp"], "tied": True}),
    "used": tiny({"mlp": {}, "as": "m"}, "swa", {"use": "m"}),
    "onion": onion(),
    "merge": onion(merge=4, residual=True),
    "untied": onion(tie=False),
}


def of(source: Any, **options: Any) -> Description:
    return describe(config.load(source), **options)


# ----------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("case", CASES)
def test_parameters_and_flops_are_those_of_the_model(case: str) -> None:
    lm = model.build(CASES[case])
    found = of(CASES[case], context=64)
    counts = found.parameters()
    assert counts["total"] == sum(p.numel() for p in lm.parameters()) == found.total("parameters")
    assert counts["trained"] == sum(p.numel() for p in lm.parameters() if p.requires_grad)
    assert counts["trained"] + counts["frozen"] == counts["total"]
    assert found.total("training") == pytest.approx(lm.flops_per_token(64))
    assert 0 < found.total("flops") < found.total("training")


@pytest.mark.parametrize("case", CASES)
def test_state_bytes_are_those_of_a_state(case: str) -> None:
    """After 64 tokens of one row, with room for just those."""
    lm = model.build(CASES[case]).eval()
    tokens = torch.randint(0, 64, (1, 64))
    out = lm(tokens, state=lm.init_state(1, capacity=64))
    assert of(CASES[case]).state_bytes(64) == state_bytes(out.state)


def test_a_second_visit_is_shared_and_counts_no_parameters() -> None:
    sites = {site.site: site for site in of(CASES["onion"]).sites}
    first, second = sites["s1.in.s1_0_samba"], sites["s1.out.s1_0_samba"]
    assert first.parameters > 0 and not first.shared and first.frozen
    assert second.parameters == 0 and second.shared and second.notes == ("shared", "frozen")
    assert first.flops == second.flops and first.state_fixed == second.state_fixed > 0
    assert "blended in over 5 steps" in sites["s2.adapter"].notes
    tied = [site for site in of(CASES["tied"]).sites if site.block == "swa"]
    assert [site.shared for site in tied] == [False, True, True]


def test_bits_are_counted_per_token_outside() -> None:
    plain, merged = of(CASES["onion"]).json(), of(CASES["merge"]).json()
    assert plain["bits_per_token"] == {"s1.quant": 128.0, "s2.quant": 16.0}
    assert merged["bits_per_token"] == {"s1.quant": 128.0, "s2.quant": 4.0}
    adapter = next(site for site in merged["sites"] if site["site"] == "s2.adapter")
    assert adapter["shape"] == "16 → 32, T/4"
    assert adapter["notes"] == ("residual: the outer code bypasses it", "blended in over 5 steps")


@pytest.mark.parametrize("path", sorted(sources.ARCHS.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_arch_is_described_without_its_weights(path: Path) -> None:
    found = of(path)
    assert all(p.device.type == "meta" for name, p in found.lm.bank.named_parameters())
    assert found.total("parameters") == found.parameters()["total"] > 1e6
    assert found.parameters()["trained"] > 1e5
    json.dumps(found.json(), allow_nan=False)
    assert mermaid(found).startswith("flowchart TD\n")


def test_the_vocabulary_is_the_datasets_and_a_missing_source_is_noted(tmp_path: Path) -> None:
    source = tiny("mlp", vocab=None)
    assert of(source).notes == ("vocab: 49152 is assumed; a dataset decides (--vocab N)",)
    assert of(source, vocab=100).lm.vocab == 100 and of(source, vocab=100).notes == ()
    gone = tiny("mlp", embed={"from": "no/such-model", "project": 32})
    assert of(gone).notes == ("embed.from: no/such-model is not here; its rows count as 32 wide",)
    (tmp_path / "model.safetensors").write_bytes(b"x" * 99)
    with pytest.raises(model.ConfigError, match=r"embed\.from: .*cannot be read"):
        of(tiny("mlp", embed={"from": str(tmp_path)}))
    with pytest.raises(model.ConfigError, match="vocab: 64, but the dataset's tokenizer has 100"):
        of(tiny("mlp"), vocab=100)
    with pytest.raises(ValueError, match="context: want at least 1"):
        of(source, context=0)


def test_pretrained_rows_count_at_their_own_width() -> None:
    source = tiny("mlp", vocab=None, embed={"from": "smollm2-135m-instruct", "frozen": True, "project": 32})
    found = of(source, vocab=1000)
    assert found.parameters()["embedding"] == 1000 * 576 + 576 * 32
    assert found.sites[0].shape == "1000 × 576 → 32"
    assert found.sites[0].notes == ("rows of smollm2-135m-instruct", "rows frozen", "tied to the logits")


@pytest.mark.slow
def test_hub_the_packaged_table_has_the_shape_that_is_written_down() -> None:
    for name, shape in PACKAGE_SHAPES.items():
        assert tuple(pretrained_rows(name).shape) == shape == table_shape(name)


# ----------------------------------------------------------------------------- forms


@given(st.lists(st.integers(0, 2), max_size=14))
def test_fold_loses_nothing(items: list[int]) -> None:
    runs = fold(items)
    assert [x for n, group in runs for x in n * group] == items


@given(st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True), st.integers(2, 6))
def test_fold_finds_what_repeats(group: list[int], n: int) -> None:
    assert fold([*(group * n), -1]) == [(n, group), (1, [-1])]


INNER = "s2.adapter> s2.samba s2.fsq> <s2.fsq s2.samba <s2.adapter"
DIAGRAMS = {
    "plain": "embed 3×(mamba2 mlp swa mlp) heads",
    "used": "embed m swa m heads",
    "tied": "embed 3×(swa mlp) heads",
    "onion": f"embed* s1.samba* s1.int8*> {INNER} <s1.int8* s1.samba* heads",
    "merge": f"embed* s1.samba* s1.int8*> +( {INNER} ) <s1.int8* s1.samba* heads",
}


@pytest.mark.parametrize("case", DIAGRAMS)
def test_the_diagram_is_one_line(case: str) -> None:
    assert diagram(of(CASES[case]).lm) == DIAGRAMS[case]


def test_whole_reading_turns_the_bracket_round() -> None:
    shells = [SHELLS[0], {k: v for k, v in SHELLS[1].items() if k != "width"}]
    found = of(tiny({"onion": shells, "reading": "whole"}))
    assert "s1.int8*> <s1.int8* s2.samba s2.fsq> <s2.fsq s2.samba s1.int8*> <s1.int8*" in diagram(found.lm)
    (turned,) = [site for site in found.sites if "exit first, then enter" in site.notes]
    assert turned.shared and turned.parameters == 0


@pytest.mark.parametrize("case", CASES)
def test_mermaid_is_well_formed(case: str) -> None:
    lines = mermaid(of(CASES[case])).splitlines()
    nodes = [m.group(1) for line in lines if (m := re.match(r'\s*(n\d+)\["[^"]*"\](:::frozen)?$', line))]
    edges = [m.groups() for line in lines if (m := re.match(r"\s*(n\d+) (?:-->|-\.->) (n\d+)$", line))]
    opened = sum(line.strip().startswith("subgraph") for line in lines)
    closed = sum(line.strip() == "end" for line in lines)
    assert opened == closed and len(nodes) == len(set(nodes))
    assert len(lines) == 2 + len(nodes) + len(edges) + opened + closed
    assert {n for edge in edges for n in edge} == set(nodes)
    assert {b for _, b in edges} == set(nodes) - {"n0"}  # everything is reached from the embedding


def test_units() -> None:
    shown = {0: "0", 999: "999", 1240: "1.24k", 999_400: "999k", 999_600: "1M", 1e6: "1M", 2.5e12: "2.5T"}
    assert {x: si(x) for x in shown} == shown
    assert [size_of(x) for x in (12, 2048, 1023 * 2**10, 3 * 2**20)] == ["12 B", "2 KiB", "1023 KiB", "3 MiB"]


# ----------------------------------------------------------------------------- command line


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = main(argv)
    out, err = capsys.readouterr()
    return code, out, err


def test_show_folds_what_repeats(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "show", "llama", "--set", "stack.repeat=5", "--context", "128")
    assert (code, err) == (0, "")
    assert "5 ×  b0_attention" in out and "b2_attention" not in out
    assert "at context 128" in out and not any(line != line.rstrip() for line in out.splitlines())
    _, expanded, _ = run(capsys, "show", "llama", "--set", "stack.repeat=5", "--expand")
    assert "b8_attention" in expanded and "×  b0" not in expanded


def test_show_as_json_holds_a_config_that_loads(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "show", "llama", "--json", "--set", "dim=192", "--vocab", "300")
    data = json.loads(out)
    assert data["vocab"] == 300 and data["dim"] == 192
    assert config.digest(config.load(data["config"])) == data["digest"]
    assert sum(site["parameters"] for site in data["sites"]) == data["parameters"]["total"]


def test_show_refuses_with_lines_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "show", "llama", "--set", "dimm=3", "--set", "run.steps=x")
    assert (code, out) == (2, "")
    assert err == "--set #1: unknown key 'dimm'; did you mean 'dim'?\n--set #2 run.steps: want int, got 'x'\n"
    code, _, err = run(capsys, "show", "lamma")
    assert code == 2 and "did you mean 'llama'?" in err and err.count("\n") == 1
    code, _, err = run(capsys, "show", "llama", "--set", "stack.0.of.0.attention.head_dim=7")
    assert code == 2 and err.startswith("--set #1 stack[0].of[0].attention: dim=576 is not a multiple")


@pytest.mark.parametrize("argv", [("show",), ("show", "llama", "--context", "0"), ("shwo",), ()])
def test_a_wrong_command_line_exits_with_2(argv: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2 and "usage: python -m model" in capsys.readouterr().err


def test_help_has_examples_that_run(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    lines = [
        line.split("> ")[0] for line in capsys.readouterr().out.splitlines() if "python -m model s" in line
    ]
    assert len(lines) >= 4
    for line in lines[1:]:
        assert run(capsys, *line.split()[3:])[0] == 0


def test_backends_says_which_and_why_not(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "backends")
    rows = [line.split(None, 2) for line in out.splitlines()]
    assert code == 0
    assert re.search(r"^attention +flash_attn +no: ", out, re.M) or torch.cuda.is_available()
    assert sum(row[:1] == ["reference"] and row[-1] == "yes" for row in rows) >= 3


def test_a_closed_pipe_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert main(["show", "llama", "--json"]) == 0
