"""A byte-level BPE trained on any source: every byte is in it, digits go by threes, EOS is id 0."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from dataset.files import DatasetError, canonical, require_empty
from dataset.readers import Document, read
from dataset.sources import ReadOptions, find_all
from dataset.tokenizers import Tokenizer, library_version

EOS = "<|endoftext|>"
SPECIALS = (EOS, "<|pad|>", "<|bos|>", "<|mask|>")
# The split of Llama 3 and GPT-4: letters, up to three digits, punctuation runs, line ends, spaces.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SMALLEST = 256 + len(SPECIALS)


def train(
    sources: tuple[str, ...],
    vocab: int,
    out: Path,
    options: ReadOptions | None = None,
    sample_bytes: int = 200 * 2**20,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Tokenizer:
    """Train a BPE of `vocab` ids and save it as the tokenizer folder `out`.

    sample_bytes: text read at most, an equal share of every input file. Raises DatasetError.
    """
    if not SMALLEST <= vocab <= 2**20:
        raise DatasetError(f"--vocab {vocab}: allowed are {SMALLEST} (bytes and specials) to {2**20:,}")
    require_empty(out)
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Backend

    options = options or ReadOptions()
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = _Texts(sources, options, sample_bytes, progress)
    backend.train_from_iterator(iter(texts), trainer)
    if not texts.read:
        raise DatasetError("no text in the sources to train a tokenizer on")
    meta = {
        "name": f"bpe-{backend.get_vocab_size()}",
        "library": library_version("tokenizers"),
        "merges": None,
        "eos": EOS,
        "eos_id": 0,
    }
    tokenizer = Tokenizer(canonical(json.loads(backend.to_str())), meta)
    tokenizer.save(out)
    return tokenizer


class _Texts:
    """Documents of the sources, an equal share of bytes of each input."""

    def __init__(self, sources: tuple[str, ...], options: ReadOptions, sample_bytes: int, progress) -> None:
        self._inputs, _ = find_all(sources, options)
        self._field, self._budget, self._progress = options.field, sample_bytes, progress
        self.read = 0

    def __iter__(self) -> Iterator[str]:
        total = min(self._budget, sum(i.size for i in self._inputs))
        for number, one in enumerate(self._inputs):
            share = (self._budget - self.read) // (len(self._inputs) - number)
            taken = 0
            for item in read(one, self._field):
                if taken >= share:
                    break
                if isinstance(item, Document) and item.text:
                    data = item.text[: share - taken].encode(errors="replace")  # halves of surrogate pairs
                    taken += len(data)
                    yield data.decode()
            self.read += taken
            self._progress(min(self.read, total), total)
