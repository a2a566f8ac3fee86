#!/usr/bin/env bash
# The paper's fine-tuning of LLaMA2-7B on 100k rows of MetaMathQA (arXiv 2409.15371) with Bone.
# One GPU with 40 GB or more; the model is gated, so log in first (hf auth login). Further fields go on the command
# line:  examples/run_bone.sh --model meta-llama/Llama-3.2-1B --training.per_device_train_batch_size 2
#        --training.gradient_accumulation_steps 32; after an interruption: examples/run_bone.sh --resume
set -euo pipefail

recipe="$(dirname "$0")/paper_metamath.yaml"
exec flashbone train "$recipe" --adapter.variant bone --output runs/metamath-bone "$@"
