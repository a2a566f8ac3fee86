"""The lowest versions of other packages that flashbone works with, read from its own metadata."""

import functools

from flashbone.errors import OutdatedPackageError


def check(*extras: str) -> None:
    """Check the installed packages against the requirements of flashbone, and of some of its extras.

    Raises:
        OutdatedPackageError: a package is missing or older than its floor; the message names all of them.
    """
    if problems := _problems(extras):
        package = f'"flashbone[{",".join(extras)}]"' if extras else " ".join(f'"{wanted}"' for wanted in problems)
        raise OutdatedPackageError(f"flashbone needs {'; '.join(problems.values())}; run: pip install -U {package}")


@functools.cache
def are_met() -> bool:
    """Whether the hosts are new enough; where not, the reason is logged once, since their own import must not fail."""
    try:
        check()
    except OutdatedPackageError as error:
        import logging

        logging.getLogger("flashbone").error("BONE is not available: %s", error)
        return False
    return True


def _problems(extras: tuple[str, ...]) -> dict[str, str]:
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
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            problems[wanted] = f"{wanted}, which is not installed"
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            problems[wanted] = f"{wanted}, but {name} {version} is installed"
    return problems
