"""Text to ids and back with the tokenizer that lies in a run's folder."""

from __future__ import annotations

import json
from pathlib import Path

from model.schema import ConfigError


def tokenizer_of(folder: Path) -> Path:
    """A run keeps it beside its checkpoints; a checkpoint folder lies two levels further down."""
    for place in (folder, folder.parent.parent):
        if (place / "tokenizer.json").is_file():
            return place / "tokenizer.json"
    return folder / "tokenizer.json"


class Text:
    """`tokenizer.json` of a run: of the tokenizers library, or the bytes tokenizer (ids 0..255 are bytes)."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise ConfigError([f"{path}: the run keeps no tokenizer; give the prompt's ids with --ids"])
        source = path.read_text(encoding="utf-8")
        self._backend = None
        if json.loads(source).get("type") != "bytes":
            from tokenizers import Tokenizer

            self._backend = Tokenizer.from_str(source)
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
    """Decodes a growing list of ids and gives only what is new and final: a character may take several."""

    def __init__(self, text: Text) -> None:
        self.text, self.shown = text, 0
        self.ids: list[int] = []

    def add(self, token: int) -> str:
        self.ids.append(token)
        whole = self.text.decode(self.ids)
        if whole.endswith("�"):
            return ""  # in the middle of a character
        new, self.shown = whole[self.shown :], len(whole)
        return new
