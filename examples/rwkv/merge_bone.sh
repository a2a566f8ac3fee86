#!/usr/bin/env bash
# Merge an adapter into an RWKV model: of a run here (runs/rwkv-bone/adapter) or of RWKV-PEFT (rwkv-0.pth).
#   examples/rwkv/merge_bone.sh BASE.pth ADAPTER OUT.pth
set -euo pipefail

exec flashbone merge --verify "$@"
