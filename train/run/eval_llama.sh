#!/usr/bin/env bash
# Score a trained compressor folder (COMPRESSOR) on DATA; MODE=FA scores the full context instead.
set -euo pipefail
cd "$(dirname "$0")/../.."
exec "${PYTHON:-.venv/bin/python}" train/compress_eval.py --decoder "${BASE:-meta-llama/Llama-2-7b-hf}" \
  --data "${DATA:?DATA=a prepared dataset, .txt or .jsonl}" --mode "${MODE:-AC}" \
  ${COMPRESSOR:+--compressor "$COMPRESSOR"} "$@"
