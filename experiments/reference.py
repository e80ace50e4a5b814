"""`python -m experiments.reference`: writes docs/reference.md, every key and every flag, from the code.

Keys, types and defaults are those of the dataclasses and signatures that the configuration reader uses; the
text beside them is their docstring. Flags are the parsers'. `--check` writes nothing and says whether the
page is current.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import dataset.__main__
import experiments.__main__
import model.__main__
import train.__main__
import train.compress
import train.compress_eval
import train.evaluate
import train.outer.watch
import train.pretrain
from model import grammar, schema, sections
from model.compress.base import METHODS, CompressorConfig
from model.registry import BLOCKS, QUANTIZERS, WRAPS, Registry

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reference.md"
HEAD = """\
# Reference

Made from the code by `make docs` (`python -m experiments.reference`); do not edit. A test holds it current.
What the forms mean together: [the architecture page](../model/README.md), [training](../train/README.md),
[outer loops](../train/outer/README.md), [data](../dataset/README.md),
[compression](../model/compress/README.md).

"""
SECTIONS: dict[str, tuple[type, ...]] = {  # the dataclasses behind each section of a file
    "embed": (schema.EmbedConfig, schema.TableVQ),
    "heads": (schema.HeadConfig,),
    "run": (sections.RunConfig, sections.BatchWarmup),
    "optim": (sections.OptimConfig, sections.MupConfig),
    "schedule": (sections.ScheduleConfig,),
    "loss": (sections.LossConfig,),
    "select": (sections.SelectConfig, sections.RhoConfig),
    "activations": (sections.ActivationsConfig,),
    "nowcast": (sections.NowcastConfig,),
    "outer": (sections.OuterConfig,),
    "grow": (sections.GrowConfig,),
}
FORMS = (
    *(grammar.BlockNode, grammar.UseNode, grammar.RepeatNode, grammar.MirrorNode, grammar.WrapNode),
    *(grammar.WrapSpec, grammar.BySpec, grammar.YocoNode, grammar.YocoSpec, grammar.MemorySpec, grammar.Keep),
    *(grammar.OnionNode, grammar.ShellNode, grammar.QuantSpec, grammar.Merge, grammar.Blend),
)
REGISTRIES: tuple[tuple[str, Registry], ...] = (
    ("Blocks", BLOCKS),
    ("Quantizers", QUANTIZERS),
    ("Wraps", WRAPS),
)
NAMES: dict[Any, str] = {
    Any: "value",
    str: "text",
    dict: "mapping",
    int: "integer",
    float: "number",
    bool: "true or false",
}
Row = tuple[str, ...]


def page() -> str:
    """The whole page as Markdown."""
    body = [HEAD, *keys(), *forms(), *registered(), *methods(), *flags()]
    return "\n".join(line.rstrip() for line in "".join(body).splitlines()) + "\n"


# ----------------------------------------------------------------------------- keys


def keys() -> Iterator[str]:
    yield "## Keys of a file\n\n" + said(schema.Config)
    yield "`extends: FILE` takes another file's keys first. Any key can be given as `--set a.b=VALUE`.\n\n"
    yield fields_table(schema.Config)
    for name, classes in SECTIONS.items():
        yield f"### `{name}`\n\n"
        for cls in classes:
            if cls is not classes[0]:
                yield f"**{cls.__name__}**\n\n"
            yield said(cls) + fields_table(cls)


def forms() -> Iterator[str]:
    yield "## Forms of a stack\n\n"
    for cls in FORMS:
        yield f"### {cls.__name__}\n\n" + said(cls) + fields_table(cls)


def registered() -> Iterator[str]:
    for title, registry in REGISTRIES:
        yield f"## {title}\n\n"
        for name in registry.names():
            rows = [(f"`{p.name}`", kind(p.type), plain(p.default)) for p in registry.params(name).values()]
            yield f"### `{name}`\n\n" + said(registry.get(name))
            yield table(("parameter", "type", "default"), rows)


def methods() -> Iterator[str]:
    yield "## Compression methods\n\nKeywords of `model.compress.wrap`, flags of `train/compress.py`.\n\n"
    yield "### Every method: options\n\n" + said(CompressorConfig)
    for name in METHODS.names():
        config = METHODS.get(name).Config  # type: ignore[attr-defined]
        own = [c for c in reversed(config.__mro__) if issubclass(c, CompressorConfig)][1:]
        yield f"### `{name}`: options\n\n" + "".join(map(said, own)) + fields_table(config)


def fields_table(cls: type) -> str:
    """Key, type and default of every field of a dataclass that a file can say."""
    hints = typing.get_type_hints(cls)
    rows = []
    for field in dataclasses.fields(cls):
        if field.metadata.get("mark"):
            continue
        default: Any = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        name = field.name.rstrip("_")
        shown = "required" if default is dataclasses.MISSING else plain(default)
        rows.append((f"`{name}`", kind(hints[field.name]), shown))
    return table(("key", "type", "default"), rows)


def said(cls: type) -> str:
    """The class's own docstring, as it stands."""
    text = inspect.cleandoc(cls.__doc__ or "")
    for field in dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ():
        if field.name.endswith("_"):  # `from_` is `from` in a file
            key = field.name.rstrip("_")
            text = text.replace(f"{field.name}:", f"{key}: ").replace(f"`{field.name}`", f"`{key}`")
    generated = text.startswith(f"{cls.__name__}(")  # a dataclass without one of its own
    return f"```text\n{text}\n```\n\n" if text and not generated else ""


def kind(hint: Any) -> str:
    """A type as a reader writes it: `int or null`, `cpu, cuda`, `list of float`."""
    args = typing.get_args(hint)
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        return ", ".join(f"`{a}`" for a in args)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(kind(a) for a in args))
    if origin in (list, tuple):
        return f"list of {kind(args[0])}"
    if origin is dict:
        return f"mapping of {kind(args[1])}"
    if hint is type(None):
        return "null"
    if isinstance(hint, type) and issubclass(hint, grammar.Node):
        return "form"
    if any(hint is classes[0] for classes in SECTIONS.values()):
        return "section"
    return NAMES.get(hint) or str(getattr(hint, "__name__", hint))


def plain(value: Any) -> str:
    """A default as YAML would say it; a section's own defaults are in its table."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return "see there"
    if isinstance(value, dict) and any(dataclasses.is_dataclass(v) for v in value.values()):
        return ", ".join(f"`{key}`" for key in value)
    if value is None or isinstance(value, bool):
        return f"`{str(value).lower().replace('none', 'null')}`"
    if isinstance(value, tuple):
        value = list(value)
    return f"`{value}`" if value != "" else '`""`'


# ----------------------------------------------------------------------------- flags


def flags() -> Iterator[str]:
    yield "## Command lines\n\n"
    for name, parser in commands().items():
        yield f"### `{name}`\n\n"
        if parser.description:
            yield f"```text\n{inspect.cleandoc(parser.description)}\n```\n\n"
        yield table(("argument", "meaning"), [argument(a, parser) for a in parser._actions if told(a)])


def commands() -> dict[str, argparse.ArgumentParser]:
    """Every command line by what is typed, subcommands one by one."""
    out: dict[str, argparse.ArgumentParser] = {
        "python train/pretrain.py": train.pretrain.parser(),
        "python train/evaluate.py": train.evaluate.parser(),
        "python train/compress.py": train.compress.parser(None),
        "python train/compress_eval.py": train.compress_eval.parser(),
    }
    packages = {
        "model": model.__main__.parser(),
        "train": train.__main__.parser(),
        "dataset": dataset.__main__.parser(),
        "experiments": experiments.__main__.parser(),
    }
    for package, parser in packages.items():
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                helps = {choice.dest: choice.help for choice in action._choices_actions}
                for word, inner in action.choices.items():
                    inner.description = inner.description or helps.get(word)
                    out[f"python -m {package} {word}"] = inner
    out["python -m train serve"] = train.outer.watch.parser()
    return out


def told(action: argparse.Action) -> bool:
    return not isinstance(action, argparse._HelpAction) and action.help != argparse.SUPPRESS


def argument(action: argparse.Action, parser: argparse.ArgumentParser) -> Row:
    """`--flag VALUE` and its help, with the default where the help does not say it."""
    value = action.metavar or ("{" + ",".join(map(str, action.choices)) + "}" if action.choices else None)
    if isinstance(value, tuple):
        value = " ".join(value)
    if action.option_strings:
        takes = action.nargs != 0
        shown = ", ".join(action.option_strings) + (f" {value or action.dest.upper()}" if takes else "")
    else:
        shown = value or action.dest.upper()
    text = (action.help or "") % {**vars(action), "prog": parser.prog}
    silent = action.default in (None, False, True, argparse.SUPPRESS) or action.default in ([], ())
    if not silent and "(" not in text and "default" not in text:
        text = f"{text} (default {action.default})".strip()
    return f"`{shown}`", text + (" **required**" if action.required and action.option_strings else "")


def table(titles: Row, rows: Sequence[Row]) -> str:
    """A Markdown table, or nothing where there are no rows."""
    if not rows:
        return ""
    cells = [[re.sub(r"\s+", " ", cell).replace("|", r"\|") for cell in row] for row in rows]
    lines = [titles, ("---",) * len(titles), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n\n"


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m experiments.reference", description=__doc__.split("\n")[0])
    p.add_argument("--check", action="store_true", help="write nothing; exit 2 when the page is not current")
    args = p.parse_args(argv)
    text = page()
    if args.check:
        current = PAGE.is_file() and PAGE.read_text(encoding="utf-8") == text
        print(f"{PAGE}: {'current' if current else 'not current; make docs'}")
        return 0 if current else 2
    PAGE.write_text(text, encoding="utf-8")
    print(PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
