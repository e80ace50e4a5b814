#!/usr/bin/env bash
# Train an AutoCompressor on a Llama with LoRA. BASE, BATCH, LR, NUM_GPUS, CML and DATA override.
set -euo pipefail
cd "$(dirname "$0")/../.."
BASE=${BASE:-meta-llama/Llama-2-7b-hf} BATCH=${BATCH:-32} LR=${LR:-8e-4} TUNE=lora exec bash train/run/train.sh \
  --lora_rank 16 --lora_alpha 16 --lora_targets q_proj,v_proj,o_proj,k_proj --precision bf16 "$@"
