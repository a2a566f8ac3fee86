#!/usr/bin/env bash
# BAT on an RWKV-7 or RWKV-6 model: bat-row, which is RWKV-PEFT's `mode: bat`. Fields go on the command line:
#   examples/rwkv/run_bat.sh --model MODEL.pth --data.path mine.jsonl --output runs/mine
set -euo pipefail

recipe="$(dirname "$0")/metamath.yaml"
exec flashbone train "$recipe" --adapter.variant bat-row --output runs/rwkv-bat "$@"
