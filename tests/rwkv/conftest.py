"""Random RWKV models, with the logits that the `rwkv` package computes of them."""

import pytest
import torch
from rwkv_cases import GOLDEN, SIZES, TOKENS, VERSIONS
from safetensors.torch import load_file

from flashbone.rwkv import from_pth
from helpers.rwkv import VOCABULARY, reference_logits, write_rwkv


@pytest.fixture(scope="session", params=VERSIONS, ids=lambda v: f"v{v}")
def cases(request, tmp_path_factory):
    """(version, [(file, tokens, token by token, whole sequence)]) with the reference's logits, computed now."""
    folder = tmp_path_factory.mktemp("rwkv")
    source = torch.Generator().manual_seed(5)
    jobs = [
        (
            write_rwkv(folder / f"{hidden}-{head}-{layers}.pth", request.param, hidden, head, layers),
            torch.randint(0, VOCABULARY, (TOKENS,), generator=source).tolist(),
        )
        for hidden, head, layers in SIZES
    ]
    found = reference_logits(request.param, jobs, folder)
    return request.param, [(*job, *logits) for job, logits in zip(jobs, found, strict=True)]


@pytest.fixture(scope="module", params=VERSIONS, ids=lambda v: f"v{v}")
def one(request, tmp_path_factory):
    """The version, a model of three blocks, tokens (1, 75), and the reference's logits from the golden file."""
    path = write_rwkv(tmp_path_factory.mktemp("rwkv") / "one.pth", request.param)
    golden = load_file(GOLDEN)
    return request.param, from_pth(path), golden[f"v{request.param}.tokens"], golden[f"v{request.param}.logits"]
