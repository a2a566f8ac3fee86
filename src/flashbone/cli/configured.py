"""What commands share that read a YAML file: its fields on the command line."""

from collections.abc import Collection


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
