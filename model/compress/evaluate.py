"""The scoreboard: how much of what a context is worth survives its compression, and what that costs.

    R = (L_none - L_compressed) / (L_none - L_full)      nats per token, the same frozen decoder for all three

with intervals from a paired bootstrap over examples. The first token of a text is never scored, since only
some carriers can predict it: every method is scored on the same tokens.

A batch is anything with context, context_mask [B, C], source, source_mask [B, C'] (the same context in the
decoder's own tokens) and text, text_mask, labels [B, T].
Shape legend: B batch  C context  T text  S slots.
"""

from __future__ import annotations

import re
import string
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from model.compress.base import ContextCompressor
from model.compress.context import CompressedContext, LayerSlots
from model.compress.rows import pack, token_losses
from model.compress.tokens import token_ids

MIN_GAP = 0.02  # nats: below this a full context is worth too little for a fraction of it to mean anything


@dataclass
class Score:
    """nll: variant -> [N] summed nats per example; tokens [N]. Bytes and slots are means per example."""

    nll: dict[str, Tensor]
    tokens: Tensor
    kv_bytes: float = 0.0
    full_kv_bytes: float = 0.0
    slots: float = 0.0

    def loss(self, variant: str) -> float:
        """Nats per token."""
        return float(self.nll[variant].sum() / self.tokens.sum())

    def recovered(self, draws: int = 1000, seed: int = 0) -> tuple[float, float, float] | None:
        """R with a 95% interval, or None where the full context gains less than MIN_GAP."""
        gap = self.loss("none") - self.loss("full")
        if gap < MIN_GAP:
            return None
        gain = self.nll["none"] - self.nll["compressed"]
        return ratio_interval(gain, self.nll["none"] - self.nll["full"], draws, seed)

    def beats(self, other: str, draws: int = 1000, seed: int = 0) -> tuple[float, float, float]:
        """Nats per token gained over another variant, with a 95% interval."""
        return ratio_interval(self.nll[other] - self.nll["compressed"], self.tokens, draws, seed)


def ratio_interval(
    top: Tensor, bottom: Tensor, draws: int = 1000, seed: int = 0
) -> tuple[float, float, float]:
    """sum(top) / sum(bottom) over examples [N], with the 2.5 and 97.5 percentiles of a paired bootstrap."""
    g = torch.Generator().manual_seed(seed)
    picked = torch.randint(len(top), (draws, len(top)), generator=g)
    sample = top.double()[picked].sum(1) / bottom.double()[picked].sum(1)
    low, high = sample.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return float(top.double().sum() / bottom.double().sum()), low, high


def random_like(context: CompressedContext, generator: torch.Generator) -> CompressedContext:
    """Slots of the same shape, mean and spread that know nothing of the context."""

    def noise(t: Tensor) -> Tensor:
        return torch.randn(t.shape, generator=generator).to(t) * t.std() + t.mean()

    if context.embeds is not None:
        return replace(context, embeds=noise(context.embeds))
    layers = tuple(LayerSlots(noise(x.keys), noise(x.values), x.mask) for x in context.layers or ())
    return replace(context, layers=layers)


def misfit(compressor: ContextCompressor, rows: Sequence[Any]) -> str | None:
    """Why the decoder cannot read whole contexts before their texts (rows have `context` and `text`), so that
    no variant `full` can be scored; None where it can."""
    longest = max((len(r.context) + len(r.text) for r in rows), default=0)
    widest = max((len(r.context) for r in rows), default=0) + max((len(r.text) for r in rows), default=0)
    try:
        compressor.decoder.check_length(longest, widest)
    except ValueError as error:
        return str(error)
    return None


@torch.no_grad()
def losses_of(
    compressor: ContextCompressor,
    batch: Any,
    variants: Sequence[str],
    context: CompressedContext | None = None,
    **asked: Any,
) -> tuple[dict[str, Tensor], Tensor]:
    """Summed nats [B] of every variant, and scored tokens [B].

    variants: none and full (the decoder without the method's adapter; a method that trains the decoder's own
    weights leaves no other than the trained ones, so score both ends before it is loaded), compressed,
    adapted_none (no context, but with whatever the method changed in the decoder), shuffled (another row's
    slots), random (slots of noise).
    asked: ratio or budget for `compress`.  Raises ValueError for `shuffled` in a batch of one row.
    """
    labels = batch.labels.clone()
    labels[:, 0] = -100
    if context is None and set(variants) & {"compressed", "shuffled", "random"}:
        context = compressor.compress(batch.context, batch.context_mask, **asked)
    out = {}
    for variant in variants:
        given: CompressedContext | None = context
        if variant in ("none", "adapted_none"):
            given = None
        elif variant == "full":
            given = compressor.full_context(*pack(batch.source, batch.source_mask))
        elif variant == "shuffled":
            assert context is not None
            if context.batch_size < 2:
                raise ValueError("a batch of one row has no other row to be shuffled with")
            given = context.select(torch.arange(context.batch_size).roll(1))
        elif variant == "random":
            assert context is not None
            slots = context if context.embeds is not None else replace_layers(compressor, context)
            given = random_like(slots, torch.Generator().manual_seed(0))
        adapted = variant not in ("none", "full")
        logits, _ = compressor.decode(given, batch.text, batch.text_mask, adapted)
        out[variant] = token_losses(logits, labels).sum(1).cpu()
    return out, labels.ne(-100).sum(1).cpu()


@torch.no_grad()
def score(
    compressor: ContextCompressor,
    batches: Iterable[Any],
    variants: Sequence[str] = ("none", "full", "compressed", "adapted_none", "shuffled", "random"),
    **asked: Any,
) -> Score:
    """Losses of every variant over all batches, with the bytes that the caches really take."""
    nll: dict[str, list[Tensor]] = {v: [] for v in variants}
    tokens, sums, n = [], Counter[str](), 0
    for batch in batches:
        fit = getattr(compressor, "compress_for", None)
        if fit is None:
            context = compressor.compress(batch.context, batch.context_mask, **asked)
        else:  # an oracle looks at the text it is scored on
            ids, mask = pack(batch.context, batch.context_mask)
            slots = compressor.slots_wanted(mask.sum(1), asked.get("ratio"), asked.get("budget"))
            context = fit(ids, mask, batch.text, batch.text_mask, slots)
        found, count = losses_of(compressor, batch, variants, context)
        for v in variants:
            nll[v].append(found[v])
        tokens.append(count)
        report = compressor.memory_report(context, int(batch.source_mask.sum()))
        for key in ("kv_bytes", "full_kv_bytes"):
            sums[key] += report[key]  # type: ignore[assignment]
        sums["slots"] += report["slots"] * context.batch_size  # type: ignore[assignment]
        n += context.batch_size
    return Score(
        {v: torch.cat(x) for v, x in nll.items()}, torch.cat(tokens),
        sums["kv_bytes"] / n, sums["full_kv_bytes"] / n, sums["slots"] / n,
    )  # fmt: skip


# ---------------------------------------------------------------------- restoring and answering


@torch.no_grad()
def restore_accuracy(compressor: ContextCompressor, batch: Any, **asked: Any) -> float:
    """Share of context tokens that are predicted right when the context is read again after its slots."""
    context = compressor.compress(batch.context, batch.context_mask, **asked)
    ids, mask = pack(batch.source, batch.source_mask)
    logits, _ = compressor.decode(context, ids, mask)
    right = (logits[:, :-1].argmax(-1) == ids[:, 1:]) & mask[:, 1:]
    return float(right.sum() / mask[:, 1:].sum())


def normalised(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(answer: str, truth: str) -> float:
    return float(normalised(answer) == normalised(truth))


def f1(answer: str, truth: str) -> float:
    """Harmonic mean of word precision and recall."""
    a, b = normalised(answer).split(), normalised(truth).split()
    same = sum((Counter(a) & Counter(b)).values())
    return 2 * same / (len(a) + len(b)) if same else float(a == b)


@torch.no_grad()
def answer(
    compressor: ContextCompressor,
    tokenizer: Any,
    context: str,
    questions: Sequence[str],
    max_new_tokens: int = 12,
    **asked: Any,
) -> list[str]:
    """First lines of what the decoder writes after each prompt; the context is compressed once for all.

    tokenizer: the decoder's; an encoder with its own brings that along.
    """
    c, device = compressor, next(compressor.decoder.model.parameters()).device
    ids = torch.tensor([token_ids(c.context_tokenizer(tokenizer), context, start=True)], device=device)
    kept = c.compress(ids, **asked)
    out = []
    for question in questions:
        prompt = torch.tensor([token_ids(tokenizer, question)], device=device)
        made = c.generate(prompt, kept, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=0)
        text = tokenizer.decode(made[0, prompt.shape[1] :].tolist(), skip_special_tokens=True)
        out.append((text.strip().splitlines() or [""])[0].strip())
    return out


def passkey_table(
    compressor: ContextCompressor,
    tokenizer: Any,
    make: Callable[[int, float], dict[str, str]],
    lengths: Sequence[int],
    depths: Sequence[float],
    trials: int = 4,
    **asked: Any,
) -> dict[tuple[int, float], float]:
    """Share of keys found by (length, depth). make(length, depth) gives context, prompt, answer."""
    table = {}
    for length in lengths:
        for depth in depths:
            rows = [make(length, depth) for _ in range(trials)]
            found = [
                r["answer"].strip() in answer(compressor, tokenizer, r["context"], [r["prompt"]], **asked)[0]
                for r in rows
            ]
            table[length, depth] = sum(found) / trials
    return table


# ---------------------------------------------------------------------- cost


@dataclass(frozen=True)
class Cost:
    """Medians in seconds on this machine.

    compress_s: until a cache stands that answers any number of questions, the prefill of embedding slots
    included.  decode_tokens_s: None where more tokens took no longer than one, which a clock can show.
    break_even: questions after which compressing has paid, against reading the full context anew for each;
    None where the first token comes no sooner.
    """

    compress_s: float
    first_token_s: float
    full_first_token_s: float
    decode_tokens_s: float | None
    full_decode_tokens_s: float | None
    break_even: float | None

    def as_dict(self) -> dict[str, float | None]:
        return asdict(self)

    @classmethod
    def of(cls, times: Mapping[str, Sequence[float]], tokens: int) -> Cost:
        """times: seconds per round to `compress`, and to write one token and one and more (`slots_1`,
        `slots_n`, `full_1`, `full_n`).  tokens: written beyond the first, over all rows."""
        t = {k: sorted(v)[len(v) // 2] for k, v in times.items()}

        def over(top: float, seconds: float) -> float | None:
            return top / seconds if seconds > 0 else None

        return cls(
            t["compress"], t["slots_1"], t["full_1"],
            over(tokens, t["slots_n"] - t["slots_1"]), over(tokens, t["full_n"] - t["full_1"]),
            over(t["compress"], t["full_1"] - t["slots_1"]),
        )  # fmt: skip


@torch.no_grad()
def cost(
    compressor: ContextCompressor, batch: Any, new_tokens: int = 8, rounds: int = 3, **asked: Any
) -> Cost:
    """Time to compress, to the first token, and per token, after compressed and full contexts in turn."""
    c = compressor
    full = c.full_context(*pack(batch.source, batch.source_mask))
    times: dict[str, list[float]] = {}

    def timed(name: str, action: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        out = action()
        times.setdefault(name, []).append(time.perf_counter() - began)
        return out

    def make() -> CompressedContext:
        return replace_layers(c, c.compress(batch.context, batch.context_mask, **asked))

    def write(context: CompressedContext, n: int) -> Tensor:
        return c.generate(
            batch.text,
            context,
            batch.text_mask,
            max_new_tokens=n,
            min_new_tokens=n,
            do_sample=False,
            pad_token_id=0,
        )

    for _ in range(rounds + 1):
        kept = timed("compress", make)
        for name, given in (("slots", kept), ("full", full)):
            timed(f"{name}_1", partial(write, given, 1))
            timed(f"{name}_n", partial(write, given, 1 + new_tokens))
    warm = {k: v[1:] for k, v in times.items()}  # the first round warms up
    return Cost.of(warm, batch.text.shape[0] * new_tokens)


def replace_layers(compressor: ContextCompressor, context: CompressedContext) -> CompressedContext:
    """The same context carried as a cache, as one stores it to answer many questions."""
    return CompressedContext(
        context.method, context.fingerprint, context.source_length, context.next_position,
        layers=compressor.lower(context),
    )  # fmt: skip
