"""`flashbone schema [train|compare]`: the JSON schema of a configuration's file, for editors."""

import argparse
import json
from typing import Any

from flashbone import floors

EPILOG = """\
An editor with a YAML language server checks and completes a recipe whose first line names the schema:

  flashbone schema train > train.schema.json
  # yaml-language-server: $schema=train.schema.json
"""


def run(argv: list[str]) -> int:
    """Parse, print."""
    options = make_parser().parse_args(argv)
    floors.check("train")
    print(json.dumps(schema_of(options.command), indent=1, ensure_ascii=False))
    return 0


def schema_of(command: str) -> dict[str, Any]:
    """The JSON schema of the file that `flashbone train` or `flashbone compare` reads."""
    from typing import get_args

    from flashbone.train.json_schema import json_schema
    from flashbone.train.recipe import Task, recipe_schema

    make: Any = recipe_schema
    tasks: Any = Task
    if command == "compare":
        from flashbone.compare.config import ComparedTask as tasks
        from flashbone.compare.config import comparison_schema as make
    return json_schema(f"flashbone {command}", {task: make(task) for task in get_args(tasks)})


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flashbone schema",
        description="Print the JSON schema of the file that `flashbone train` or `flashbone compare` reads.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "command", nargs="?", choices=["train", "compare"], default="train", help="whose file; train by default"
    )
    return parser
