"""The block in model/README.md is what it says: it registers, and obeys every law."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from model.registry import BLOCKS
from tests.laws import laws_time, laws_training  # noqa: F401 - they register the laws
from tests.laws.harness import LAWS, Case

PAGE = Path(__file__).resolve().parents[2] / "model" / "README.md"


@pytest.fixture(scope="module")
def ema(tmp_path_factory: pytest.TempPathFactory):
    """The example's module, imported from a file of its own; the name is free again afterwards."""
    found = re.search(r"## Adding a block.*?```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    file = tmp_path_factory.mktemp("readme") / "ema_of_the_readme.py"
    file.write_text(found[1], encoding="utf-8")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    BLOCKS.names()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, file.stem, module)
        spec.loader.exec_module(module)
        yield found[1]
    BLOCKS._classes.pop("ema", None)


def test_the_example_is_short(ema: str) -> None:
    body = ema[ema.index("@block") :]
    assert sum(bool(line.strip()) for line in body.splitlines()) <= 30


@pytest.mark.parametrize("law", LAWS)
def test_the_example_obeys(law: str, ema: str) -> None:
    LAWS[law](Case("ema", dim=8, T=12))
