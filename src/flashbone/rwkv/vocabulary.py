"""Vocabulary files of RWKV's world models: one token a line, `<id> <literal of str or bytes> <length in bytes>`."""

import ast
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

from flashbone.errors import ConfigError, FormatError, shortened

VOCABULARY_NAME = "rwkv_vocab_v20230424.txt"
_SHOWN = 3  # bad lines that an error quotes


def packaged_vocabulary() -> Path:
    """The world vocabulary inside the rwkv package, which is not imported for that.

    Raises:
        ConfigError: the package is not installed.
    """
    spec = importlib.util.find_spec("rwkv")
    for folder in (spec and spec.submodule_search_locations) or []:
        path = Path(folder, VOCABULARY_NAME)
        if path.is_file():
            return path
    raise ConfigError(
        f"RwkvTokenizer: no vocab_file was given and there is no rwkv package to take {VOCABULARY_NAME} from; "
        "run `pip install rwkv` (or `pip install flashbone[rwkv]`), or give the file's path"
    )


def read_vocabulary(path: str | os.PathLike[str]) -> list[bytes]:
    """The tokens of a vocabulary file by id; id 0, which no file has, is empty.

    Raises:
        FormatError: the file is missing, a line is wrong, or ids or single bytes are missing.
    """
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise FormatError(f"{path}: cannot be read as a vocabulary: {error.strerror or error}") from error
    ids: dict[bytes, int] = {}
    taken: set[int] = set()
    bad = []
    for number, line in enumerate(lines, 1):
        try:
            index, token = _parsed(line)
            if index in taken:
                raise ValueError(f"id {index} was given before")
            if token in ids:
                raise ValueError(f"{token!r} is token {ids[token]} already")
        except ValueError as error:
            bad.append(f"line {number}: {error}")
        else:
            taken.add(index)
            ids[token] = index
    if bad:
        raise FormatError(f"{path}: not an RWKV vocabulary: {shortened(bad, _SHOWN, '; ')}")
    _check_complete(path, ids)
    return [b"", *sorted(ids, key=ids.__getitem__)]


def write_vocabulary(tokens: Sequence[bytes], path: str | os.PathLike[str]) -> None:
    """Write tokens, given by id, as `read_vocabulary` and the rwkv package read them; the world vocabulary comes out
    as it was published."""
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for index, token in enumerate(tokens):
            if index:
                text = as_text(token)
                file.write(f"{index} {token if text is None else text!r} {len(token)}\n")


def as_text(token: bytes) -> str | None:
    """The token as text, or None where it begins or ends inside a character."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return None


def _parsed(line: bytes) -> tuple[int, bytes]:
    try:
        text = line.decode()
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    index, _, rest = text.partition(" ")
    literal, _, length = rest.rpartition(" ")
    if not (index.isascii() and index.isdecimal() and length.isascii() and length.isdecimal()):
        raise ValueError(f"{text[:40]!r} is not `<id> <literal> <length>`")
    try:
        token = ast.literal_eval(literal)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise ValueError(f"{literal[:40]} is not a literal") from None
    if isinstance(token, str):
        token = token.encode()  # a lone surrogate raises a ValueError, too
    if not isinstance(token, bytes) or not token:
        raise ValueError(f"{literal[:40]} is not a str or bytes, or empty")
    if len(token) != int(length):
        raise ValueError(f"{literal[:40]} has {len(token)} bytes, not {length}")
    return int(index), token


def _check_complete(path: str | os.PathLike[str], ids: dict[bytes, int]) -> None:
    known = set(ids.values())
    missing = sorted(set(range(1, len(ids) + 1)) - known)
    if missing:
        raise FormatError(
            f"{path}: its {len(ids)} tokens must have the ids 1 to {len(ids)}, but {missing[0]} is missing"
        )
    single = [byte for byte in range(256) if bytes([byte]) not in ids]
    if single:
        raise FormatError(
            f"{path}: no token for the single byte {bytes([single[0]])!r} (in all {len(single)} of 256 are missing), "
            "so not every text could be encoded; is the file cut off?"
        )
