"""What commands share that read a YAML file and train: fields on the command line, packages that have to be there."""

import importlib.util
from collections.abc import Collection

from flashbone.errors import ConfigError


def check_extra(what: str) -> None:
    """Refuse to start without the packages that training alone needs."""
    missing = [name for name in ("trl", "datasets", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"{what} needs {', '.join(missing)}, not installed; run: pip install 'flashbone[train]'")


def separate(argv: list[str], options: Collection[str]) -> tuple[list[str], list[str]]:
    """The command's own arguments, and a configuration's fields with their values, in whatever order they came."""
    ours, fields = [], []
    words = iter(argv)
    for word in words:
        if word in options or not word.startswith("--"):
            ours.append(word)
        else:
            fields.append(word)
            if "=" not in word:
                fields += [value] if (value := next(words, None)) is not None else []
    return ours, fields
