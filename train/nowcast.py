"""Nowcasting: from the last few weights, guess where training is going, and jump there if it helps.

Every `every` steps the weights are kept; from `history` of them a small network, the same for every
coordinate, guesses the move to come (NiNo, Knyazev et al. 2024, arXiv 2409.04434, without its graph network).
With w_1 .. w_h the history of a tensor and s the root mean square of its steps w_{i+1} - w_i,

    move = s * net((w_1 - w_h) / s, ..., (w_{h-1} - w_h) / s)      per coordinate

so a path that is c times as large is guessed c times as large. A jump stays only when the loss of `gate`
held-out tokens does not rise; otherwise every weight is put back, bit for bit. The optimizer's moments
are left alone. What the gate costs is counted (`gate_tokens`). Fitted by `python -m experiments.nowcast.fit`.

Shape legend: N coordinates  h history
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from model.schema import ConfigError
from model.sections import NowcastConfig

HIDDEN = 32
Score = Callable[[Any, int], tuple[float, int]]


class NowcastNet(nn.Module):
    """[N, h-1] scaled differences -> [N] scaled move. A fresh one is the zero network."""

    def __init__(self, history: int) -> None:
        super().__init__()
        self.history = history
        self.layers = nn.Sequential(
            nn.Linear(history - 1, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, HIDDEN), nn.GELU()
        )
        self.out = nn.Linear(HIDDEN, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layers(x))[:, 0]


def features(path: list[Tensor]) -> tuple[Tensor, Tensor]:
    """([N, h-1] scaled differences from the last, 0-d scale) of a tensor's history, oldest first."""
    w = torch.stack([t.float().flatten() for t in path])
    scale = w.diff(dim=0).square().mean().sqrt()
    return ((w[:-1] - w[-1]) / scale.clamp_min(1e-30)).t(), scale


@torch.no_grad()
def moves(net: NowcastNet, path: list[Tensor]) -> Tensor:
    """The guessed move of a tensor, in its shape; zero where nothing moved."""
    x, scale = features(path)
    return (net(x) * scale).view(path[-1].shape)


def load_net(config: NowcastConfig) -> NowcastNet:
    """The fitted network, or the zero network. Raises ConfigError."""
    net = NowcastNet(config.history)
    if config.net is not None:
        try:
            net.load_state_dict(load_file(Path(config.net)))
        except (OSError, SafetensorError, RuntimeError) as error:
            what = f"nowcast.net: {config.net} holds no network for a history of {config.history}"
            raise ConfigError([f"{what} ({str(error).splitlines()[0]})"]) from error
    return net.requires_grad_(False).eval()


class Nowcast:
    """kept: {name: weights} of the past, oldest first. taken, refused: jumps.
    gate_tokens: held-out tokens scored for them."""

    def __init__(self, config: NowcastConfig, model: nn.Module, device: torch.device) -> None:
        self.config, self._model = config, model
        self.net = load_net(config).to(device)
        self.kept: list[dict[str, Tensor]] = []
        self.taken = self.refused = self.gate_tokens = 0
        self.news: dict[str, Any] | None = None  # the last jump, until it is logged

    def _weights(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self._model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def maybe_jump(self, state: Any, score: Score) -> None:
        """Called after every step. score(state, tokens): held-out loss of the model as it is,
        and the tokens scored for it."""
        if not self.config.every or state.step % self.config.every:
            return
        weights = self._weights()
        self.kept = [*self.kept, {n: p.detach().clone() for n, p in weights.items()}][-self.config.history :]
        if len(self.kept) < self.config.history:
            return
        before, first = score(state, self.config.gate)
        for name, p in weights.items():
            p.add_(moves(self.net, [past[name] for past in self.kept]).to(p.dtype))
        after, second = score(state, self.config.gate)
        self.gate_tokens += first + second
        better = after <= before
        if better:
            self.taken += 1
            self.kept = []  # the next guess needs a path without a jump in it
        else:
            self.refused += 1
            for name, p in weights.items():
                p.copy_(self.kept[-1][name])
        counts = {"taken": self.taken, "refused": self.refused, "gate_tokens": self.gate_tokens}
        self.news = {"better": better, "before": before, "after": after, **counts}

    def state_dict(self) -> dict[str, Any]:
        counts = {"taken": self.taken, "refused": self.refused, "gate_tokens": self.gate_tokens}
        return {"kept": self.kept, "counts": counts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.kept = [{n: t.clone() for n, t in past.items()} for past in state["kept"]]
        for name, value in state["counts"].items():
            setattr(self, name, int(value))
