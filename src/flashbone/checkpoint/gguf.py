"""LoRAs in GGUF, for llama.cpp and what is built on it."""

from pathlib import Path

from flashbone.checkpoint.lora import Lora


def write(lora: Lora, file: Path) -> None:
    raise NotImplementedError
