"""The training sections of a configuration: run, optim, schedule, loss, select, activations, nowcast,
outer, grow.

They stand beside the architecture (`model.schema`) because one file says both; a field's name is its key.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class BatchWarmup:
    """The batch doubles from `from_` sequences up to `run.batch`, in stages of equal length.

    steps: the first step at the full batch.
    """

    from_: int
    steps: int


@dataclass(frozen=True)
class RunConfig:
    """Length, batch and bookkeeping of a run. Give `steps` or `tokens`, not both.

    batch:     global sequences per optimizer step.
    micro:     sequences per forward pass and rank (None: chosen from the batch).
    context:   tokens per sequence.
    precision: compute dtype; master weights, optimizer and losses are fp32 in any case.
    compile:   torch.compile each bank module.
    parallel:  how several ranks share a worker's model: `ddp` (each holds it), `fsdp2` (cut among all of
               them), `hybrid` (cut among `shard` ranks, repeated over the groups of so many).
    shard:     ranks of a shard group of `hybrid`; None: all.
    reshard:   free gathered weights after the forward pass and gather them again for the backward pass:
               less memory, more traffic. Nothing to do under ddp.
    eval_every, save_every: steps; 0: only at the end.
    eval_tokens: held-out tokens per evaluation.
    keep:      checkpoints kept besides the last one of each stage.
    packing:   concat: documents joined and cut; best_fit: none that fits is split; documents: one a row.
    batch_warmup: start with a smaller batch; None: `batch` from the first step on.
    ema:       decay of a moving average of the weights, evaluated and saved beside them; 0: none.
    spike_sigma: skip a step whose loss or gradient norm is more than so many standard deviations above
               the mean of the last `spike_window` applied steps (6 is usual); 0: never.
    stats_every: record activations, code use and gates of every site every so many steps; 0: never.
    sample:    new tokens of sample text at every evaluation; 0: at the end of the run only.
    """

    steps: int | None = None
    tokens: int | None = None
    batch: int = 16
    micro: int | None = None
    context: int = 256
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "bf16"
    compile: bool = False
    parallel: Literal["ddp", "fsdp2", "hybrid"] = "ddp"
    shard: int | None = None
    reshard: bool = False
    eval_every: int = 100
    eval_tokens: int = 65536
    save_every: int = 200
    log_every: int = 10
    keep: int = 2
    packing: Literal["concat", "best_fit", "documents"] = "concat"
    batch_warmup: BatchWarmup | None = None
    ema: float = 0.0
    spike_sigma: float = 0.0
    spike_window: int = 128
    stats_every: int = 0
    sample: int = 0


@dataclass(frozen=True)
class MupConfig:
    """Width scaling: `optim.lr` means what it means at width `base`. See train.optim.mup."""

    base: int


@dataclass(frozen=True)
class OptimConfig:
    """How gradients become updates; see train.optim.

    name:     adamw, muon, stableadamw, lion, adan, schedulefree, adam_mini or adalomo.
    betas:    two numbers; adan wants three.
    decay:    decoupled weight decay.     clip: global gradient norm (0: off).
    momentum: of muon's matrices.
    kahan:    keep the weights of linear layers in bf16 with Kahan summation (stableadamw, lion, adan).
    release:  update each parameter inside the backward pass and free its gradient at once; needs one micro
              batch a step, one rank, no clipping (stableadamw, lion, adan, adalomo).
    wiener:   shrink every gradient by the Wiener gain of its Adam moments (adamw, stableadamw).
    mup:      width scaling; None: off.
    """

    name: str = "adamw"
    lr: float = 3e-3
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    decay: float = 0.1
    clip: float = 1.0
    momentum: float = 0.95
    kahan: bool = False
    release: bool = False
    wiener: bool = False
    mup: MupConfig | None = None


@dataclass(frozen=True)
class LossConfig:
    """The loss of a token; cross-entropy is reported whatever is minimised. See model.ops.loss.

    kind:  ce; mile: (1 + entropy)^gamma * ce; alpha: the alpha-divergence from the target, ce at alpha = 1.
    z:     weight of the squared log-sum-exp (1e-4 is usual).
    """

    kind: Literal["ce", "mile", "alpha"] = "ce"
    z: float = 0.0
    gamma: float = 1.0
    alpha: float = 1.5


@dataclass(frozen=True)
class RhoConfig:
    """Train on the tokens whose loss is furthest above a reference model's (Rho-1, RHO-LOSS).

    keep:   share of the supervised tokens that is trained on.
    ref:    sidecar of the dataset with the reference's losses (`python -m dataset score`).
    unit:   choose single tokens, or whole rows by their mean.
    warm:   the share falls from 1 to `keep` over so many steps (below 1: share of the run).
    soften: nats; 0 keeps or drops, above 0 weighs by sigmoid((excess - threshold) / soften).
    """

    ref: str
    keep: float = 0.6
    unit: Literal["token", "row"] = "token"
    warm: float = 0.0
    soften: float = 0.0


@dataclass(frozen=True)
class SelectConfig:
    """Which tokens of a batch are trained on; evaluation always counts all.

    weights: sidecar of the dataset whose values multiply the loss of each token.
    """

    rho: RhoConfig | None = None
    weights: str | None = None


@dataclass(frozen=True)
class ActivationsConfig:
    """What the backward pass keeps. Names are those of blocks (`mlp`), bank modules or sites.

    checkpoint: run these again in the backward pass instead of keeping their activations.
    bits:       store the inputs of the linear layers of `only` in so many bits (2, 4 or 8); None: exactly.
    """

    checkpoint: list[str] = field(default_factory=list)
    bits: int | None = None
    only: list[str] = field(default_factory=lambda: ["mlp"])


@dataclass(frozen=True)
class NowcastConfig:
    """Jump ahead along the path of the weights; see train.nowcast.

    every:   steps between two weights of the history; 0: never jump.
    history: weights that a prediction is made from.
    net:     fitted network (a .safetensors file); None: the zero network, which never moves anything.
    gate:    held-out tokens on which a jump must not lose, else it is taken back.
    """

    every: int = 0
    history: int = 5
    net: str | None = None
    gate: int = 16384


@dataclass(frozen=True)
class ScheduleConfig:
    """warmup and decay are shares of the run (below 1) or steps; `final` is a share of lr."""

    kind: Literal["wsd", "cosine", "constant"] = "wsd"
    shape: Literal["linear", "sqrt", "cosine"] = "linear"
    warmup: float = 0.02
    decay: float = 0.2
    final: float = 0.0


@dataclass(frozen=True)
class OuterConfig:
    """The outer loop of the DiLoCo family (train/outer/README.md); none: plain, data-parallel training.

    kind:     diloco and streaming: the ranks of one torchrun are the workers; async: one torchrun a worker.
    workers:  groups that the ranks are cut into, each a worker; 0: every rank is one.
    every:    H, inner steps between two exchanges of a tensor.
    lr, momentum, nesterov: the outer optimizer, SGD with ε and β.
    codec:    how deltas travel: 32, 16, 8 or 4 bits a value, or only the largest (density: their share).
    feedback: what a codec rounds away is added to the next delta.
    offload:  outer parameters and momentum in host memory, also when training on a GPU.
    fragments, overlap, blend: streaming alone: P parts, sent H/P steps apart; inner steps τ between send
              and use; weight α of the local parameters when the new ones arrive.
    The rest is for async alone:
    server:   HOST:PORT of `python -m train serve`.   secret_file: its secret (else $LATENT_LAB_SECRET).
    worker:   this worker's name (default: host name and run folder).
    shards:   parts of the data; a worker takes batch / shards sequences a step from the one least visited.
    delay:    N, pushes between two momentum updates; 0: as many as shards; 1: naive, every push at once.
    carry:    c, share of the momentum that the pushes between take along.
    dynamic:  steps of a dispatch follow the worker's speed (dynamic local updates).
    grace:    seconds that the first push of a round waits for others before anybody goes on.
    stale:    a push whose base is older than this many versions is dropped.
    heartbeat: seconds of silence after which a worker's shard is given to another.
    patience: seconds that a worker waits for a server that does not answer.
    """

    kind: Literal["none", "diloco", "streaming", "async"] = "none"
    workers: int = 0
    every: int = 100
    lr: float = 0.7
    momentum: float = 0.9
    nesterov: bool = True
    codec: Literal["fp32", "bf16", "int8", "e3m0", "topk"] = "fp32"
    density: float = 0.015625
    feedback: bool = True
    offload: bool = True
    fragments: int = 3
    overlap: int = 1
    blend: float = 0.5
    server: str | None = None
    secret_file: str | None = None
    worker: str | None = None
    shards: int = 1
    delay: int = 0
    carry: float = 0.0
    dynamic: bool = True
    grace: float = 0.0
    stale: int = 64
    heartbeat: float = 10.0
    patience: float = 60.0


@dataclass(frozen=True)
class GrowConfig:
    """Where the weights come from and when a stage is over.

    from_: arch name, run folder or checkpoint of the smaller model (None: from scratch).
    when:  `step`: a stage runs its full length; `plateau`: it may end early, when held-out loss
           has stopped falling by the plateau rule.
    how:   for a plain stack: `copy` its layers or add `zero`-output ones.
    delta, window, patience, tokens_per_param, slope: the plateau rule; see train.plateau.
    head_lr: factor on the learning rate of heads that were loaded.
    """

    from_: str | None = None
    when: Literal["plateau", "step"] = "step"
    how: Literal["copy", "zero"] = "zero"
    delta: float = 0.002
    window: int = 4
    patience: int = 3
    tokens_per_param: float = 5.0
    slope: float = 0.7
    head_lr: float = 1.0
