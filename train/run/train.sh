#!/usr/bin/env bash
# Train a variable-length AutoCompressor. BASE, BATCH, LR, NUM_GPUS, CML and DATA override; further flags are passed on.
set -euo pipefail
cd "$(dirname "$0")/../.."
BASE=${BASE:-opt-125m}
case "$BASE" in */* | smollm2-*) ;; *) [ -d "$BASE" ] || BASE="facebook/$BASE" ;; esac
exec "${PYTHON:-.venv/bin/python}" -m torch.distributed.run --nproc-per-node "${NUM_GPUS:-1}" train/compress.py \
  --method variable_autocompressor --objective document --tune "${TUNE:-full}" \
  --decoder "$BASE" --data "${DATA:?DATA=a prepared dataset, .txt or .jsonl}" \
  --run-dir "${RUN:-runs/autocompressor_$(basename "$BASE")}" --batch "${BATCH:-16}" --lr "${LR:-2e-5}" \
  --compression_max_len "${CML:-50}" --training_substeps 2 --segments_per_substep 2 --randomize_substeps "$@"
