"""What the architecture page shows can be built: every list of a stack in it, at one width."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from model import config
from model.describe import describe

PAGE = Path(__file__).resolve().parents[2] / "model" / "README.md"
STACKS = [text for text in re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.S) if text.startswith("- ")]


def test_the_page_shows_stacks() -> None:
    assert len(STACKS) >= 6


@pytest.mark.parametrize("text", STACKS, ids=lambda text: text.split("\n")[0][:40])
def test_a_stack_of_the_page_is_described(text: str) -> None:
    shown = describe(config.load({"dim": 384, "stack": yaml.safe_load(text)}), vocab=100, context=256)
    assert shown.total("flops") > 0
