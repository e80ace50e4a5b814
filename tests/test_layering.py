"""Imports run one way. Every Python file is parsed; nothing is executed.

The rules are data (`LAYERS`, `THIRD_PARTY`, ...); `violations(root)` applies them to any tree, so the last
tests run it on small made-up trees that break one rule each and must be found out.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("model", "train", "dataset", "experiments")
MAX_FILE, MAX_FUNCTION = 400, 60

# What a layer may import from our own packages, beyond itself. The longest matching prefix of a module's
# name is its layer: a model module that is not named here (lm, heads, embed, describe, grow, generate and
# what they are split into) belongs to the layer "model", above plan and blocks and below compress.
# A facade (`model`, `model.__main__`, ...) may import all of its package.
_BASE = {"model.docs", "model.core", "model.registry", "model.ops"}
_PLAN = {
    "model.docs",
    "model.core",
    "model.registry",
    "model.grammar",
    "model.schema",
    "model.sections",
    "model.config",
    "model.items",
    "model.plan",
}
LAYERS: dict[str, set[str]] = {
    "model.docs": set(),
    "model.core": {"model.docs"},
    "model.ops": set(),
    "model.registry": set(),
    "model.blocks": _BASE,
    "model.quant": _BASE,
    "model.wraps": {*_BASE, "model.quant"},
    "model.grammar": set(),
    "model.schema": _PLAN,
    "model.sections": _PLAN,
    "model.config": _PLAN,
    "model.items": _PLAN,
    "model.plan": _PLAN,
    "model.compress": {*_BASE, "model.blocks", "model.hub.packaged"},
    "model": set(),
    "dataset": set(),
    "dataset.score": {"dataset", "model"},
    "dataset.continuation": {"dataset", "model"},
    "train": {"model", "dataset"},
    "experiments": {"model", "train", "dataset"},
}
ABOVE = {"model": "model.compress"}  # parts of a layer's own package that it may not import

# Third-party packages that only some places may import.
GPU = {"triton", "mamba_ssm", "causal_conv1d", "flash_attn", "fla", "cupy", "thunderkittens"}
ONLY: dict[str, set[str]] = {
    "model.docs": {"torch"},
    "model.core": {"torch"},
    "model.ops": {"torch"} | GPU,
    "model.registry": set(),
}
PLACES: dict[str, tuple[str, ...]] = {
    **{name: ("model.ops",) for name in GPU},
    "cupy": ("model.ops", "train.outer.arrays"),
    "torch": ("model", "train", "experiments", "dataset.loader", "dataset.score", "dataset.continuation"),
    "transformers": (
        "model.compress.decoder",
        "model.hub",
        "model.embed",
        "dataset.tokenizers",
        "dataset.score",
        "dataset.continuation",
        "experiments",
    ),
}


@dataclass(frozen=True)
class Import:
    """One import: the dotted name, its line, and whether it waits inside a function."""

    name: str
    line: int
    lazy: bool


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(tree: ast.Module, module: str, is_package: bool) -> list[Import]:
    """Every import that can run; blocks under `if TYPE_CHECKING` cannot."""
    found: list[Import] = []

    def visit(node: ast.AST, lazy: bool) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            for child in node.orelse:
                visit(child, lazy)
            return
        if isinstance(node, ast.Import):
            found.extend(Import(a.name, node.lineno, lazy) for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = module.split(".")
                up = up[: len(up) - node.level + (1 if is_package else 0)]
                base = ".".join([*up, base] if base else up)
            found.extend(Import(f"{base}.{a.name}", node.lineno, lazy) for a in node.names)
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, lazy or inside)

    visit(tree, False)
    return found


def under(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def layer_of(module: str) -> str | None:
    return max((p for p in LAYERS if under(module, p)), key=len, default=None)


def check_import(module: str, imp: Import, known: set[str]) -> str | None:
    """The sentence that says what is wrong with this import, or None."""
    top = imp.name.split(".")[0]
    if top in PACKAGES:
        target = resolve(imp.name, known) or imp.name
        mine = layer_of(module) or module
        facade = module in PACKAGES or module.endswith("__main__")
        own = module.split(".")[0] if facade else mine
        allowed = LAYERS[mine] | {own} if mine in LAYERS else {own}
        if target == "model" and mine.startswith("model."):
            return f"imports the facade {imp.name!r}: import the module itself"
        above = "" if facade else ABOVE.get(mine, "")
        if not any(under(target, a) for a in allowed) or (above and under(target, above)):
            return f"imports {target!r}; layer {mine!r} may import {sorted(allowed)}"
        return None
    if top in sys.stdlib_module_names:
        return None
    for prefix, allowed in ONLY.items():
        if under(module, prefix) and top not in allowed:
            return f"imports {top!r}; {prefix!r} may import the standard library and {sorted(allowed)}"
    if top in PLACES and not any(under(module, p) for p in PLACES[top]):
        return f"imports {top!r}, which belongs to {', '.join(PLACES[top])} alone"
    if top in GPU and not imp.lazy:
        return f"imports the GPU package {top!r} when loaded: do it inside the function that needs it"
    return None


def resolve(name: str, known: set[str]) -> str | None:
    """The module that an imported dotted name lives in."""
    while name:
        if name in known:
            return name
        name = name.rpartition(".")[0]
    return None


def find_cycle(graph: dict[str, set[str]]) -> list[str] | None:
    """One circle of modules, or None (depth-first, three colours)."""
    done: set[str] = set()
    path: list[str] = []

    def visit(node: str) -> list[str] | None:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return None
        path.append(node)
        for nxt in sorted(graph.get(node, ())):
            circle = visit(nxt)
            if circle:
                return circle
        path.pop()
        done.add(node)
        return None

    for node in sorted(graph):
        circle = visit(node)
        if circle:
            return circle
    return None


def python_files(root: Path, packages: tuple[str, ...]) -> Iterator[Path]:
    for package in packages:
        if (root / package).is_dir():
            yield from sorted((root / package).rglob("*.py"))


def violations(root: Path) -> list[str]:
    """All broken import rules of the tree at `root`, one sentence each, with file and line."""
    files = list(python_files(root, PACKAGES))
    known = {module_name(f, root) for f in files}
    out: list[str] = []
    graph: dict[str, set[str]] = {}
    for file in files:
        module = module_name(file, root)
        edges = graph.setdefault(module, set())
        for imp in imports_of(ast.parse(file.read_text()), module, file.name == "__init__.py"):
            problem = check_import(module, imp, known)
            if problem:
                out.append(f"{file.relative_to(root)}:{imp.line}: {module} {problem}")
            target = resolve(imp.name, known)
            # A lazy import cannot make a circle at load time, and `from . import x` is no edge to self.
            if target and target != module and not imp.lazy:
                edges.add(target)
    circle = find_cycle(graph)
    if circle:
        out.append("imports run in a circle: " + " -> ".join(circle))
    return out + shadowing(root)


def shadowing(root: Path) -> list[str]:
    """A script in train/ puts train/ first on sys.path: its files must not hide other modules."""
    out = []
    for entry in sorted((root / "train").glob("*")) if (root / "train").is_dir() else []:
        if entry.suffix not in ("", ".py") or entry.name.startswith("__"):
            continue
        if entry.stem in sys.stdlib_module_names or entry.stem in (*PACKAGES, "torch", "numpy", "yaml"):
            out.append(f"train/{entry.name}: hides the module {entry.stem!r} from torchrun train/pretrain.py")
    return out


def oversized(root: Path) -> list[str]:
    """Files and functions that are too long to read."""
    out = []
    for file in python_files(root, (*PACKAGES, "tests")):
        text = file.read_text()
        where = file.relative_to(root)
        n = len(text.splitlines())
        if n > MAX_FILE:
            out.append(f"{where}: {n} lines, at most {MAX_FILE}")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                n = (node.end_lineno or node.lineno) - node.lineno + 1
                if n > MAX_FUNCTION:
                    out.append(f"{where}:{node.lineno}: {node.name} has {n} lines, at most {MAX_FUNCTION}")
    return out


def test_imports_run_one_way() -> None:
    assert not (found := violations(ROOT)), "\n" + "\n".join(found)


def test_files_and_functions_stay_short() -> None:
    assert not (found := oversized(ROOT)), "\n" + "\n".join(found)


def test_every_part_is_there() -> None:
    """The rules above would hold vacuously on an empty tree."""
    known = {module_name(f, ROOT) for f in python_files(ROOT, PACKAGES)}
    assert {"model.core", "model.registry", "train", "dataset", "experiments"} <= known


GOOD = {
    "model/core.py": "import torch\n",
    "model/registry.py": "import difflib\n",
    "model/ops/scan.py": "import torch\ndef f():\n    import triton\n",
    "model/blocks/a.py": "from model.core import Block\nfrom model.ops import scan\n",
    "model/plan.py": "from model import core\n",
    "model/lm.py": "from model.plan import Plan\nfrom .blocks import a\nfrom model.combine import Residual\n",
    "model/combine.py": "from model.core import Block\n",
    "model/compress/wrap.py": "from model.blocks import a\n",
    "model/__init__.py": "from model.lm import LanguageModel\n",
    "train/loop.py": "from model import lm\nimport dataset\n",
    "dataset/format.py": "import numpy\n",
    "dataset/loader.py": "import torch\n",
    "experiments/run.py": "from train import loop\nimport model\n",
}
BAD = {
    "core imports a block": ("model/core.py", "from model.blocks import a\n"),
    "core imports numpy": ("model/core.py", "import numpy\n"),
    "ops import core": ("model/ops/scan.py", "from model.core import Block\n"),
    "relative import upward": ("model/blocks/a.py", "from ..lm import LanguageModel\n"),
    "block uses the facade": ("model/blocks/a.py", "import model\n"),
    "heads import compress": ("model/heads.py", "def f():\n    from model.compress import wrap\n"),
    "compress imports lm": ("model/compress/wrap.py", "from model.lm import LanguageModel\n"),
    "plan imports a block": ("model/plan.py", "import model.blocks.a\n"),
    "upward inside a function": ("model/core.py", "def f():\n    import model.lm\n"),
    "model imports train": ("model/lm.py", "from train.loop import fit\n"),
    "dataset imports torch": ("dataset/format.py", "import torch\n"),
    "dataset imports model": ("dataset/format.py", "import model\n"),
    "train imports experiments": ("train/loop.py", "import experiments\n"),
    "GPU package when loaded": ("model/ops/scan.py", "import triton\n"),
    "GPU package outside ops": ("model/lm.py", "def f():\n    import mamba_ssm\n"),
    "transformers anywhere": ("model/lm.py", "import transformers\n"),
    "circle": ("model/plan.py", "from model.config import x\n"),
    "standard-library name": ("train/queue.py", "x = 1\n"),
    "hides a package": ("train/dataset.py", "x = 1\n"),
}


def make_tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_a_good_tree_passes(tmp_path: Path) -> None:
    assert violations(make_tree(tmp_path, GOOD)) == []


@pytest.mark.parametrize("case", BAD)
def test_a_bad_tree_is_found_out(case: str, tmp_path: Path) -> None:
    name, text = BAD[case]
    files = {**GOOD, "model/config.py": "from model.plan import Plan\n", name: text}
    assert any(name in v or "circle" in v for v in violations(make_tree(tmp_path, files)))


def test_type_checking_imports_are_free(tmp_path: Path) -> None:
    text = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from model.lm import LanguageModel\n"
    assert violations(make_tree(tmp_path, {**GOOD, "model/core.py": text})) == []


def test_long_files_and_functions_are_found_out(tmp_path: Path) -> None:
    long_function = "def f():\n" + "    x = 1\n" * MAX_FUNCTION
    files = {"model/a.py": "x = 1\n" * (MAX_FILE + 1), "train/b.py": long_function}
    found = oversized(make_tree(tmp_path, files))
    assert len(found) == 2 and "model/a.py" in found[0] and "train/b.py:1: f" in found[1]
