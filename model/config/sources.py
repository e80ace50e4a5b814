"""Where a configuration comes from: files and archs by name, `extends`, and overrides on top."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from model.config.yamlnodes import WalkError, Yaml, assign, from_data, merge, parse
from model.registry import did_you_mean
from model.schema import ConfigError, Mark

ARCHS = Path(__file__).resolve().parents[1] / "archs"


class Errors:
    """What is wrong, with its places; `lines` gives it file by file, in the order of the file."""

    def __init__(self) -> None:
        self.found: list[tuple[Mark, str, str]] = []  # place, path, message

    def report(self, mark: Mark, path: str, message: str) -> None:
        self.found.append((mark, path, message))

    @property
    def lines(self) -> list[str]:
        files = list(dict.fromkeys(mark.file for mark, _, _ in self.found))
        order = sorted(self.found, key=lambda e: (files.index(e[0].file), e[0].line, e[0].column))
        return list(dict.fromkeys(f"{replace(mark, path=path)}: {message}" for mark, path, message in order))


def gather(
    source: str | Path | Mapping[str, Any],
    sets: Iterable[str] | Mapping[str, Any],
    search: list[Path],
    errors: Errors,
) -> tuple[Yaml, str]:
    """The merged tree of a configuration and its default name.

    Raises ConfigError when a file is missing, cannot be read or is not YAML: there is no tree to go on
    with. Everything else goes to `errors`.
    """
    if isinstance(source, Mapping):
        root = from_data(dict(source), Mark(), errors.report)
        return override(extended(root, Path(), search, (), errors), sets, errors), "unnamed"
    path = find(str(source), [Path(), *search, ARCHS])
    if path is None:
        raise ConfigError([not_found(str(source), [Path(), *search, ARCHS])])
    root = extended(read(path, errors), path.parent, search, (path.resolve(),), errors)
    return override(root, sets, errors), path.stem


def find(name: str, folders: Iterable[Path]) -> Path | None:
    """The first of folder/name and folder/name.yaml that is a file."""
    for folder in folders:
        for path in (folder / name, folder / f"{name}.yaml"):
            if path.is_file():
                return path
    return None


def not_found(name: str, folders: list[Path]) -> str:
    known = {p.stem for folder in folders for p in folder.glob("*.yaml")}
    file = name if name.endswith(".yaml") else f"{name}.yaml"
    places = ", ".join(dict.fromkeys(shown(folder) for folder in folders))
    return f"{file}: no such file; looked in {places}{did_you_mean(name.removesuffix('.yaml'), known)}"


def shown(path: Path) -> str:
    """A path as messages give it: relative to the working folder where it lies below that."""
    full = path.resolve()
    return str(full.relative_to(Path.cwd())) if full.is_relative_to(Path.cwd()) else str(full)


def read(path: Path, errors: Errors) -> Yaml:
    file = shown(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not UTF-8 at byte {error.start}"
        raise ConfigError([*errors.lines, f"{file}: cannot be read: {reason}"]) from None
    root = parse(text, file, errors.report)
    if root is None:
        raise ConfigError(errors.lines)
    return root


def extended(root: Yaml, folder: Path, search: list[Path], chain: tuple[Path, ...], errors: Errors) -> Yaml:
    """The tree on top of what it extends, which may itself extend something.

    folder: of the file, where a base is looked for first.  chain: files on the way here.
    A base's `name` is its own and is not handed on.
    """
    if not isinstance(root.value, dict) or "extends" not in root.value:
        return root
    own = Yaml({k: v for k, v in root.value.items() if k != "extends"}, root.mark, root.keys)
    node = root.value["extends"]
    if node.value is None:
        return own
    if not isinstance(node.value, str):
        errors.report(node.mark, "extends", f"want a file or an arch name, got {node.show()}")
        raise ConfigError(errors.lines)
    folders = [folder, *search, ARCHS]
    path = find(node.value, folders)
    if path is None:
        errors.report(node.mark, "extends", not_found(node.value, folders))
        raise ConfigError(errors.lines)
    if path.resolve() in chain:
        circle = " -> ".join(p.name for p in (*chain[chain.index(path.resolve()) :], path))
        errors.report(node.mark, "extends", f"goes round in a circle: {circle}")
        raise ConfigError(errors.lines)
    base = extended(read(path, errors), path.parent, search, (*chain, path.resolve()), errors)
    if isinstance(base.value, dict):
        base.value.pop("name", None)
    return merge(base, own)


def override(root: Yaml, sets: Iterable[str] | Mapping[str, Any], errors: Errors) -> Yaml:
    """Overrides on top of the tree: see `model.config.load`."""
    if isinstance(sets, Mapping):
        mark = Mark("overrides")
        plain = {key: value for key, value in sets.items() if "." not in key}
        root = merge(root, from_data(plain, mark, errors.report)) if plain else root
        for key, value in sets.items():
            if "." in key:
                root = _put(root, key, from_data(value, mark, errors.report, key), errors)
        return root
    for i, text in enumerate([sets] if isinstance(sets, str) else sets):
        mark = Mark(f"--set #{i + 1}")
        key, equals, written = text.partition("=")
        key = key.strip()
        if not equals or not all(key.split(".")):
            errors.report(mark, "", f"want key.path=value, got {text!r}")
            continue
        mistakes = Errors()
        value = parse(written, mark.file, mistakes.report)
        for _, _, message in mistakes.found:
            errors.report(mark, key, message)
        if value is not None:
            root = _put(root, key, from_data(value.plain(), mark, errors.report, key), errors)
    return root


def _put(root: Yaml, key: str, value: Yaml, errors: Errors) -> Yaml:
    if not isinstance(root.value, dict):
        return root
    try:
        return assign(root, key.split("."), value)
    except WalkError as error:
        errors.report(value.mark, error.path, error.message)
        return root
