"""The dataset side against its peers: reading rows in random order, tokenizing, hashing.

Shape legend: b rows a batch (8)  C context (2048).

Peers are used when they are installed, each reading the same ids as rows of C (+1 where it insists):
    pip install fastokens==0.3.5 litdata mosaicml-streaming megatron-core datatrove grain
Every candidate reads TOKENS ids a round from the page cache, so ids a second = TOKENS / seconds.
"""

from __future__ import annotations

import atexit
import importlib
import json
import shutil
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from dataset import exchange, fast
from dataset.files import block_hashes
from dataset.format import Dataset, dtype_for
from dataset.order import Permutation
from dataset.plan import Request
from dataset.prepare import prepare
from dataset.sources import ReadOptions
from dataset.tokenizers import make
from dataset.train_tokenizer import train
from dataset.work import How, one_core
from experiments.bench.harness import Candidate, Case

ROWS, CONTEXT = 8, 2048
TOKENS = 2**23  # a round
BATCHES = TOKENS // (ROWS * CONTEXT)
CORPUS_TOKENS = 2**27  # 256 MiB as u16: well past the caches of the processor
VOCAB = 32_000


def cases() -> list[Case]:
    folder = Path(tempfile.mkdtemp(prefix="bench-data-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    data = corpus(folder)
    ours = reader(data)
    found = [random_rows(data)]
    for name, make_peer, bar in PEERS:
        if (peer := attempt(name, partial(make_peer, data, folder))) is not None:
            title = f"[{ROWS} x {CONTEXT}] int64 with cu_seqlens against {name}, {TOKENS:,} ids a round"
            found.append(Case(title, [Candidate(name, peer), Candidate("ours", ours)], name, {"ours": bar}))
    return [*found, *tokenizing(folder), hashing(data)]


def attempt(name: str, build: Callable[[], Callable[[], object]]) -> Callable[[], object] | None:
    """A peer's reader, or None with a line that says why."""
    try:
        return build()
    except Exception as error:  # a peer that is missing or does not run here must not stop the others
        print(f"{name}: not measured ({type(error).__name__}: {str(error)[:120]})")
        return None


def corpus(folder: Path) -> Dataset:
    """Documents of log-normal length with Zipf-like ids, as a dataset of ours."""
    one_core()
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(5.5, 1.4, CORPUS_TOKENS // 500).astype(np.int64) + 2, 200_000)
    lengths = lengths[: np.searchsorted(np.cumsum(lengths), CORPUS_TOKENS)]
    total = int(lengths.sum())
    ids = (VOCAB * rng.random(total, np.float32) ** 3).astype("<u2")
    ids[np.cumsum(lengths) - 1] = 0
    ids.tofile(folder / "corpus.ds")
    np.cumsum(lengths).astype("<u8").tofile(folder / "corpus.ds.index")
    spec = {"model": {"type": "WordLevel", "vocab": {"<eos>": 0, **{f"w{i}": i for i in range(1, VOCAB)}}}}
    spec["model"]["unk_token"] = "w1"  # type: ignore[index]
    (folder / "words.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], **spec}))
    tokenizer = make(str(folder / "words.json"), eos="<eos>")
    assert dtype_for(tokenizer.vocab) == "u16"
    return exchange.import_corpus("datatrove", [folder / "corpus.ds"], tokenizer, folder / "ours")


# ----------------------------------------------------------------------------- reading


def batches(read: Callable[[int], object]) -> Callable[[], object]:
    """One round: BATCHES calls with growing numbers, going on from round to round."""
    state = {"at": 0}

    def run() -> object:
        last = None
        for _ in range(BATCHES):
            last = read(state["at"])
            state["at"] += 1
        return last

    return run


def reader(data: Dataset) -> Callable[[], object]:
    view = data.view(context=CONTEXT)
    return batches(lambda step: view.step_arrays(step, ROWS, 0, 1))


def random_rows(data: Dataset) -> Case:
    """Against the limit: copying the same number of random rows into a buffer that is used again."""
    view = data.view(context=CONTEXT)
    ids = view.split.shards[0].tok
    rows = len(ids) // CONTEXT
    order = Permutation(rows, 1)(np.arange(rows)).tolist()
    buffer = np.empty((ROWS, CONTEXT), np.uint16)

    def copy(step: int) -> object:
        for i in range(ROWS):
            start = order[(step * ROWS + i) % rows] * CONTEXT
            buffer[i] = ids[start : start + CONTEXT]
        return buffer

    def mine(step: int) -> object:
        return view.tokens(np.arange(step * ROWS, (step + 1) * ROWS))

    return Case(
        f"shuffled u16 rows [{ROWS} x {CONTEXT}], {TOKENS:,} ids a round",
        [Candidate("row copies (limit)", batches(copy)), Candidate("ours", batches(mine))],
        "row copies (limit)",
        {"ours": 0.40},
    )


def nanogpt(data: Dataset, folder: Path) -> Callable[[], object]:
    """nanoGPT's get_batch as written: maps the file for every batch, slices x and y."""
    import torch

    path, rng = folder / "corpus.ds", np.random.default_rng(0)

    def read(step: int) -> object:
        ids = np.memmap(path, dtype=np.uint16, mode="r")
        starts = rng.integers(0, len(ids) - CONTEXT - 1, ROWS).tolist()
        x = torch.stack([torch.from_numpy(ids[i : i + CONTEXT].astype(np.int64)) for i in starts])
        y = torch.stack([torch.from_numpy(ids[i + 1 : i + 1 + CONTEXT].astype(np.int64)) for i in starts])
        return x, y

    return batches(read)


def datatrove_reader(data: Dataset, folder: Path) -> Callable[[], object]:
    """datatrove's DatatroveFileDataset, random rows, stacked."""
    import torch
    from datatrove.utils.dataset import DatatroveFileDataset  # type: ignore[import-not-found]

    peer = DatatroveFileDataset(str(folder / "corpus.ds"), seq_len=CONTEXT - 1, token_size=2)
    order = Permutation(len(peer), 1)(np.arange(len(peer))).tolist()

    def read(step: int) -> object:
        rows = [peer[order[(step * ROWS + i) % len(order)]]["input_ids"] for i in range(ROWS)]
        return torch.stack([torch.as_tensor(np.asarray(row, np.int64)) for row in rows])

    return batches(read)


def looped(loader_of: Callable[[], Iterator]) -> Callable[[], object]:
    """A peer's own loader, started again when it ends."""
    state = {"iterator": loader_of()}

    def read(step: int) -> object:
        try:
            return next(state["iterator"])
        except StopIteration:
            state["iterator"] = loader_of()
            return next(state["iterator"])

    return batches(read)


def litdata_reader(data: Dataset, folder: Path) -> Callable[[], object]:
    """litdata's StreamingDataset with TokensLoader, shuffled, through its loader in this process."""
    litdata = importlib.import_module("litdata")
    torch = importlib.import_module("torch")
    target = folder / "litdata"
    ids = np.fromfile(folder / "corpus.ds", "<u2")
    from litdata.streaming.writer import BinaryWriter  # type: ignore[import-not-found]

    writer = BinaryWriter(str(target), chunk_bytes=64 * 2**20, item_loader=litdata.TokensLoader())
    for i in range(0, len(ids), 2**20):
        writer[i // 2**20] = torch.from_numpy(ids[i : i + 2**20].astype(np.int32))
    writer.done()
    writer.merge()
    loader = litdata.TokensLoader(block_size=CONTEXT)
    peer = litdata.StreamingDataset(str(target), item_loader=loader, shuffle=True, drop_last=True)
    return looped(lambda: iter(litdata.StreamingDataLoader(peer, batch_size=ROWS, num_workers=0)))


def mds_reader(data: Dataset, folder: Path) -> Callable[[], object]:
    """mosaicml-streaming's StreamingDataset of uint16 rows, shuffled, through torch's loader."""
    import torch

    streaming = importlib.import_module("streaming")
    ids = np.fromfile(folder / "corpus.ds", "<u2")[: 2**24]
    with streaming.MDSWriter(out=str(folder / "mds"), columns={"tokens": "ndarray:uint16"}) as out:
        for row in ids[: len(ids) // CONTEXT * CONTEXT].reshape(-1, CONTEXT):
            out.write({"tokens": row})
    peer = streaming.StreamingDataset(local=str(folder / "mds"), shuffle=True, batch_size=ROWS)

    def widen(rows: list) -> object:
        return torch.from_numpy(np.stack([row["tokens"] for row in rows]).astype(np.int64))

    return looped(lambda: iter(torch.utils.data.DataLoader(peer, batch_size=ROWS, collate_fn=widen)))


def megatron_reader(data: Dataset, folder: Path) -> Callable[[], object]:
    """Megatron's GPTDataset: the full dictionary (tokens, labels, loss mask, positions), stacked."""
    core = importlib.import_module("megatron.core.datasets.gpt_dataset")
    builder = importlib.import_module("megatron.core.datasets.blended_megatron_dataset_builder")
    torch = importlib.import_module("torch")
    exchange.write_megatron(data.splits["train"], folder / "megatron")

    class Words:
        eod, vocab_size, unique_identifiers = 0, VOCAB, {"class": "words"}

    config = core.GPTDatasetConfig(
        random_seed=0,
        sequence_length=CONTEXT,
        blend=([str(folder / "megatron")], None),
        split="1,0,0",
        tokenizer=Words(),
        reset_position_ids=False,  # with document boundaries it is some 40 times slower
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        path_to_cache=str(folder / "cache"),
    )
    sizes = [CORPUS_TOKENS // CONTEXT, 0, 0]
    peer = builder.BlendedMegatronDatasetBuilder(core.GPTDataset, sizes, lambda: True, config).build()[0]

    def read(step: int) -> object:
        rows = [peer[(step * ROWS + i) % len(peer)] for i in range(ROWS)]
        return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}

    return batches(read)


def grain_reader(data: Dataset, folder: Path) -> Callable[[], object]:
    """grain's MapDataset: shuffle and batch over the mapped file."""
    grain = importlib.import_module("grain.python")
    ids = np.memmap(folder / "corpus.ds", np.uint16, "r")

    class Rows:
        def __len__(self) -> int:
            return len(ids) // CONTEXT

        def __getitem__(self, i: int) -> np.ndarray:
            return ids[i * CONTEXT : (i + 1) * CONTEXT].astype(np.int64)

    peer = grain.MapDataset.source(Rows()).shuffle(seed=0).batch(ROWS)
    return batches(lambda step: peer[step % len(peer)])


PEERS: list[tuple[str, Callable[[Dataset, Path], Callable[[], object]], float]] = [
    ("nanoGPT get_batch", nanogpt, 1.5),
    ("litdata loader", litdata_reader, 2.0),
    ("Megatron GPTDataset", megatron_reader, 8.0),
    ("mosaicml-streaming loader", mds_reader, 20.0),
    ("datatrove file dataset", datatrove_reader, 1.0),
    ("grain shuffle + batch", grain_reader, 1.0),
]


# ----------------------------------------------------------------------------- writing and hashing


def tokenizing(folder: Path) -> list[Case]:
    """jsonl.zst to shards: the reference against its library alone, the fast path against fastokens alone."""
    train(("pystdlib",), 16_000, folder / "bpe", sample_bytes=4 * 2**20)
    texts = python_sources("pystdlib")
    bare = make(str(folder / "bpe"))
    cases = [
        shards_case(folder, "reference", texts, lambda: bare.encode_checked(texts), "tokenizers alone", 0.9)
    ]
    if fast.available():
        many = texts + python_sources(sysconfig.get_path("purelib"))
        encoder = fast.FastEncoder(bare)
        never = [2**64 - 1] * len(many)  # hashes above the limit: nothing is checked again
        alone = partial(encoder.encode, many, never)
        cases.append(shards_case(folder, "fast", many, alone, "fastokens alone", None))
    return cases


def shards_case(
    folder: Path, path: str, texts: list[str], alone: Callable[[], object], name: str, bar: float | None
) -> Case:
    """`prepare` of `texts` as one jsonl.zst, by the `path` "reference" or "fast"."""
    import zstandard

    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    source = folder / f"{path}.jsonl.zst"
    source.write_bytes(zstandard.compress(lines.encode()))
    size = sum(len(text.encode()) for text in texts) / 1e6
    request = Request((str(source),), tokenizer=str(folder / "bpe"))

    def whole() -> object:
        with tempfile.TemporaryDirectory(dir=folder) as out:
            return prepare(request, Path(out) / "shards", how=How(fast=path == "fast")).counts

    ours = f"ours, {path}"
    title = f"{size:.1f} MB of Python, jsonl.zst to shards"
    return Case(title, [Candidate(name, alone), Candidate(ours, whole)], name, {ours: bar} if bar else {})


def python_sources(source: str) -> list[str]:
    """Texts of the Python files of a source, up to 64 MB."""
    from dataset.readers import Document, read
    from dataset.sources import find

    texts, size = [], 0
    for one in find(source, ReadOptions(include=("*.py",)))[0]:
        for item in read(one, "text"):
            if isinstance(item, Document) and item.text:
                texts.append(item.text)
                size += one.size
        if size > 64e6:
            break
    return texts


def hashing(data: Dataset) -> Case:
    """`verify` reads every byte: against xxh3 alone over the same maps."""
    from dataset.verify import verify

    shards = data.splits["train"].shards
    maps = [np.fromfile(s.path(kind), np.uint8) for s in shards for kind in s.entry["files"]]
    size = sum(m.nbytes for m in maps) / 1e9
    return Case(
        f"verify {size:.2f} GB",
        [
            Candidate("xxh3 in memory", lambda: [block_hashes(m.data) for m in maps]),
            Candidate("ours", lambda: verify(data.path)),
        ],
        "xxh3 in memory",
    )
