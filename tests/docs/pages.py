"""What the documentation says: its pages, links, named files and commands.

A command is a line of a code block without a language (or bash), or inline code that begins with one of
`PROGRAMS`. Blocks marked `text` show output; python and yaml blocks have tests of their own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("docs", "model", "train", "dataset", "experiments", "playbooks", "tests")
GENERATED = {"docs/reference.md"}  # headings there name commands without their arguments
PROGRAMS = ("python", "torchrun", "make", "bash")
OTHERS = (
    "ssh",
    "sbatch",
    "export",
    "for",
    "pip",
    "source",
    "docker",
    "ansible-playbook",
    "cd",
    "git",
    "cp",
    "ssh-keyscan",
    "ansible-vault",
    "alias",
    "play",
)


@dataclass(frozen=True)
class Command:
    """One command: the page that first says it, and its text on one line, without comment."""

    page: str
    text: str


def pages() -> list[Path]:
    found = [*ROOT.glob("*.md"), *(p for f in FOLDERS for p in (ROOT / f).rglob("*.md"))]
    return sorted(p for p in found if not any(part.startswith(".") for part in p.relative_to(ROOT).parts))


def fenced(text: str) -> list[tuple[str, str]]:
    """(language, body) of every fenced block, and of blocks that are indented by four spaces."""
    out = re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S)
    rest = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    blocks = re.findall(r"(?<=\n\n)((?: {4}.*\S.*\n)+)", rest)
    return [*out, *(("", re.sub(r"^ {4}", "", body, flags=re.M)) for body in blocks)]


def lines_of(body: str) -> list[str]:
    """Logical lines: continuations joined."""
    return [line.strip() for line in re.sub(r"\\\n\s*", "", body).splitlines() if line.strip()]


def uncommented(line: str) -> str:
    """A line up to a ` #` that stands outside of quotes."""
    quote = ""
    for i, c in enumerate(line):
        if quote:
            quote = "" if c == quote else quote
        elif c in "'\"":
            quote = c
        elif c == "#" and line[:i].endswith(" "):
            return line[:i].strip()
    return line.strip()


def begins(line: str, programs: tuple[str, ...]) -> bool:
    words = line.split()
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):  # BASE=opt-2.7b bash train/run/train.sh
        words.pop(0)
    return bool(words) and words[0] in programs


def commands() -> list[Command]:
    """Every distinct command, with the first page that says it."""
    found: dict[str, Command] = {}
    for page in pages():
        name = str(page.relative_to(ROOT))
        if name in GENERATED:
            continue
        text = page.read_text(encoding="utf-8")
        said = [line for lang, body in fenced(text) if lang in ("", "bash", "sh") for line in lines_of(body)]
        said = [line for line in said if begins(line, PROGRAMS + OTHERS)]
        plain = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
        inline = re.findall(r"`((?:" + "|".join(PROGRAMS) + r") [^`\n]+)`", plain)
        for line in [*said, *inline]:
            line = uncommented(line)
            found.setdefault(line, Command(name, line))
    return list(found.values())


def links(text: str) -> list[str]:
    """Targets of links and pictures."""
    plain = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    plain = re.sub(r"`[^`\n]*`", "", plain)
    return re.findall(r"\]\(([^)\s]+)\)", plain)


def anchors(text: str) -> set[str]:
    """Fragments of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in heads}


def named_files(text: str) -> list[str]:
    """Inline code that is a path of ours: a known folder, a slash, and no placeholder."""
    found = re.findall(r"`((?:" + "|".join(FOLDERS) + r")/[\w./-]+)`", text)
    return [f for f in found if not re.search(r"[A-Z]{4,}", Path(f).name.split(".")[0]) or f.endswith(".md")]
