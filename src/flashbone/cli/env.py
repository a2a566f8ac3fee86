"""`flashbone env`: versions, devices and optional parts, for a report of a bug."""

import argparse
import json
import platform
import sys
from typing import Any

from flashbone import __version__, floors


def run(argv: list[str]) -> int:
    """Parse, look, print."""
    options = make_parser().parse_args(argv)
    report = environment()
    if options.json:
        print(json.dumps(report, indent=2))
        return 0
    width = max(len(name) for part in report.values() for name in part)
    for title, part in report.items():
        print(f"{title}:")
        for name, value in part.items():
            print(f"  {name:<{width}}  {value}")
    return 0


def environment() -> dict[str, dict[str, str]]:
    """What a report of a bug should say of the machine, by part and name."""
    system = {
        "flashbone": __version__,
        "python": f"{platform.python_version()} ({sys.executable})",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }
    extras = {}
    for extra in floors.extras():
        problems = floors.problems([extra])
        extras[extra] = f"no: {'; '.join(problems.values())}" if problems else "yes"
    return {"system": system, "devices": _devices(), "packages": floors.installed(), "optional parts": extras}


def _devices() -> dict[str, str]:
    try:
        import torch
    except ImportError as error:
        return {"torch": f"cannot be imported: {error}"}
    found: dict[str, Any] = {"cpu": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"}
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        found[f"cuda:{number}"] = f"{about.name}, {about.total_memory / 2**30:.0f} GiB"
    if torch.backends.mps.is_available():
        found["mps"] = "Metal"
    found["cuda of torch"] = torch.version.cuda or "none"
    return found


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flashbone env",
        description="Print versions, devices, and which optional parts work: what a report of a bug needs.",
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser
