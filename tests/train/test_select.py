"""Selection by a reference's losses, loss weights, and rows with padding."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import dataset
from dataset.sidecar import SidecarWriter
from model.docs import Docs
from model.heads import IGNORE, shift_targets
from model.schema import ConfigError
from model.sections import RhoConfig
from tests.train.conftest import Fit, equal
from train.feed import Feed, cut
from train.objective import choose
from train.world import World


def write_sidecar(path, kind: str = "loss", seed: int = 0) -> str:
    data = dataset.open(path)
    writer = SidecarWriter(data, {"name": f"made up {kind} {seed}"}, kind)
    shards, rng = data.splits["train"].shards, np.random.default_rng(seed)
    for shard in shards:
        writer.write(shard, rng.uniform(0, 5, shard.tokens))
    writer.finish(shards)
    return writer.name


@pytest.fixture(scope="module")
def side(data) -> str:
    return write_sidecar(data)


def test_everything_kept_is_cross_entropy_bit_for_bit(request_of, side) -> None:
    plain = Fit(request_of("plain"))
    all_of_it = Fit(request_of("all", f"select.rho={{ref: {side}, keep: 1.0}}"))
    assert equal(plain.tensors(), all_of_it.tensors()) and plain.losses() == all_of_it.losses()


@pytest.mark.parametrize("more", ["", ", unit: row", ", soften: 0.5", ", warm: 6"])
def test_selection_resumes_bit_equal_and_reports_all_tokens(request_of, side, more) -> None:
    sets = (f"select.rho={{ref: {side}, keep: 0.5{more}}}",)
    whole = Fit(request_of("whole", *sets))
    Fit(request_of("parts", *sets), stop_after=5)
    parts = Fit(request_of("parts", *sets, resume=True))
    assert equal(whole.tensors(), parts.tensors()) and whole.losses() == parts.losses()
    plain = Fit(request_of("plain"))
    assert not equal(whole.tensors(), plain.tensors())
    first, other = (next(r for r in f.records if r["kind"] == "eval") for f in (whole, plain))
    assert first["losses"] == other["losses"]  # evaluation counts every token
    if not more:  # step by step: a mean over steps is not the one over their tokens
        every = (Fit(request_of(f"each{i}", "run.log_every=1", *s)) for i, s in enumerate((sets, ())))
        one, two = (next(r for r in f.records if r["kind"] == "train") for f in every)
        assert (
            one["loss"] > one["losses"]["next"] + 0.5 * one["losses"]["recon"]
        )  # the kept are the harder ones
        assert two["loss"] == pytest.approx(two["losses"]["next"] + 0.5 * two["losses"]["recon"], rel=1e-5)


def test_a_selection_that_would_drop_nothing_is_refused(request_of, side) -> None:
    """Of 2 rows, 0.6 are 2; and the token after the next one has no reference."""
    with pytest.raises(ConfigError, match=r"which is all 2; set run\.micro to at least 3"):
        Fit(request_of("rows", f"select.rho={{ref: {side}, keep: 0.6, unit: row}}"))
    others = "heads={recon: {shift: 0}, second: {shift: 2}}"
    with pytest.raises(ConfigError, match="no single or parallel head here does"):
        Fit(request_of("blocks", f"select.rho={{ref: {side}}}", others))


def test_the_largest_excess_is_kept_and_padding_never() -> None:
    excess = torch.tensor([1.0, 5.0, 3.0, 2.0, 0.0, 9.0, 9.0, 4.0])
    counted = torch.tensor([1, 1, 1, 1, 1, 0, 0, 1]).bool()
    hard = choose(excess, counted, 0.5, RhoConfig("x"), 4)
    assert hard.tolist() == [0, 1, 1, 0, 0, 0, 0, 1]  # 3 of 6
    soft = choose(excess, counted, 0.5, RhoConfig("x", soften=1.0), 4)
    assert float(soft.sum()) == pytest.approx(3.0) and float(soft[5:7].sum()) == 0 and soft[1] > soft[0] > 0
    rows = choose(excess, counted, 0.5, RhoConfig("x", unit="row"), 4)
    assert rows.tolist() == [1, 1, 1, 1, 0, 0, 0, 0]  # means 2.75 and 2


def test_the_loss_is_the_mean_of_what_is_kept(request_of, side) -> None:
    """Against a selection by hand, on one micro batch of real rows with their sidecar."""
    run = Fit(request_of("run", f"select.rho={{ref: {side}, keep: 0.5}}", "run.steps=1", "run.micro=4"))
    lm, feed = run.state.model, Feed(run.stage.view, run.config.run, World())
    (micro,) = feed.micros(3)
    feed.close()
    assert micro.reference is not None and lm.objective is not None
    lm.train()
    lm.objective.advance(1, 10)
    out = lm(micro.tokens, micro.labels, micro.weights, micro.docs, reference=micro.reference)
    targets = shift_targets(micro.tokens, 1, micro.docs)
    excess = lm.nll(micro.tokens, micro.docs)["next"] - torch.roll(micro.reference, -1, 1)
    kept = excess.masked_fill(targets == IGNORE, -torch.inf).flatten()
    best = kept.topk(-(-int((targets != IGNORE).sum()) // 2)).indices
    nats = lm.nll(micro.tokens, micro.docs)["next"].flatten()
    share = out.aims["next"] / out.sums["next"][1]
    torch.testing.assert_close(share, nats[best].mean(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.losses["next"], nats.nanmean(), rtol=1e-4, atol=1e-4)


def test_a_sidecar_of_weights_multiplies_the_loss(request_of, data, side) -> None:
    name = write_sidecar(data, "weight")
    weighted = Fit(request_of("w", f"select.weights={name}"))
    assert not equal(weighted.tensors(), Fit(request_of("plain")).tensors())
    for wrong in (f"select.weights={side}", f"select.rho={{ref: {name}}}"):
        with pytest.raises(ConfigError, match="kind"):
            Fit(request_of("x", wrong))


@pytest.mark.parametrize("packing", ["best_fit", "documents"])
def test_padding_is_no_document_and_no_target(request_of, data, packing) -> None:
    """A padded row's loss is that of its document alone."""
    view = dataset.open(data).view(64, packing=packing)
    batches = (view.batch(step, 4) for step in range(50))
    batch = next(b for b in batches if b.lengths is not None and bool((b.lengths < 64).any()))
    (micro,) = cut(batch, 4)
    assert micro.docs.padded and torch.equal(micro.docs.tokens.sum(1), batch.lengths)
    done = Fit(request_of("run", f"run.packing={packing}", "run.steps=2"))
    lm = done.state.model.eval()
    nats = lm.nll(micro.tokens, micro.docs)["next"]
    assert bool(nats[~micro.docs.tokens].isnan().all())
    row = int((batch.lengths < 64).nonzero()[0, 0])
    n = int(batch.lengths[row])
    docs = cut(batch, 1)[row].docs
    alone = Docs.from_segments(docs.segments[:, :n], docs.positions[:, :n])
    short = lm.nll(micro.tokens[row : row + 1, :n], alone)["next"]
    torch.testing.assert_close(nats[row : row + 1, :n], short, rtol=1e-4, atol=1e-5, equal_nan=True)
