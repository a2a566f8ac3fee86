"""Write the golden files with PEFT 0.18.1, the last release that had BONE: run by `make golden`.

For each case: the adapter folder as PEFT writes it, and expected.safetensors with input, output, gradients and merged
weights in fp64.
"""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import peft
import torch
from cases import CASES
from peft import BoneConfig, get_peft_model
from safetensors.torch import save_file

from helpers.mlp import MLP, fill_blocks, results


def write(name: str, sizes: tuple[int, int, int], fields: dict) -> None:
    torch.manual_seed(0)
    model = get_peft_model(MLP(sizes), BoneConfig(**fields))
    if fields.get("init_weights") is not False:
        fill_blocks(model)
    folder = HERE / "peft-0.18.1" / name
    model.save_pretrained(folder)
    (folder / "README.md").unlink()
    save_file({k: v.contiguous() for k, v in results(model, sizes[0]).items()}, folder / "expected.safetensors")


if __name__ == "__main__":
    assert peft.__version__ == "0.18.1", f"got peft {peft.__version__}, wanted 0.18.1: run `make golden`"
    for name, (sizes, fields) in CASES.items():
        write(name, sizes, fields)
