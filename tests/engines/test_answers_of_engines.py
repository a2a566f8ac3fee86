"""Adapters in serving engines: their greedy answers are those of transformers with the adapter. `make test-engines`."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import ENVIRONMENTS, Adapted, ask
from flashbone.conversion import convert

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
AS_LORA = ("bone", "mini")
MERGED = ("bat-col", "bat-row")


def python_of(engine: str) -> Path:
    python = ENVIRONMENTS / engine / "bin/python"
    if not python.is_file():
        pytest.skip(f"{engine} has no environment here; `make test-engines` makes it")
    return python


def converted(adapted: Adapted, engine: str, folder: Path) -> list[Path]:
    """The adapters that engines run unmerged, as this one takes them."""
    for variant in AS_LORA:
        convert(adapted.adapters[variant], folder / variant, engine=engine, base=adapted.base)
    return [folder / variant for variant in AS_LORA]


@pytest.mark.parametrize("engine", ["mlx", "vllm"])
def test_adapters_give_the_answers_of_transformers(adapted, engine, tmp_path):
    python, loras = python_of(engine), converted(adapted, engine, tmp_path)
    results = ask(f"ask_{engine}.py", python, adapted.base, *loras, adapted=adapted)
    for variant, result in zip(AS_LORA, results, strict=True):
        assert result["answers"] == adapted.answers[variant].tokens
        if "logits" in result:
            assert (torch.tensor(result["logits"]) - adapted.answers[variant].logits).abs().max() < 2e-4


@pytest.mark.parametrize("variant", MERGED)
@pytest.mark.parametrize("engine", ["mlx", "vllm"])
def test_merged_models_give_the_answers_of_transformers(adapted, engine, variant):
    (result,) = ask(f"ask_{engine}.py", python_of(engine), adapted.merged[variant], adapted=adapted)
    assert result["answers"] == adapted.answers[variant].tokens
    if "logits" in result:
        assert (torch.tensor(result["logits"]) - adapted.answers[variant].logits).abs().max() < 2e-4


@pytest.fixture(scope="module")
def llamacpp() -> tuple[Path, str]:
    """Python and its path with llama.cpp in it."""
    package = ENVIRONMENTS / "llamacpp"
    if not package.is_dir():
        pytest.skip("llama.cpp is not compiled here; `make test-engines` does so")
    return Path(sys.executable), str(package)


def to_gguf(model: Path, out: Path) -> Path:
    program = Path(__file__).parent / "to_gguf.py"
    command = [sys.executable, str(program), str(ENVIRONMENTS / "llama.cpp"), str(model), str(out)]
    subprocess.run(command, check=True, capture_output=True, timeout=500)
    return out


def test_llamacpp_gives_the_answers_of_transformers(adapted, llamacpp, tmp_path):
    python, path = llamacpp
    files = [folder / "adapter.gguf" for folder in converted(adapted, "llama.cpp", tmp_path)]
    base = to_gguf(adapted.base, tmp_path / "base.gguf")
    results = ask("ask_llamacpp.py", python, base, *files, adapted=adapted, path=path)
    assert [result["answers"] for result in results] == [adapted.answers[variant].tokens for variant in AS_LORA]
    for variant in MERGED:
        file = to_gguf(adapted.merged[variant], tmp_path / f"{variant}.gguf")
        (result,) = ask("ask_llamacpp.py", python, file, adapted=adapted, path=path)
        assert result["answers"] == adapted.answers[variant].tokens
        file.unlink()
