"""`python -m train.mirror RUN offline|online`: follow a run's records into wandb.

Started beside a training run; it ends when its standard input is closed and every record was sent. It may
be started again later on a finished run. A service that cannot be reached costs the training nothing: the
records then stay on disk, in wandb's offline form.
"""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from pathlib import Path
from typing import Any

PAUSE_S = 0.5


def flat(record: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """{"losses": {"next": 2.0}} -> {"losses/next": 2.0}; numbers only."""
    out: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, dict):
            out |= flat(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            out[prefix + key] = value
    return out


def start(run: Path, mode: str) -> Any:
    """A wandb run with an id of its own per folder, so that a resumed run goes on in it."""
    import wandb

    about = run / "run.json"  # of a compressor's run there is none
    described = json.loads(about.read_text()) if about.is_file() else {"name": run.name, "created": str(run)}
    options: dict[str, Any] = {
        "project": "latent-lab",
        "name": described.get("name"),
        "id": hashlib.blake2b(str(described.get("created")).encode(), digest_size=8).hexdigest(),
        "dir": str(run),
        "config": described,
        "resume": "allow",
    }
    if mode == "online":
        try:
            return wandb.init(mode="online", settings=wandb.Settings(init_timeout=60, silent=True), **options)
        except Exception as error:
            print(f"wandb: online does not work ({error}); going on offline", file=sys.stderr, flush=True)
    return wandb.init(mode="offline", settings=wandb.Settings(silent=True), **options)


def follow(run: Path, send: Any, ended: threading.Event) -> None:
    """Send every record; after the end, once more what is left. send(fields, step)."""
    path, position = run / "metrics.jsonl", 0
    while True:
        last = ended.is_set()
        size = path.stat().st_size if path.is_file() else 0
        if size < position:
            position = 0  # the file was rewound by a resume
        if size > position:
            with open(path, encoding="utf-8") as file:
                file.seek(position)
                while (line := file.readline()).endswith("\n"):
                    position = file.tell()
                    try:
                        record = json.loads(line)
                    except ValueError:  # cut off by a crash, and written on by the run that was resumed
                        continue
                    kind, step = record.pop("kind"), record.pop("step")
                    if kind not in ("event", "sample"):
                        send({f"{kind}/{k}": v for k, v in flat(record).items()}, step)
        if last:
            return
        ended.wait(PAUSE_S)


def main(argv: list[str]) -> int:
    run, mode = Path(argv[0]), argv[1]
    ended = threading.Event()

    def wait_for_the_end() -> None:
        sys.stdin.buffer.read()
        ended.set()

    threading.Thread(target=wait_for_the_end, daemon=True).start()
    tracker = start(run, mode)
    follow(run, lambda fields, step: tracker.log(fields, step=step), ended)
    tracker.finish()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
