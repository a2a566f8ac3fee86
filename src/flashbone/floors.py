"""The lowest versions of other packages that flashbone works with, read from its own metadata."""

import functools
from collections.abc import Collection
from typing import TYPE_CHECKING

from flashbone.errors import OutdatedPackageError

if TYPE_CHECKING:
    from packaging.requirements import Requirement

OF_COMMANDS = ("rich",)  # adapters work without them
OF_DEVELOPERS = ("docs", "test", "dev", "all")  # extras


def check(*extras: str, but: Collection[str] = ()) -> None:
    """Check the installed packages against the requirements of flashbone, and of some of its extras.

    Args:
        extras: Names of extras.
        but: Packages that do not matter here.

    Raises:
        OutdatedPackageError: a package is missing or older than its floor; the message names all of them.
    """
    if unmet := problems(extras, but):
        package = f'"flashbone[{",".join(extras)}]"' if extras else " ".join(f'"{wanted}"' for wanted in unmet)
        raise OutdatedPackageError(f"flashbone needs {'; '.join(unmet.values())}; run: pip install -U {package}")


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


def problems(extras: Collection[str], but: Collection[str] = ()) -> dict[str, str]:
    """What is wrong with each requirement of flashbone, and of these extras, that is not met."""
    from importlib import metadata

    unmet = {}
    for requirement in _requirements():
        if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in ["", *extras]):
            continue
        name, wanted = requirement.name, f"{requirement.name}{requirement.specifier}"
        if name in but:
            continue
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            unmet[wanted] = f"{wanted}, which is not installed"
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            unmet[wanted] = f"{wanted}, but {name} {version} is installed"
    return unmet


def extras() -> list[str]:
    """The optional parts, by the names of their extras; not those for the work on flashbone itself."""
    from importlib import metadata

    try:
        names = metadata.metadata("flashbone").get_all("Provides-Extra") or []
    except metadata.PackageNotFoundError:
        return []
    return [name for name in names if name not in OF_DEVELOPERS]


def installed() -> dict[str, str]:
    """The versions of the packages that flashbone or one of its optional parts needs, as far as they are installed."""
    from contextlib import suppress
    from importlib import metadata

    versions, optional = {}, extras()
    for requirement in _requirements():
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in optional):
            with suppress(metadata.PackageNotFoundError):
                versions[requirement.name] = metadata.version(requirement.name)
    return versions


def _requirements() -> "list[Requirement]":
    from importlib import metadata

    from packaging.requirements import Requirement

    try:
        return [Requirement(line) for line in metadata.requires("flashbone") or []]
    except metadata.PackageNotFoundError:  # a copy of the source on the path: nothing states any floors
        return []
