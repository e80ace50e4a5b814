"""Any arch at a small width: the same grammar, narrow and shallow.

`small(name)` reads an arch of model/archs/ and gives a mapping for `model.build`: widths, windows, heads and
repeats are cut down, pretrained rows are left out, everything else is as it stands.
"""

from __future__ import annotations

from typing import Any

from model import config
from model.config.sources import ARCHS

NAMES = sorted(path.stem for path in ARCHS.glob("*.yaml"))
WIDTH, VOCAB = 32, 61
# Keys of the grammar and of blocks whatever their place: the largest value that is left of them.
CAPS = {
    "repeat": 2, "head_dim": 8, "window": 7, "state": 8, "multiple_of": 8, "channels": 8, "to": 8,
    "block": 4, "stride": 2, "pool": 4, "every": 6, "recent": 5, "slots": 4, "keep_last": 5,
}  # fmt: skip


def small(name: str) -> dict[str, Any]:
    """The arch as a mapping, WIDTH wide over VOCAB tokens."""
    data = config.dump(config.load(name))
    kept = {key: data[key] for key in ("stack", "heads")}
    out: dict[str, Any] = {"name": name, "dim": WIDTH, "vocab": VOCAB, **_cut(kept)}
    return out


def _cut(data: Any) -> Any:
    if isinstance(data, list):
        return [_cut(item) for item in data]
    if not isinstance(data, dict) or data.get("kind") == "single":  # a head's keys for other kinds
        return data
    out = {}
    for key, value in data.items():
        if key == "width" and isinstance(value, int):
            value = WIDTH if value < 400 else WIDTH + 16
        elif key == "group" and isinstance(value, int):
            value = 2 if value > 1 else 1
        elif key in CAPS and isinstance(value, int) and not isinstance(value, bool):
            value = min(value, CAPS[key])
        out[key] = _cut(value)
    return out
