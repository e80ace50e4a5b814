"""Text to ids and back with the tokenizer that lies in a run's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from model.schema import ConfigError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def tokenizer_of(folder: Path) -> Path:
    """A run keeps it beside its checkpoints; a checkpoint folder lies two levels further down."""
    for place in (folder, folder.parent.parent):
        if (place / "tokenizer.json").is_file():
            return place / "tokenizer.json"
    return folder / "tokenizer.json"


def read_tokenizer(path: Path) -> Tokenizer | None:
    """The tokenizer of a `tokenizer.json`; None: it is the bytes tokenizer. Raises ConfigError."""
    from tokenizers import Tokenizer

    source = path.read_text(encoding="utf-8", errors="replace")
    try:
        if json.loads(source).get("type") == "bytes":
            return None
        return Tokenizer.from_str(source)
    except Exception as error:  # the library raises nothing more special
        raise ConfigError([f"{path}: cannot be read as a tokenizer ({error})"]) from error


class Text:
    """`tokenizer.json` of a run: of the tokenizers library, or the bytes tokenizer (ids 0..255 are bytes)."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise ConfigError([f"{path}: the run keeps no tokenizer; give the prompt's ids with --ids"])
        self._backend = read_tokenizer(path)
        if self._backend is not None:
            self._backend.encode_special_tokens = True  # literal control strings are ordinary text

    def encode(self, text: str) -> list[int]:
        if self._backend is None:
            return list(text.encode())
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """Control ids stand for no text; bytes that are not UTF-8 show as the replacement character."""
        if self._backend is None:
            return bytes(i for i in ids if i < 256).decode(errors="replace")
        return self._backend.decode(ids, skip_special_tokens=True)


class Printer:
    """Decodes a growing list of ids and gives only what is new and final: a character may take several.

    prompt: ids before the first new one. What a token says may depend on them: some tokenizers drop the blank
            before a first word.
    """

    def __init__(self, text: Text, prompt: list[int]) -> None:
        self.text, self.shown = text, len(text.decode(prompt))
        self.ids = list(prompt)

    def add(self, token: int) -> str:
        self.ids.append(token)
        whole = self.text.decode(self.ids)
        return "" if whole.endswith("�") else self._new(whole)  # in the middle of a character

    def rest(self) -> str:
        """What is left at the end: a character that was never finished."""
        return self._new(self.text.decode(self.ids))

    def _new(self, whole: str) -> str:
        new, self.shown = whole[self.shown :], len(whole)
        return new
