"""`train/pretrain.py` in double precision, for tests that ask whether a difference is rounding.

python tests/train/pretrain64.py OPTIONS OF pretrain.py
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])

import model  # noqa: E402
from model.lm import LanguageModel  # noqa: E402
from train.pretrain import main  # noqa: E402

build = model.build


def double(*args: Any, **options: Any) -> LanguageModel:
    return build(*args, **options).double()


if __name__ == "__main__":
    model.build = double
    sys.exit(main())
