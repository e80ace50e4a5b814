"""Corpus in, dataset out: parallel, kill-safe, and byte-identical at any number of workers.

OUT/.prepare holds the plan's digest and the receipts of finished tasks while the work lasts. The manifest
is built from all receipts in task order and written last: without it, nothing opens.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
from collections import Counter
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dataset.files import TEMPORARY, DatasetError, digest, explain, read_json, write_bytes, write_json
from dataset.format import SPLITS, Dataset, open_dataset, write_manifest
from dataset.plan import Plan, Request
from dataset.plan import plan as make_plan
from dataset.tokenizers import Tokenizer
from dataset.work import WORK, How, all_receipts, one_core, run_task, start_worker, work

COUNTED = ("documents", "tokens", "text_bytes", "errors", "empty", "dropped_by_length")


@dataclass
class Report:
    """What a `prepare` call did. dataset: None when tasks are left (only with `task`)."""

    dataset: Dataset | None
    done: int
    tasks: int
    counts: Counter[str] = field(default_factory=Counter)
    messages: list[str] = field(default_factory=list)
    reused: bool = False


def prepare(
    request: Request,
    out: Path,
    workers: int = 1,
    task: tuple[int, int] | None = None,
    how: How = How(),  # noqa: B008 - frozen
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Tokenize `request.sources` into the dataset folder `out`.

    workers: processes. task: (i, n) does only tasks i, i+n, ... and writes no manifest; a last call without
    `task` does what is left and writes it. progress: called with (bytes read, bytes in all).
    Raises DatasetError; what was finished before stays valid and is taken up by the next call.
    """
    the_plan = make_plan(request)
    if (existing := _claim(the_plan, out)) is not None:
        return Report(existing, len(the_plan.tasks), len(the_plan.tasks), reused=True)
    left = [index for index, done in all_receipts(out, the_plan) if done is None]
    if task is not None:
        left = [index for index in left if index % task[1] == task[0]]
    _run(the_plan, left, out, workers, how, progress)
    receipts = [found for _, found in all_receipts(out, the_plan) if found is not None]
    report = Report(None, len(receipts), len(the_plan.tasks))
    for one in (i for done in receipts for i in done["inputs"]):
        report.counts.update({key: one.get(key, 0) for key in COUNTED})
        report.messages += [f"{one['name']}:{m['line']}: {m['message']}" for m in one.get("messages", ())]
    if task is None:
        report.dataset = _finish(the_plan, receipts, report, out)
    return report


def _claim(plan: Plan, out: Path) -> Dataset | None:
    """Make `out` ours, or give the dataset that the same plan already made there.

    Raises DatasetError when the folder holds anything else.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise explain(error, out) from error
    if (out / "manifest.json").exists():
        dataset = open_dataset(out)
        if dataset.manifest["plan"] == plan.digest:
            shutil.rmtree(out / WORK, ignore_errors=True)  # left by a kill right after the manifest
            return dataset
        made = ", ".join(s["source"] for s in dataset.manifest["sources"])
        raise DatasetError(
            f"{out}: holds another dataset (made from {made} with {dataset.manifest['tokenizer']['name']}, "
            f"{dataset.splits['train'].tokens:,} training tokens). Choose another --out, or delete it"
        )
    claim = out / WORK / "plan.json"
    # Looked at before the claim is: what another task puts here meanwhile comes after its claim.
    foreign = any(p.name != WORK and not p.name.endswith(TEMPORARY) for p in out.iterdir())
    if claim.exists():
        if read_json(claim)["plan"] != plan.digest:
            raise DatasetError(
                f"{out}: an unfinished preparation with other inputs or options is there. Run it again as it "
                "was, choose another --out, or delete that folder"
            )
    elif foreign:
        raise DatasetError(f"{out}: the folder is not empty and holds no dataset. Choose another --out")
    else:
        write_json(claim, {"plan": plan.digest})
    (out / "shards").mkdir(exist_ok=True)
    return None


def _run(plan: Plan, left: list[int], out: Path, workers: int, how: How, progress: Callable) -> None:
    total = plan.size
    before = total - sum(plan.tasks[index].size for index in left)
    if workers <= 1 or len(left) <= 1:
        one_core()
        read = before

        def seen(n: int) -> None:
            nonlocal read
            read += n
            progress(read, total)

        for index in left:
            run_task(plan, plan.tasks[index], out, seen, how)
        return
    others = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")
    counter = context.Value("q", 0)
    pool = ProcessPoolExecutor(
        min(workers, len(left)), context, initializer=start_worker, initargs=(plan, out, how, counter)
    )
    try:
        pending = {pool.submit(work, index) for index in left}
        while pending:
            finished, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
            for future in finished:
                future.result()
            progress(before + counter.value, total)
    except BrokenProcessPool:
        raise DatasetError(
            f"{out}: a worker process died (killed, or out of memory). Finished tasks are kept: run the same "
            "command again, with fewer --workers if memory was short"
        ) from None
    except BaseException:  # an error in one task, or Ctrl-C: do not wait for the rest
        for worker in set(multiprocessing.active_children()) - others:
            worker.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _finish(plan: Plan, receipts: list[dict[str, Any]], report: Report, out: Path) -> Dataset:
    """The manifest from all receipts in task order; then the working folder goes."""
    counts = report.counts
    if not counts["documents"]:
        for mine in ("shards", WORK):  # nothing to go on from: let the next try be another
            shutil.rmtree(out / mine, ignore_errors=True)
        reason = f"{counts['errors']} could not be read, {counts['empty']} were empty"
        reason += f", {counts['dropped_by_length']} were dropped by length"
        first = f". The first error: {report.messages[0]}" if report.messages else ""
        raise DatasetError(f"{out}: not one document was left to write ({reason}){first}")
    for stale in out.rglob(f"*{TEMPORARY}"):  # of killed processes: all tasks are done
        stale.unlink(missing_ok=True)
    splits = {split: split_record([e for r in receipts for e in r["shards"][split]]) for split in SPLITS}
    inputs = b"".join(json.dumps(i, sort_keys=True).encode() + b"\n" for r in receipts for i in r["inputs"])
    write_bytes(out / "sources.jsonl", inputs)
    write_manifest(
        out,
        {
            "plan": plan.digest,
            "dtype": plan.dtype,
            "vocab": plan.tokenizer.vocab,
            "eos_id": plan.tokenizer.eos_id,
            "tokenizer": tokenizer_record(plan.tokenizer, out),
            "splits": splits,
            "sources": list(plan.sources),
            "inputs": {"files": sum(len(t.inputs) for t in plan.tasks), "blake3": digest(inputs)},
            "counts": {key: counts[key] for key in COUNTED},
            "heldout": plan.heldout,
        },
    )
    shutil.rmtree(out / WORK, ignore_errors=True)
    return open_dataset(out)


def tokenizer_record(tokenizer: Tokenizer, out: Path) -> dict[str, Any]:
    """Save the tokenizer into the dataset `out`; its manifest record, with the hashes of its files."""
    tokenizer.save(out / "tokenizer")
    names = ["meta.json", "tokenizer.json"] + ["rows.npy"] * (tokenizer.rows is not None)
    files = {name: digest((out / "tokenizer" / name).read_bytes()) for name in names}
    return tokenizer.describe() | {"files": files}


def split_record(entries: list[dict[str, Any]]) -> dict[str, Any]:
    return {key: sum(e[key] for e in entries) for key in ("documents", "tokens", "text_bytes")} | {
        "shards": entries
    }
