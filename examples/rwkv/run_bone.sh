#!/usr/bin/env bash
# Bone on an RWKV-7 or RWKV-6 model (.pth), as RWKV-PEFT's script of this name. Fields go on the command line:
#   examples/rwkv/run_bone.sh --model MODEL.pth --data.path mine.jsonl --output runs/mine
# After an interruption the same command with --resume goes on.
set -euo pipefail

recipe="$(dirname "$0")/metamath.yaml"
exec flashbone train "$recipe" --output runs/rwkv-bone "$@"
