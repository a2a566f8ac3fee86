"""What commands share that read a YAML file: its fields on the command line."""

from collections.abc import Collection


def separate(argv: list[str], options: Collection[str], valued: Collection[str] = ()) -> tuple[list[str], list[str]]:
    """The command's own arguments, and a configuration's fields with their values, in whatever order they came.

    Args:
        argv: All of them.
        options: Names of the command's own options.
        valued: Those of them that take a value.
    """
    ours, fields = [], []
    words = iter(argv)
    for word in words:
        name, equals, _ = word.partition("=")
        is_ours = name in options or not word.startswith("--")
        goes_to = ours if is_ours else fields
        goes_to.append(word)
        if not equals and (name in valued or not is_ours):
            goes_to += [value] if (value := next(words, None)) is not None else []
    return ours, fields
