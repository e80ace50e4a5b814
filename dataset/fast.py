"""fastokens as the fast path of tokenization, behind a parity gate against `tokenizers`.

The library is young: every encoder first has to agree on a list of awkward strings, and one document of a
thousand (chosen by its hash) is tokenized by both. At the first difference the task is done again by the
reference alone. The bytes written are therefore the same with and without it.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence

import numpy as np

from dataset.tokenizers import Tokenizer

RECHECK = 2**64 // 1000  # documents whose hash lies below this are tokenized twice
# GPT-2's split with every digit on its own: what the two pre-tokenizers Digits and ByteLevel do one after
# the other. fastokens has a fast path for one regular expression, none for the pair.
DIGITS_AND_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d|\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"
AWKWARD = (
    "",
    " ",
    "  a   b \n\n\t c\r\n ",
    "don't I'LL we'Ve 's ''s",
    "x=123456 7.5e-10 １２３ ⅷ ² a1b22c333",
    "   12   x  1",
    "über ñandú Ωmega Привет 日本語 テスト 한국어 ไทย العربية עברית",
    "e\u0301 \u200d \u200b \ufeff \u00a0\u3000 \u2028 \U0001f469\u200d\U0001f4bb 🙂🙂 \U0010ffff",
    "<|endoftext|><|im_start|></s><s>[SEP]<pad><unk><0x0A>▁",
    "def f(x):\n    return {'a': x**2}  # …\n\x0c\x7f\x00",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
)


class Mismatch(Exception):
    """The fast path gave other ids than the reference."""


class FastEncoder:
    """`encode` gives the same ids as `Tokenizer.encode_checked`, or raises Mismatch."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        import fastokens

        self._reference = tokenizer
        self._fast = fastokens.Tokenizer.from_json_str(json.dumps(fused(json.loads(tokenizer.source))))
        spelled = [text for text in AWKWARD if tokenizer.unspellable(text) is None]
        self._compare(spelled, self._encode(spelled))

    def _encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        ids, offsets = self._fast.encode_batch_flat(list(texts), False, True)
        ends = np.frombuffer(offsets, "<u8").astype(np.int64)[1:-1]
        return np.split(np.frombuffer(ids, "<u4"), ends)

    def _compare(self, texts: Sequence[str], found: list[np.ndarray]) -> None:
        for text, mine, wanted in zip(texts, found, self._reference.encode_checked(texts)):
            if not np.array_equal(mine, wanted):
                raise Mismatch(f"fastokens and tokenizers differ on {text[:80]!r}")

    def encode(self, texts: Sequence[str], hashes: Sequence[int]) -> list[np.ndarray]:
        """hashes: 64-bit, of each text; they choose what is checked."""
        found = self._encode(texts)
        check = [i for i, h in enumerate(hashes) if h < RECHECK]
        self._compare([texts[i] for i in check], [found[i] for i in check])
        return found


def available() -> bool:
    return importlib.util.find_spec("fastokens") is not None


def fast_encoder(tokenizer: Tokenizer) -> FastEncoder | None:
    """The fast path for `tokenizer`; None when there is none that agrees with the reference."""
    if tokenizer.is_bytes or not available():
        return None
    try:
        return FastEncoder(tokenizer)
    except Exception:  # unsupported tokenizer.json, another API, or a Mismatch: the reference does it
        return None


def fused(spec: dict) -> dict:
    """`spec` with Digits + ByteLevel written as one expression; anything else is left alone."""
    steps = (spec.get("pre_tokenizer") or {}).get("pretokenizers") or []
    if [s["type"] for s in steps] != ["Digits", "ByteLevel"]:
        return spec
    digits, level = steps
    if not digits["individual_digits"] or not level.get("use_regex", True) or level["add_prefix_space"]:
        return spec
    split = {
        "type": "Split",
        "pattern": {"Regex": DIGITS_AND_GPT2},
        "behavior": "Isolated",
        "invert": False,
    }
    return {
        **spec,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, {**level, "use_regex": False}]},
    }
