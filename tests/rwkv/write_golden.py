"""Writes tests/golden/rwkv.safetensors for `make golden`: tokens, and the logits that the `rwkv` package computes."""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rwkv_cases import GOLDEN, TOKENS, VERSIONS
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))
from helpers.rwkv import VOCABULARY, reference_logits, write_rwkv

golden = {}
for version in VERSIONS:
    # The best token of each step leads by far more than rounding: tests of generation rely on it.
    tokens = torch.randint(0, VOCABULARY, (2, TOKENS), generator=torch.Generator().manual_seed(5))[1]
    with TemporaryDirectory() as folder:
        path = write_rwkv(Path(folder) / "one.pth", version)
        ((logits, _),) = reference_logits(version, [(path, tokens.tolist())], Path(folder))
    golden |= {f"v{version}.tokens": tokens[None], f"v{version}.logits": logits}
save_file(golden, GOLDEN)
