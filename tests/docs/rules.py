"""How `make test-docs` runs each command of the documentation: the first rule whose pattern is found in it.

how:    run       as written, with `extra` arguments appended that make it short
        parsed    its flags are parsed by the fast suite, and `reason` says why it is not run
        template  the same, and what the reader fills in is replaced first, or missing
        foreign   not a command of this project
needs:  commands of the pages that must have run before.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

PREPARE = (
    "python -m dataset prepare --source pystdlib --tokenizer smollm2-135m-instruct --merges 2048 "
    "--out data/pystdlib"
)
TRAIN = "python train/pretrain.py --arch samba.yaml --set dim=192 --set run.steps=100"
GROW = (
    "python train/pretrain.py --arch onion_stage1.yaml --arch onion_stage2.yaml --run runs/grown "
    "--set run.steps=60"
)
STAGES = tuple(f"torchrun train/pretrain.py --arch onion_stage{n}.yaml" for n in (1, 2, 3))
CONDENSE = "python train/compress.py --method condense --test --run runs/condense"
PAST = "python train/pretrain.py --arch samba.yaml --run runs/past --set run.save_every=100 --set run.keep=99"
FIT = (
    "python -m experiments.nowcast.fit runs/past --every 100 --history 5 --ahead 5 "
    "--out runs/nowcast.safetensors"
)
REFERENCE = (
    "python train/pretrain.py --arch samba.yaml --run runs/reference --set dim=192 --set run.steps=400"
)
TAUGHT = (
    "python -m dataset continue data/pystdlib --model smollm2-135m-instruct --documents 500 --out data/taught"
)
FIRST = "python -m experiments run experiments/first"
IMPORT = "python -m model import smollm2-135m-instruct --out runs/smollm2"


def sets(**keys: object) -> tuple[str, ...]:
    """`--set run.KEY=VALUE` for each."""
    return tuple(word for key, value in keys.items() for word in ("--set", f"run.{key}={value}"))


SMALL = sets(steps=2, batch=2, context=64, eval_tokens=256)
ONION = (*SMALL, "--set", "schedule.warmup=0")  # its own is 20 steps
NARROW = ("--set", "dim=192")
FILLED_IN = "ARCH BRANCH DATA DIR FILE HEAD HOST METHOD NAME PATH RUN RUNS SIDECAR SWEEP TOKENIZER"
PLACEHOLDER = rf"\.\.\.|\b({FILLED_IN.replace(' ', '|')})\b|\bA B C\b"
BARE = r"^python -m \w+ \w+$|^torchrun train/pretrain.py$"


@dataclass(frozen=True)
class Rule:
    pattern: str
    how: Literal["run", "parsed", "template", "foreign"]
    reason: str = ""
    extra: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()


RULES = (
    Rule(r"^make help", "run"),
    Rule(r"^make ", "parsed", "minutes to hours; the target is there, and its area has slow tests"),
    Rule(r"^python train\.py", "foreign", "how the published project is called"),
    Rule(r"^(export|source|cd|pip|git) ", "foreign", "changes the reader's shell or environment"),
    Rule(r"^(for|sbatch|ssh|ssh-keyscan) ", "foreign", "needs other machines or a scheduler"),
    Rule(r"^docker ", "foreign", "needs a container engine"),
    Rule(r"^ansible-playbook |playbooks/|vault\.yml", "parsed", "needs machines; tests/cluster plays them"),
    Rule(r"^python -m model backends$", "run"),
    Rule(PLACEHOLDER, "template", "the reader fills it in"),
    Rule(BARE, "template", "the name of a command"),
    Rule(r"opt-125m|gpt2", "parsed", "downloads weights of others"),
    Rule(
        r"--listen 192|server: \"192|status 192",
        "parsed",
        "an address of the reader's; tests/outer runs it on loopback",
    ),
    Rule(r"tests\.train\.test_mup", "parsed", "trains six models; tests/train/test_mup.py does a part of it"),
    Rule(r"-m pytest", "parsed", "the fast suite does it"),
    Rule(r"-m experiments\.bench", "parsed", "minutes, on a machine that does nothing else"),
    Rule(
        r"compression\.study", "parsed", "an hour; tests/experiments/test_compression_study.py runs it small"
    ),
    Rule(r"experiments\.diloco\.study --only", "parsed", "an hour; the fast suite runs its coordinator"),
    Rule(r"--help$", "run"),
    Rule(r"-m experiments run .*--dry-run", "run", needs=(PREPARE,)),
    Rule(r"-m experiments run experiments/first$", "run", needs=(PREPARE,)),
    Rule(r"-m experiments report experiments/first$", "run", needs=(FIRST,)),
    Rule(r"-m experiments run ", "run", "hours; the plan of its runs is made", ("--dry-run",), (PREPARE,)),
    Rule(r"-m experiments prepare ", "run", needs=(PREPARE,)),
    Rule(r"-m experiments merge ", "parsed", "needs another machine's runs; tests/experiments merges some"),
    Rule(r"-m experiments report ", "parsed", "there is nothing to report before the runs"),
    Rule(r"^" + re.escape(PREPARE), "run"),
    Rule(r"-m dataset (info|decode)", "run", needs=(PREPARE,)),
    Rule(r"-m dataset task ", "run", "20,000 samples", ("--samples", "20", "--heldout-samples", "4")),
    Rule(r"-m model show", "run"),
    Rule(r"-m model import", "run"),
    Rule(r"-m model export runs/samba", "run", needs=(TRAIN,)),
    Rule(r"-m model generate runs/samba", "run", "100 tokens", ("--max-new-tokens", "4"), (TRAIN,)),
    Rule(r"-m model generate runs/smollm2", "run", "100 tokens", ("--max-new-tokens", "2"), (IMPORT,)),
    Rule(r"-m train status", "run", needs=(TRAIN,)),
    Rule(r"-m train report runs/grown", "run", needs=(GROW,)),
    Rule(r"-m train report runs/onion", "run", needs=STAGES),
    Rule(r"train/evaluate\.py runs/samba", "run", "131,072 tokens", ("--tokens", "512"), (TRAIN,)),
    Rule(r"--arch samba\.yaml --set dim=192 .*--resume", "run", "100 steps", SMALL, (TRAIN,)),
    Rule(r"--arch samba\.yaml --set dim=192", "run", "100 steps", SMALL, (PREPARE,)),
    Rule(r"--arch samba\.yaml --dry-run", "run", "the full width", SMALL + NARROW, (PREPARE,)),
    Rule(r"--run runs/grown", "run", "120 steps", ONION, (PREPARE,)),
    Rule(r"--arch onion_stage1", "run", "120 steps", ONION, (PREPARE,)),
    Rule(r"--arch onion_stage2", "run", "80 steps", ONION, STAGES[:1]),
    Rule(r"--arch onion_stage3", "run", "80 steps", ONION, STAGES[:2]),
    Rule(r"kind: diloco, every: 10}", "run", "40 steps", SMALL, (PREPARE,)),
    Rule(r"--nnodes 3", "parsed", "three machines; tests/outer runs the workers"),
    Rule(
        r"--run runs/past", "run", "a whole run", (*SMALL, *NARROW, *sets(steps=12, save_every=1)), (PREPARE,)
    ),
    Rule(r"--run runs/reference", "run", "400 steps", SMALL, (PREPARE,)),
    Rule(
        r"-m dataset score data/pystdlib --model runs/reference",
        "run",
        "all of the text",
        ("--split", "heldout"),
        (REFERENCE,),
    ),
    Rule(
        r"--run runs/chosen",
        "parsed",
        "needs losses on all of the text; tests/train/test_select.py trains by some",
    ),
    Rule(r"-m dataset continue", "run", "500 documents", ("--documents", "2", "--new", "8"), (PREPARE,)),
    Rule(r"--run runs/taught", "run", "a whole run", SMALL, (TAUGHT,)),
    Rule(r"nowcast\.fit", "run", "2,000 steps", ("--every", "1", "--steps", "2"), (PAST,)),
    Rule(r"--run runs/jumping", "run", "a whole run", SMALL + NARROW, (FIT,)),
    Rule(r"--run runs/wiener", "run", "a whole run", SMALL + NARROW, (PREPARE,)),
    Rule(r"--method condense --test", "run", "20 steps", ("--steps", "1", "--eval_examples", "2")),
    Rule(
        r"compress_eval\.py --compressor runs/condense",
        "run",
        "128 windows",
        ("--examples", "2"),
        (CONDENSE,),
    ),
)


def rule_of(text: str) -> Rule | None:
    """The first rule that speaks of the command."""
    return next((rule for rule in RULES if re.search(rule.pattern, text)), None)
