"""Paths on a command line: `~` and `$NAME` in them mean what they mean in a configuration."""

import argparse

from flashbone.files.sources import expanded


def expand(options: argparse.Namespace, *names: str) -> None:
    """Fill in the variables of options that name places, or lists of places.

    Raises:
        ConfigError: the environment has no such variable.
    """
    for name in names:
        value = getattr(options, name)
        if isinstance(value, list):
            setattr(options, name, [expanded(place) for place in value])
        elif value is not None:
            setattr(options, name, type(value)(expanded(str(value))))
