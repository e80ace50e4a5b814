"""The page of published names is true: every flag parses, every name is there, every launcher passes on."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
from dataclasses import fields
from functools import reduce
from pathlib import Path

import pytest

from model.compress.base import METHODS
from train.compress import options_of
from train.compress_eval import parser as evaluation

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "model" / "compress" / "NAMES.md").read_text()
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.S | re.M))
NAMES = sorted(set(re.findall(r"`((?:model|train|dataset)\.[\w.]+)`", PAGE)))
COMMANDS = re.findall(r"^    python train/compress\.py (.*)$", PAGE, re.M)
OWN = {title: title.split(", ")[-1] for title in SECTIONS if title != "Gone"}  # the method that has them all


def flags() -> list[tuple[str, str, bool]]:
    """(method, flag with its value, whether the page calls the value the default)."""
    found = []
    for title, method in OWN.items():
        lines = SECTIONS[title].splitlines()
        tables = "\n".join(line for line in lines if line.startswith("|"))
        said, _, other = "\n".join(line for line in lines if not line.startswith("|")).partition(
            "Not defaults:"
        )
        for text, default in ((said, True), (other, False), (tables, False)):
            for flag, note in re.findall(r"`(--[^`]+)`(?: \((default|none)\))?", text):
                found.append((method, f"{flag} 0.5" if note == "none" else flag, default ^ bool(note)))
    return found


FLAGS = flags()
LAUNCHED = {"BASE": "opt-2.7b", "BATCH": "32", "LR": "1e-4", "NUM_GPUS": "4", "CML": "12", "DATA": "t.txt"}


def test_the_page_was_read():
    assert len(NAMES) > 20 and len(COMMANDS) == 3 and len(FLAGS) > 30 and len(SECTIONS) == 6


@pytest.mark.parametrize("name", NAMES)
def test_names_are_there(name):
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            module = importlib.import_module(".".join(parts[:cut]))
        except ImportError:
            continue
        assert reduce(getattr, parts[cut:], module) is not None
        return
    raise AssertionError(name)


@pytest.mark.parametrize("method,flag,default", FLAGS, ids=str)
def test_flags_parse_and_defaults_are_true(method, flag, default):
    words = shlex.split(flag)
    args = options_of(["--method", method, *words])
    if default:
        known = {f.name: f.default for f in fields(METHODS.get(method).Config)}
        assert getattr(args, words[0][2:]) == known[words[0][2:]]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command):
    words = shlex.split(command)
    method = options_of(words).method
    assert METHODS.get(method) is not None
    assert "--method" not in words or words[words.index("--method") + 1] == method


def test_what_is_gone_is_refused():
    for flag in re.findall(r"`(--[^`]+)`", SECTIONS["Gone"]):
        with pytest.raises(SystemExit):
            options_of(["--method", "condense", flag])


def launched(name: str, **variables: str) -> list[str]:
    """The command a launcher ends in: Python is an echo."""
    env = {"PATH": os.environ["PATH"], "PYTHON": "echo", **variables}
    script = ROOT / "train" / "run" / name
    out = subprocess.run(["bash", script], env=env, capture_output=True, text=True, check=True).stdout
    return out.split()


@pytest.mark.parametrize("script", ["train.sh", "train_llama.sh"])
def test_launchers_read_their_variables(script):
    words = launched(script, **LAUNCHED)
    assert words[:4] == ["-m", "torch.distributed.run", "--nproc-per-node", "4"]
    args = options_of(words[words.index("train/compress.py") + 1 :])
    assert args.method == "variable_autocompressor" and args.decoder == "facebook/opt-2.7b"
    assert (args.batch, args.learning_rate, args.compression_max_len) == (32, 1e-4, 12)
    assert args.tune == ("full" if script == "train.sh" else "lora") and args.data == "t.txt"
    default = launched(script, DATA="t.txt")
    args = options_of(default[default.index("train/compress.py") + 1 :])
    want = ("facebook/opt-125m", 16, 2e-5) if script == "train.sh" else ("meta-llama/Llama-2-7b-hf", 32, 8e-4)
    assert (args.decoder, args.batch, args.learning_rate) == want


def test_mode_fa_is_passed_on():
    words = launched("eval_llama.sh", MODE="FA", DATA="t.txt")
    assert words[0] == "train/compress_eval.py"
    assert evaluation().parse_args(words[1:]).mode == "FA"
