"""What diloco and streaming share: replicas of the outer parameters, and a roll call before each exchange.

Shape legend: N values of a fragment  k workers.

Every worker keeps the outer parameters and their momentum itself and applies the same step to them, so
nothing but deltas travels. The roll call compares what must be equal: the outer parameters' hash, the step,
the length of the run, and at the start the plan, the data and the code. It also says who wants to stop, and
whether worker 0 has found a plateau: what only one of them knows, all do at the same step.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from model.sections import OuterConfig
from train.errors import UserError
from train.outer import arrays, codec, layout, rules
from train.outer.arrays import Array
from train.outer.exchange import Channel, Comm, Traffic
from train.outer.layout import Fragment
from train.outer.none import NoOuter, Place, never
from train.outer.rules import PLAIN, Step
from train.sharding import any_sharded
from train.world import World

CARD = 512  # bytes of a roll-call card


class Replica:
    """One fragment: the tensors trained here, the outer parameters all workers agree on, their momentum."""

    def __init__(self, fragment: Fragment, comm: Comm, config: OuterConfig, traffic: Traffic) -> None:
        self.fragment, self.offload = fragment, config.offload
        self.rule = PLAIN if fragment.plain else Step(config.lr, config.momentum, config.nesterov)
        wire = codec.make("fp32" if fragment.plain else config.codec, config.density)
        self.channel = Channel(fragment.size, comm, wire, config.feedback, traffic)
        self.outer: Array = fragment.get(self.offload)
        self.m: Array | None = None
        self.dropped = 0

    def delta(self) -> Array:
        """θ_outer - θ_local; zero, and counted, when something in it is not finite."""
        local = self.fragment.get(self.offload)
        delta = self.outer - local
        if arrays.namespace(delta).isfinite(delta).all():
            return delta
        self.dropped += 1
        return arrays.namespace(delta).zeros_like(delta)

    def step(self, mean: Array) -> None:
        self.outer, self.m = rules.descend(self.outer, mean, self.m, self.rule)

    def adopt(self, alpha: float = 0.0) -> None:
        """θ_local <- α θ_local + (1 - α) θ_outer; statistics are taken over whole."""
        if self.fragment.plain and alpha < 1:
            alpha = 0.0
        if alpha < 1:
            local = self.fragment.get(self.offload) if alpha else self.outer
            self.fragment.put(rules.blend(local, self.outer, alpha))

    def state_dict(self) -> dict[str, Any]:
        residuals = [layout.saved(r) for r in self.channel.residuals()]
        m = layout.saved(self.m)
        return {"outer": layout.saved(self.outer), "m": m, "residuals": residuals, "dropped": self.dropped}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if tuple(state["outer"].shape) != self.outer.shape:
            raise ValueError(f"outer parameters: {state['outer'].shape} values, not {self.outer.shape}")
        like = self.outer
        outer = layout.restored(state["outer"], like)
        assert outer is not None
        self.outer, self.m = outer, layout.restored(state["m"], like)
        self.channel.set_residuals([layout.restored(r, like) for r in state["residuals"]])
        self.dropped = int(state["dropped"])


class Heard(NamedTuple):
    """What a roll call says. stop: somebody wants to.     plateau: worker 0 has found one."""

    stop: bool
    plateau: bool


class Lockstep(NoOuter):
    """Base of the outer loops in which all workers meet. identity: what must be equal to train together."""

    def __init__(
        self,
        config: OuterConfig,
        parts: Sequence[Fragment],
        comm: Comm,
        identity: Mapping[str, str],
        world: World | None = None,
    ) -> None:
        """world: the ranks of this worker; of a sharded one each keeps the outer state of its shards."""
        self.config, self.comm, self.world = config, comm, world or World()
        self.identity = {**identity, "tensors": layout.signature(list(parts))}
        self.traffic = Traffic()
        self.replicas = [Replica(f, comm, config, self.traffic) for f in parts]
        self.cut = any_sharded(t for f in parts for t in f.tensors)
        self.stop = False  # this worker wants to stop; all do at the next roll call that says so
        self.stopped = False
        self.flat = False  # this worker's plateau rule says that the stage is over

    def begin(self, state: Any, stopping: Callable[[], bool] = never) -> None:
        """Before the first step, and after a resume. Raises UserError when workers do not fit together."""
        cards = self._cards({**self.identity, "step": state.step, "outer": self.fingerprint()})
        for key in cards[0]:
            values = [c[key] for c in cards]
            if len(set(values)) > 1:
                raise UserError(
                    f"outer.kind: {self.config.kind}: workers differ in their {WHAT.get(key, key)}: "
                    + ", ".join(f"worker {i}: {v}" for i, v in enumerate(values))
                    + "; start all of them from the same code, configuration, data and checkpoint"
                )

    def card(self, state: Any) -> dict[str, Any]:
        """What this worker says before an exchange."""
        same = {"step": state.step, "total": state.schedule.total, "outer": self.fingerprint()}
        return {**same, "stop": self.stop, "flat": self.flat}

    def compare(self, card: dict[str, Any]) -> Heard:
        """The roll call. Raises UserError when replicas have drifted."""
        cards = self._cards(card)
        for key in ("step", "total", "outer"):
            if len({c[key] for c in cards}) > 1:
                raise UserError(
                    f"step {card['step']}: replicas differ in their {WHAT.get(key, key)}: "
                    f"{[c[key] for c in cards]}; nothing was exchanged; resume from an earlier checkpoint"
                )
        return Heard(any(c["stop"] for c in cards), cards[0]["flat"])

    def hear(self, state: Any, heard: Heard) -> bool:
        """Do, at the same step on every worker, what a roll call says; gives whether to stop."""
        if heard.plateau:
            state.schedule.start_decay(state.step)
        return heard.stop

    def fingerprint(self) -> str:
        return f"{layout.fingerprint([r.outer for r in self.replicas]):016x}"

    def agree(self, stopping: bool) -> bool:
        """Whether to stop now. A wish is heard at the next roll call, so that all stop at the same step."""
        self.stop = stopping
        return stopping if self.comm.size == 1 else self.stopped

    def plateau(self, state: Any, reached: bool) -> None:
        """Workers have held-out losses of their own: that of worker 0 counts, from the next roll call on."""
        self.flat = reached

    def place(self, step: int) -> Place:
        return Place(self.comm.rank, step)

    def _cards(self, card: dict[str, Any]) -> list[dict[str, Any]]:
        text = json.dumps(card).encode()
        if len(text) > CARD:
            raise ValueError(f"a roll-call card of {len(text)} bytes, at most {CARD}")
        mine = np.frombuffer(text.ljust(CARD), np.uint8).copy()
        return [json.loads(bytes(c)) for c in self.comm.share(mine)]

    def report(self) -> dict[str, Any]:
        """What a log line says about the outer loop: bytes of this worker, exchanges, dropped deltas."""
        t, dropped = self.traffic, sum(r.dropped for r in self.replicas)
        return {"sent": t.sent, "received": t.received, "rounds": t.rounds, "dropped": dropped}

    def state_dict(self) -> dict[str, Any]:
        """Called on every rank of a worker. Of a model that is cut each rank has what belongs to its part;
        otherwise all have the same, and any number of ranks may go on from it."""
        own = self._own_state()
        return {"kind": self.config.kind, "ranks": self.world.gather(own) if self.cut else [own]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state.get("kind") != self.config.kind:
            raise ValueError(f"outer state of {state.get('kind')!r}, not of {self.config.kind!r}")
        parts, want = state["ranks"], self.world.size if self.cut else 1
        if len(parts) != want:
            raise UserError(
                f"outer.kind: {self.config.kind}: the checkpoint's outer state is in {len(parts)} part(s), "
                f"this worker's in {want}: under an outer loop a model that is cut (run.parallel) resumes on "
                f"as many ranks, cut alike"
            )
        self._load_own(parts[self.world.rank if self.cut else 0])

    def _own_state(self) -> dict[str, Any]:
        replicas = [r.state_dict() for r in self.replicas]
        return {"replicas": replicas, "traffic": vars(self.traffic).copy(), "flat": self.flat}

    def _load_own(self, state: Mapping[str, Any]) -> None:
        for r, saved in zip(self.replicas, state["replicas"], strict=True):
            r.load_state_dict(saved)
        vars(self.traffic).update(state["traffic"])
        self.flat = bool(state.get("flat", False))


WHAT = {
    "outer": "outer parameters (hash)",
    "tensors": "trained tensors (hash)",
    "plan": "configuration (digest)",
    "data": "dataset",
    "code": "code (digest)",
    "total": "length of the run",
}


def parts_of(model: nn.Module, config: OuterConfig) -> list[Fragment]:
    return layout.fragments(model, config.fragments if config.kind == "streaming" else 1)
