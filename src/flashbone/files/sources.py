"""What a user points at, as all commands read it: JSON files, and repositories on the hub."""

import json
from pathlib import Path
from typing import Any

from flashbone.errors import FormatError


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        FormatError: it holds none.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{file}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise FormatError(f"{file}: wanted a JSON object, got a {type(content).__name__}")
    return content


def hub_problem(name: str, error: Exception) -> str:
    """Why a repository could not be had from the hub or, offline, from its cache, in one line.

    Args:
        name: The hub id.
        error: Of huggingface_hub.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError

    if isinstance(error, GatedRepoError):  # first: it is a RepositoryNotFoundError, too
        return f"{name}: access has to be granted on https://huggingface.co/{name}; then run `hf auth login`"
    if constants.is_offline_mode():
        where = "the hub's cache (offline, nothing is downloaded)"
    elif isinstance(error, LocalEntryNotFoundError):
        return f"{name}: no such folder, and the hub could not be reached; is there a network?"
    else:
        where = "the hub"
    return f"{name}: no such folder, and not found in {where}; is it spelt right?"
