"""Prints the constraints of `make test-floors`.

These are the lowest versions that pyproject.toml allows of what users install, and the pins of constraints.txt for what
only the tests need.
"""

from pathlib import Path

import tomllib

ROOT = Path(__file__).parents[2]
OF_USERS = ("train", "gguf", "rwkv")
KEPT = "torch"  # its pin: any other build that an index has brings CUDA, gigabytes


def floors() -> dict[str, str]:
    """The lowest version of each package that flashbone, or an extra of users that the tests need, asks for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *(line for extra in OF_USERS for line in extras[extra])]
    lowest = dict(line.split(">=") for line in lines)
    return {name: version for name, version in lowest.items() if name != KEPT}


def pins() -> dict[str, str]:
    """The pins of the packages that the extra `test` names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = [line.split(">=")[0] for line in project["optional-dependencies"]["test"]]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    return {name: pinned[name] for name in (*named, KEPT)}


if __name__ == "__main__":
    for name, version in (pins() | floors()).items():
        print(f"{name}=={version}")
    print("pyparsing<3.3")  # later ones warn of what the lowest matplotlib calls
