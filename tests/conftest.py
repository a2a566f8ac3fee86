"""Shared fixtures: shapes are checked at run time, models come from disk only, tolerances come from one table."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from jaxtyping import install_import_hook

CHECKED = ["shards", "variants", "ops", "rwkv.wkv6", "rwkv.wkv7", "rwkv.chunks", "rwkv.shift", "rwkv.loss"]
install_import_hook([f"flashbone.{name}" for name in CHECKED], "beartype.beartype")

import pytest
import torch

import flashbone  # noqa: F401  (so that `from peft import BoneConfig` works in files whose imports are sorted)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
