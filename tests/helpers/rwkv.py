"""Random RWKV files of any size, and what the `rwkv` package, by the models' author, computes with such files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

VOCABULARY = 40


def write_rwkv(path: Path, version: int, hidden: int = 32, head: int = 8, layers: int = 3, **sizes: int) -> Path:
    """A `.pth` file with random numbers under BlinkDL's names, made without the models that are tested."""
    source = torch.Generator().manual_seed(version * 1000 + hidden + head + layers)

    def random(*shape: int, scale: float = 0.5, mean: float = 0.0) -> Tensor:
        return mean + scale * torch.randn(shape, generator=source)

    vocabulary = sizes.get("vocabulary", VOCABULARY)
    inner = sizes.get("inner", 3 * hidden + 4)
    state = {"emb.weight": random(vocabulary, hidden)}
    for i in range(layers):
        for norm in (*(["ln0"] if i == 0 else []), "ln1", "ln2"):
            state[f"blocks.{i}.{norm}.weight"] = random(hidden, scale=0.2, mean=1.0)
            state[f"blocks.{i}.{norm}.bias"] = random(hidden, scale=0.1)
        half = _time_mix7 if version == 7 else _time_mix6
        for name, tensor in half(random, hidden, head).items():
            state[f"blocks.{i}.att.{name}"] = tensor
        for name in ("receptance", "key", "value", "output", *(["gate"] if version == 6 else [])):
            state[f"blocks.{i}.att.{name}.weight"] = random(hidden, hidden, scale=hidden**-0.5)
        state[f"blocks.{i}.att.ln_x.weight"] = random(hidden, scale=0.2, mean=1.0)
        state[f"blocks.{i}.att.ln_x.bias"] = random(hidden, scale=0.1)
        mixes = ("x_k",) if version == 7 else ("time_maa_k", "time_maa_r")
        state |= {f"blocks.{i}.ffn.{name}": random(1, 1, hidden, mean=0.5) for name in mixes}
        state[f"blocks.{i}.ffn.key.weight"] = random(inner, hidden, scale=hidden**-0.5)
        state[f"blocks.{i}.ffn.value.weight"] = random(hidden, inner, scale=inner**-0.5)
        if version == 6:
            state[f"blocks.{i}.ffn.receptance.weight"] = random(hidden, hidden, scale=hidden**-0.5)
    state |= {"ln_out.weight": random(hidden, mean=1.0, scale=0.2), "ln_out.bias": random(hidden, scale=0.1)}
    state["head.weight"] = random(vocabulary, hidden, scale=hidden**-0.5)
    torch.save(state, path)
    return path


def _time_mix7(random, hidden: int, head: int) -> dict[str, Tensor]:
    found = {f"x_{name}": random(1, 1, hidden, mean=0.5) for name in "rwkvag"}
    for name, rank in (("w", 6), ("a", 5), ("v", 4), ("g", 7)):
        if name != "g":
            found[f"{name}0"] = random(1, 1, hidden, scale=2.0)
        found |= {f"{name}1": random(hidden, rank), f"{name}2": random(rank, hidden)}
    found |= {"k_k": random(1, 1, hidden, mean=0.8), "k_a": random(1, 1, hidden, mean=1.0)}
    return found | {"r_k": random(hidden // head, head)}


def _time_mix6(random, hidden: int, head: int) -> dict[str, Tensor]:
    found = {f"time_maa_{name}": random(1, 1, hidden, mean=0.5) for name in "xwkvrg"}
    found |= {"time_maa_w1": random(hidden, 5 * 3), "time_maa_w2": random(5, 3, hidden, scale=0.2)}
    found |= {"time_decay": random(1, 1, hidden, scale=2.0, mean=-1.0)}
    found |= {"time_decay_w1": random(hidden, 4), "time_decay_w2": random(4, hidden)}
    return found | {"time_faaaa": random(hidden // head, head)}


_REFERENCE = """
import json, sys, torch
jobs = json.loads(sys.argv[1])
from rwkv.model import RWKV
out = []
for path, tokens in jobs:
    model = RWKV(model=path.removesuffix(".pth"), strategy="cpu fp32")
    state, rows = None, []
    for t in tokens:
        y, state = model.forward([t], state)
        rows.append(y.clone())
    whole, _ = model.forward(tokens, None, full_output=True)
    out.append((torch.stack(rows), whole))
torch.save(out, sys.argv[2])
"""


def reference_logits(version: int, jobs: list[tuple[Path, list[int]]], folder: Path) -> list[tuple[Tensor, Tensor]]:
    """For each file and its tokens the logits (tokens, vocabulary): token by token, and of the whole sequence.

    In a process of its own, since the package chooses a version when it is imported.
    """
    folder.mkdir(parents=True, exist_ok=True)
    result = folder / "reference.pt"
    given = json.dumps([(str(path), tokens) for path, tokens in jobs])
    environment = os.environ | {"RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0", "OMP_NUM_THREADS": "1"}
    environment |= {"RWKV_V7_ON": "1"} if version == 7 else {}
    done = subprocess.run(
        [sys.executable, "-c", _REFERENCE, given, str(result)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return torch.load(result, weights_only=True)
