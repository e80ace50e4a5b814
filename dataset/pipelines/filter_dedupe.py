"""Quality filters and MinHash deduplication with datatrove, before `python -m dataset prepare`.

    pip install -e '.[prepare]'
    python dataset/pipelines/filter_dedupe.py raw/ clean/ --tasks 8
    python -m dataset prepare --source clean/deduplicated --tokenizer TOKENIZER --out data/clean

Runs on this machine, or with --slurm PARTITION as array jobs. Each stage marks its finished tasks in
clean/logs, so a run that was stopped goes on. Nothing here is rebuilt by the lab: the steps are datatrove's.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def stages(source: str, out: Path, tasks: int) -> list[tuple[str, list, int]]:
    """(name, pipeline, tasks) in order: filter, signatures, buckets, clusters, removal."""
    from datatrove.pipeline.dedup import MinhashDedupSignature
    from datatrove.pipeline.dedup.minhash import (
        MinhashConfig,
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
    )
    from datatrove.pipeline.filters import GopherQualityFilter, GopherRepetitionFilter
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter

    config = MinhashConfig()
    kept, work = str(out / "filtered"), out / "minhash"
    filtered = [
        JsonlReader(source, glob_pattern="**/*.jsonl*"),
        GopherRepetitionFilter(exclusion_writer=JsonlWriter(str(out / "removed" / "repetition"))),
        GopherQualityFilter(exclusion_writer=JsonlWriter(str(out / "removed" / "quality"))),
        JsonlWriter(kept),
    ]
    signatures = [
        JsonlReader(kept),
        MinhashDedupSignature(output_folder=str(work / "signatures"), config=config),
    ]
    buckets = [
        MinhashDedupBuckets(
            input_folder=str(work / "signatures"), output_folder=str(work / "buckets"), config=config
        )
    ]
    clusters = [
        MinhashDedupCluster(
            input_folder=str(work / "buckets"), output_folder=str(work / "remove"), config=config
        )
    ]
    removal = [
        JsonlReader(kept),
        MinhashDedupFilter(
            input_folder=str(work / "remove"),
            exclusion_writer=JsonlWriter(str(out / "removed" / "duplicates")),
        ),
        JsonlWriter(str(out / "deduplicated")),
    ]
    return [
        ("filter", filtered, tasks),
        ("signatures", signatures, tasks),
        ("buckets", buckets, config.num_buckets),
        ("clusters", clusters, 1),
        ("removal", removal, tasks),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="folder of jsonl files, plain or compressed")
    parser.add_argument("out", type=Path)
    parser.add_argument("--tasks", type=int, default=8, help="parts of the corpus (8)")
    parser.add_argument("--workers", type=int, default=2, help="tasks at once on this machine (2)")
    parser.add_argument("--slurm", metavar="PARTITION", help="run as array jobs instead")
    parser.add_argument("--time", default="24:00:00", help="limit of a Slurm job")
    args = parser.parse_args()
    try:
        return run(args)
    except ImportError as error:  # datatrove itself, or a package that one of its steps wants
        print(f"error: {error}. Run: pip install -e '.[prepare]'", file=sys.stderr)
        return 2


def run(args: argparse.Namespace) -> int:
    """All stages, here or on Slurm. Raises ImportError for packages that are not there."""
    from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor

    before = None
    for name, pipeline, tasks in stages(args.source, args.out, args.tasks):
        logs = str(args.out / "logs" / name)
        if args.slurm:
            before = SlurmPipelineExecutor(
                pipeline, tasks, args.time, args.slurm, job_name=name, logging_dir=logs, depends=before
            )
        else:
            LocalPipelineExecutor(pipeline, tasks, min(args.workers, tasks), logs).run()
    if before is not None:
        before.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
