"""`python -m benchmarks.merge_memory [GB]`: peak memory of `flashbone merge` on a large random model.

Each merge is a process of its own; what it grows by over a merge of a tiny model is compared with the largest tensor.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from flashbone import variants

TABLE, LAYER, R = (64_000, 2560), (2560, 2560), 64
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WORK = """
import json, sys
from flashbone.merge import merge_checkpoint
def run(place):
    merge_checkpoint(place + "/base", place + "/adapter", place + "/merged", dtype=json.loads(sys.argv[1]))
def peak_mib():
    status = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
    return int(status["VmHWM"].split()[0]) / 1024
run(sys.argv[2])
before = peak_mib()
run(sys.argv[3])
print(peak_mib() - before)
"""


def main(gigabytes: float = 2.0) -> None:
    """Print a row for each dtype and variant; fails where the growth is more than the largest tensor twice."""
    failed = False
    for name, dtype in DTYPES.items():
        with tempfile.TemporaryDirectory() as scratch:
            large, small = Path(scratch, "large"), Path(scratch, "small")
            layers = int((gigabytes * 1e9 / dtype.itemsize - TABLE[0] * TABLE[1]) / (LAYER[0] * LAYER[1]))
            _model(large, dtype, TABLE, LAYER, max(layers, 1))
            _model(small, dtype, (64, 64), (64, 64), 1)
            for variant in variants.VARIANTS:
                for place, table, layer in ((large, TABLE, LAYER), (small, (64, 64), (64, 64))):
                    _adapter(place, variant, table, layer)
                other = "fp32" if name == "bf16" else "bf16"
                for asked in (None, other):
                    item = max(dtype.itemsize, DTYPES[asked or name].itemsize)
                    largest = TABLE[0] * TABLE[1] * item / 2**20
                    grown = _grown(asked, small, large)
                    failed |= grown > 2 * largest
                    what = f"{name} {variant:10} {asked or '':4}"
                    print(f"{what} {grown:6.0f} MiB = {grown / largest:.2f} of the largest tensor", flush=True)
    sys.exit(failed)


def _model(place: Path, dtype: torch.dtype, table: tuple[int, int], layer: tuple[int, int], layers: int) -> None:
    (place / "base").mkdir(parents=True)
    shapes = {"lm_head.weight": table} | {f"layers.{n}.q.weight": layer for n in range(layers)}
    state = {name: torch.randn(shape, dtype=torch.float32).to(dtype) for name, shape in shapes.items()}
    save_file(state, place / "base" / "model.safetensors")


def _adapter(place: Path, variant: str, table: tuple[int, int], layer: tuple[int, int]) -> None:
    (place / "adapter").mkdir(exist_ok=True)
    kind = variants.get(variant)
    state = {"lm_head": table, "layers.0.q": layer}
    blocks = {n: torch.randn(kind.block_shape(*shape, R, R)) * 1e-3 for n, shape in state.items()}
    save_file(
        {f"base_model.model.{n}.bone_block": b for n, b in blocks.items()},
        place / "adapter" / "adapter_model.safetensors",
    )
    config = {"peft_type": "BONE", "r": R, "mini_r": R, "variant": variant}
    (place / "adapter" / "adapter_config.json").write_text(json.dumps(config))


def _grown(asked: str | None, small: Path, large: Path) -> float:
    for place in (small, large):
        subprocess.run(["rm", "-rf", str(place / "merged")], check=True)
    arguments = [json.dumps(asked), str(small), str(large)]
    done = subprocess.run([sys.executable, "-c", WORK, *arguments], capture_output=True, text=True, check=True)
    return float(done.stdout)


if __name__ == "__main__":
    main(*map(float, sys.argv[1:]))
