"""The lowest versions of other packages that flashbone works with, read from its own metadata."""

import functools
from collections.abc import Collection

from flashbone.errors import OutdatedPackageError

OF_COMMANDS = ("rich",)  # adapters work without them


def check(*extras: str, but: Collection[str] = ()) -> None:
    """Check the installed packages against the requirements of flashbone, and of some of its extras.

    Args:
        extras: Names of extras.
        but: Packages that do not matter here.

    Raises:
        OutdatedPackageError: a package is missing or older than its floor; the message names all of them.
    """
    if problems := _problems(extras, but):
        package = f'"flashbone[{",".join(extras)}]"' if extras else " ".join(f'"{wanted}"' for wanted in problems)
        raise OutdatedPackageError(f"flashbone needs {'; '.join(problems.values())}; run: pip install -U {package}")


@functools.cache
def are_met() -> bool:
    """Whether adapters can work; where not, the reason is logged once, since importing a host must not fail."""
    try:
        check(but=OF_COMMANDS)
    except OutdatedPackageError as error:
        import logging

        logging.getLogger("flashbone").error("BONE is not available: %s", error)
        return False
    return True


def _problems(extras: Collection[str], but: Collection[str]) -> dict[str, str]:
    """What is wrong with each requirement that is not met."""
    from importlib import metadata

    from packaging.requirements import Requirement

    try:
        requirements = [Requirement(line) for line in metadata.requires("flashbone") or []]
    except metadata.PackageNotFoundError:  # a copy of the source on the path: nothing states any floors
        return {}
    problems = {}
    for requirement in requirements:
        if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in ["", *extras]):
            continue
        name, wanted = requirement.name, f"{requirement.name}{requirement.specifier}"
        if name in but:
            continue
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            problems[wanted] = f"{wanted}, which is not installed"
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            problems[wanted] = f"{wanted}, but {name} {version} is installed"
    return problems
