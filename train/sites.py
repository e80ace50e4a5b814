"""Statistics of every site of a model, on demand (`run.stats_every`): how large the stream is, what codes and
gates do. One forward pass over fixed held-out rows, in evaluation mode: the training does not notice.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dataset.views import View
from model.items import Visit
from model.lm import LanguageModel
from model.schema import Config
from train.feed import cut
from train.sharding import settle
from train.world import World, autocast

ROWS = 4


@torch.no_grad()
def site_stats(lm: LanguageModel, view: View, config: Config, world: World) -> dict[str, Any]:
    """{"activations": {site: {"rms", "max"}}, "stats": {name: number or list}} of the first held-out rows.

    rms and max are of what a block's visit leaves in the residual stream. stats are the model's own: codes in
    use, share of open gates, kept tokens.
    """
    rows = max(1, min(ROWS, view.rows))
    micro = cut(view.batch(0, rows).to(world.device), rows)[0]
    was_training = lm.training
    lm.eval()
    found: dict[str, dict[str, float]] = {}
    try:
        with watched(lm, found), autocast(world.device, config.run.precision):
            out = lm(micro.tokens, labels=micro.labels, weights=micro.weights, docs=micro.docs)
    finally:
        lm.train(was_training)
        settle(lm)
    stats = {name: value.double().cpu().tolist() for name, value in out.aux.stats.items()}
    return {"activations": found, "stats": stats}


@contextmanager
def watched(lm: LanguageModel, found: dict[str, dict[str, float]]) -> Iterator[None]:
    """Within, every visit of a block notes its output in `found`; a block's n-th call is its n-th site."""
    sites: dict[str, list[str]] = defaultdict(list)
    for item in lm.plan.walk():
        if isinstance(item, Visit):
            sites[item.module].append(item.site)
    handles = []
    for name, places in sites.items():
        waiting = iter(places)

        def note(module: nn.Module, args: Any, step: Any, waiting: Iterator[str] = waiting) -> None:
            found[next(waiting)] = measures(step.y)

        handles.append(lm.bank[name].register_forward_hook(note))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def measures(y: Tensor) -> dict[str, float]:
    y = y.float()
    return {"rms": float(y.square().mean().sqrt()), "max": float(y.abs().max())}
