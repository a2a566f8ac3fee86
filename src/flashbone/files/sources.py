"""What a user points at, as all commands read it: JSON files, and repositories on the hub."""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from flashbone.errors import ConfigError, FormatError

LARGEST_TEXT = 256 << 20  # bytes of JSON or a template that describes a model or an adapter
_TEXTS = (".json", ".jinja")


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        FormatError: the file is not valid JSON, or not an object.
    """
    refuse_special(file)
    return json_object(file.read_bytes(), str(file))


def json_object(text: bytes, where: str, remedy: str = "") -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        FormatError: the text is not valid JSON, or not an object; the message begins with `where`, ends with `remedy`.
    """
    try:
        content = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where}: not valid JSON: {error}{remedy}") from error
    if not isinstance(content, dict):
        raise FormatError(f"{where}: wanted a JSON object, got a {type(content).__name__}{remedy}")
    return content


def refuse_special(*paths: Path) -> None:
    """Refuse files that cannot be read to their end, by themselves or in folders: pipes, sockets and devices, and JSON
    and templates that are larger than any.

    Raises:
        FormatError: some are.
    """
    inner = [file for path in paths for file in (path.iterdir() if path.is_dir() else [path]) if not file.is_dir()]
    if odd := [str(file) for file in inner if file.exists() and not file.is_file()]:
        raise FormatError(f"{', '.join(odd)}: not a regular file; put the file itself there")
    texts = [file for file in inner if file.suffix in _TEXTS and file.exists()]
    if large := [str(file) for file in texts if file.stat().st_size > LARGEST_TEXT]:
        raise FormatError(f"{', '.join(large)}: larger than {LARGEST_TEXT >> 20} MiB; is it damaged?")


def sha256(file: Path) -> str:
    """The hash of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while chunk := content.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def expanded(name: str) -> str:
    """A path, with `~` and `$NAME` or `${NAME}` expanded as in a shell.

    Raises:
        ConfigError: the environment has no such variable.
    """

    def value(match: re.Match[str]) -> str:
        variable = match["braced"] or match["plain"]
        if variable not in os.environ:
            raise ConfigError(f"{name}: the variable {variable} is not set; set it, or write the path out")
        return os.environ[variable]

    return os.path.expanduser(re.sub(r"\$(?:\{(?P<braced>\w+)\}|(?P<plain>[A-Za-z_]\w*))", value, name))


def is_hub_id(name: str) -> bool:
    """Whether a name can be the id of a repository on the hub: `org/model`, or an old `model`."""
    return re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) is not None


def hub_problem(name: str, error: Exception) -> str:
    """Why a repository could not be read from the hub or, offline, from its cache, in one line.

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
