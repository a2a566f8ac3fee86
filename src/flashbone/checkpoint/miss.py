"""Adapter folders of PEFT's MISS: Bone under another prefix."""

from pathlib import Path

from flashbone.checkpoint import Adapter


def read(path: str | Path) -> Adapter:
    raise NotImplementedError


def write(adapter: Adapter, folder: Path) -> None:
    raise NotImplementedError
