"""The outer loop that does nothing: plain, or data-parallel, training."""

from __future__ import annotations

from typing import Any


class NoOuter:
    """What every outer loop of the DiLoCo family offers, and nothing behind it."""

    def maybe_sync(self, state: Any) -> None:
        """Called after every inner step; may replace the model's parameters."""

    def boundary(self, step: int) -> bool:
        """Whether a stage may end, or a model grow, after this many steps."""
        return True

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            raise ValueError(f"outer state {sorted(state)} belongs to another outer loop than 'none'")
