"""Random RWKV models, with the logits that the `rwkv` package computes of them."""

import pytest
import torch
from rwkv_cases import SIZES, TOKENS, VERSIONS

from flashbone.rwkv import from_pth
from helpers.rwkv import VOCABULARY, reference_logits, write_rwkv


@pytest.fixture(scope="module", params=VERSIONS, ids=lambda v: f"v{v}")
def cases(request, tmp_path_factory):
    """(version, [(file, tokens, token by token, whole sequence)]) with the reference's logits."""
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


@pytest.fixture(scope="module")
def one(cases):
    """A file of three blocks, its model, tokens (1, 75) and the reference's logits."""
    version, (_, (path, tokens, steps, _), *_) = cases
    return version, from_pth(path), torch.tensor([tokens]), steps
