#!/usr/bin/env bash
# QBone: Bone on an RWKV-7 or RWKV-6 model in 4 bits, nf4 (pip install flashbone[quant,train,rwkv]). For int8:
#   examples/rwkv/run_qbone.sh --model MODEL.pth --quantization.bits 8
# The merged file is made from the model as it is on disk, not from the quantised one.
set -euo pipefail

recipe="$(dirname "$0")/metamath.yaml"
exec flashbone train "$recipe" --quantization.bits 4 --output runs/rwkv-qbone "$@"
