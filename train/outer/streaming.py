"""Streaming DiLoCo (2501.18512): fragments that travel while training goes on.

Fragment p of P is sent every H steps, at steps ≡ pH/P (mod H). Its mean arrives τ steps later:

    step t:      Δ_p = θ_p^outer - θ_p                  sent in the background
    step t + τ:  θ_p^outer <- Outer(θ_p^outer, mean Δ_p)
                 θ_p <- α θ_p + (1 - α) θ_p^outer

P = 1, τ = 0, α = 0 is DiLoCo to the bit; α = 1 trains as if nobody had spoken. After the last step of a run
every fragment is exchanged once more and taken over whole, so that a stage ends (and grows) on all workers
from the same parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from train.outer import layout
from train.outer.arrays import Array
from train.outer.lockstep import Heard, Lockstep

Job = Future[tuple[Heard, Array]]  # (what the roll call says, the mean)


class Streaming(Lockstep):
    """Exchanges run in one thread of their own, in the order of steps, which is the same on all workers."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._thread = ThreadPoolExecutor(1, "outer")
        self._pending: dict[int, tuple[int, Job]] = {}  # fragment: (step when due, job)
        count = sum(not r.fragment.plain for r in self.replicas)
        every = self.config.every
        # Statistics go along with the first fragment.
        self._offsets = [0 if r.fragment.plain else i * every // count for i, r in enumerate(self.replicas)]

    def maybe_sync(self, state: Any) -> None:
        """Called after every inner step. Raises UserError when replicas differ."""
        step, config = state.step, self.config
        if step < state.schedule.total:
            for i in [i for i, at in enumerate(self._offsets) if step % config.every == at]:
                self._start(i, state, step + config.overlap)
            for i in [i for i, (due, _) in self._pending.items() if due <= step]:
                self._finish(i, state, config.blend)
        if step == state.schedule.total:  # also when a plateau without a decay was heard of just now
            self._close(state)

    def _start(self, i: int, state: Any, due: int) -> None:
        """Roll call and exchange run in the background: on a slow line even the first takes its time."""
        r = self.replicas[i]
        card, delta = self.card(state), r.delta()

        def job() -> tuple[Heard, Array]:
            return self.compare(card), r.channel.mean(delta)

        self._pending[i] = due, self._thread.submit(job)
        self.traffic.rounds += 1

    def _finish(self, i: int, state: Any, alpha: float) -> None:
        r, (_, job) = self.replicas[i], self._pending.pop(i)
        heard, mean = job.result()
        self.stopped |= self.hear(state, heard)
        r.step(mean)
        r.adopt(alpha)

    def _close(self, state: Any) -> None:
        """The end of a run: what is under way arrives, then every fragment once more, taken over whole."""
        for i in list(self._pending):
            self._finish(i, state, self.config.blend)
        for i in range(len(self.replicas)):
            self._start(i, state, state.step)
            self._finish(i, state, 1.0 if self.config.blend == 1 else 0.0)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _own_state(self) -> dict[str, Any]:
        """Waits for what is under way: a mean that has arrived and is not yet due is saved.

        A wish to stop that came with it is not: it was meant for the run that ends here.
        """
        pending = {}
        for i, (due, job) in self._pending.items():
            heard, mean = job.result()
            pending[str(i)] = {"due": due, "plateau": heard.plateau, "mean": layout.saved(mean)}
        return {**super()._own_state(), "pending": pending}

    def _load_own(self, state: Mapping[str, Any]) -> None:
        super()._load_own(state)
        for i, entry in state["pending"].items():
            done: Job = Future()
            mean = layout.restored(entry["mean"], self.replicas[int(i)].outer)
            done.set_result((Heard(stop=False, plateau=bool(entry["plateau"])), mean))
            self._pending[int(i)] = int(entry["due"]), done
