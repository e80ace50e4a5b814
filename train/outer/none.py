"""The outer loop that does nothing: plain, or data-parallel, training; and what every outer loop offers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Place(NamedTuple):
    """Where the next step is: its part of the data, and its step in the data order and the schedule."""

    part: int
    step: int


def never() -> bool:
    return False


class NoOuter:
    """The interface of the outer loops, and nothing behind it."""

    def begin(self, state: Any, stopping: Callable[[], bool] = never) -> None:
        """Before the first step, and after a resume: meet the others. Raises UserError.

        stopping: whether this worker has been told to stop; for one that waits alone, here and later.
        """

    def place(self, step: int) -> Place:
        """The place of this worker's next step, `step` being the number of those behind it."""
        return Place(0, step)

    def maybe_sync(self, state: Any) -> None:
        """Called after every inner step; may replace the model's parameters."""

    def finished(self, state: Any) -> bool:
        """Whether the run has had all its steps."""
        return state.step >= state.schedule.total

    def plateau(self, state: Any, reached: bool) -> None:
        """This worker's plateau rule has spoken: the decay begins, where others have no say in it."""
        if reached:
            state.schedule.start_decay(state.step)

    def agree(self, stopping: bool) -> bool:
        """Whether to stop now, when this worker would like to."""
        return stopping

    def tell(self, **report: Any) -> None:
        """What was logged last: loss, tokens_per_s; for those who watch."""

    def report(self) -> dict[str, Any]:
        """What a log line says about the outer loop."""
        return {}

    def close(self) -> None:
        """Leave the others."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            raise ValueError(f"outer state {sorted(state)} belongs to another outer loop than 'none'")
