"""Loading a base model: whatever is wrong with its files is one line that names the model."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch

from flashbone.errors import ConfigError, FormatError
from flashbone.train.models import load_causal_lm
from flashbone.train.tokenizers import load_tokenizer
from helpers.tiny_llama import write_tiny_llama


@pytest.fixture
def damaged(llama, tmp_path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "model"))


def cut_short(model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def empty(model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"")


def no_pickle(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(b"hello")


def of_other_sizes(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"intermediate_size": 80}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_short, r"its files cannot be read \(SafetensorError: .*\); copy or download them again"),
        (empty, r"its files cannot be read \(SafetensorError: .*\); copy or download them again"),
        (no_pickle, r"its files cannot be read \(.*\); copy or download them again"),
        (of_other_sizes, "could not be loaded: "),
    ],
)
def test_damaged_files_are_one_line_that_names_the_model(damaged, damage, message):
    damage(damaged)
    with pytest.raises(ConfigError, match=message) as error:
        load_causal_lm(str(damaged), torch.float32)
    assert str(error.value).startswith(f"model {damaged}: ")
    assert "\n" not in str(error.value)


def test_a_damaged_gguf_file_is_one_line_that_names_the_model(tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF123")
    with pytest.raises(FormatError, match=rf"^{file}: is damaged, or no GGUF file"):
        load_causal_lm(str(file), torch.float32)


def test_a_model_without_a_tokenizer_gets_the_whole_reason(damaged):
    for file in damaged.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ConfigError, match=r"from one of: \(1\)") as error:
        load_tokenizer(str(damaged))
    assert "\n" not in str(error.value)


def test_loading_does_not_list_layers_that_tensor_parallelism_leaves_whole(tmp_path, caplog):
    log = logging.getLogger("transformers.distributed.tensor_parallel")
    log.addHandler(caplog.handler)
    try:
        load_causal_lm(str(write_tiny_llama(tmp_path / "llama")), torch.float32)
    finally:
        log.removeHandler(caplog.handler)
    assert "sharded" not in caplog.text
