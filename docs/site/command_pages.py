"""Pages of the commands, made from their own parsers and, for `train` and `compare`, from the fields of their files."""

import argparse
import ast
import html
import importlib
import inspect
import re
import textwrap
import typing

from flashbone.cli import COMMANDS
from flashbone.train.json_schema import field_comments

GUIDES = {
    "train": "training.md",
    "compare": "comparing.md",
    "eval": "evaluating.md",
    "generate": "chatting.md",
    "chat": "chatting.md",
    "inspect": "inspect.md",
    "merge": "merging.md",
    "convert": "converting.md",
    "schema": "training.md",
    "completion": "training.md",
    "env": "troubleshooting.md",
    "run": "trainers.md",
}
# The dataclasses that a command's file fills, with the head of their tables.
FIELDS = {
    "train": [
        ("flashbone.train.recipe", "Recipe", "Fields of the file"),
        ("flashbone.train.data.origins", "DataRecipe", "Fields of `data`"),
        ("flashbone.train.recipe", "Quantization", "Fields of `quantization`"),
        ("flashbone.train.recipe", "RwkvSettings", "Fields of `rwkv`"),
    ],
    "compare": [
        ("flashbone.compare.config", "ComparisonConfig", "Fields of the file"),
        ("flashbone.compare.config", "ComparedData", "Fields of `data`, beside those of `flashbone train`"),
        ("flashbone.compare.config", "Answers", "Fields of `answers`"),
    ],
}
EXITS = """\
Exit codes: 0 done, 1 the input is wrong (one line on stderr says where, what was got, what was wanted, and the remedy),
2 the command line is wrong, 130 interrupted. Results go to stdout, notices and progress to stderr. A file or folder
that a command writes appears whole or not at all, but for those that grow line by line: metrics.jsonl, answers.jsonl,
and batches.jsonl and log.txt of a comparison's runs. A comparison's results.jsonl is replaced whole after each run."""


def pages() -> dict[str, str]:
    """The page of each command and their index, by their places in the site."""
    found = {f"commands/{name}.md": page(name) for name in COMMANDS}
    rows = [f"| [`flashbone {name}`]({name}.md) | {purpose} |" for name, (_, purpose) in COMMANDS.items()]
    index = ["# Commands", "", "| command | what it does |", "|---|---|", *rows, "", EXITS, ""]
    return {"commands/index.md": "\n".join(index), **found}


def page(name: str) -> str:
    """What `flashbone NAME --help` says, as a page: synopsis, arguments by group, notes, and the fields of its file."""
    parser = importlib.import_module(COMMANDS[name][0]).make_parser()
    usage = re.sub(r"\s+", " ", parser.format_usage().removeprefix("usage: ")).strip()
    parts = [
        f"# flashbone {name}",
        f"{parser.description} The guide is [{GUIDES[name]}](../{GUIDES[name]}).",
        f"```text\n{textwrap.fill(usage, 110, subsequent_indent='    ', break_on_hyphens=False)}\n```",
    ]
    for group in parser._action_groups:
        if rows := [_row(action) for action in group._group_actions if action.help != argparse.SUPPRESS]:
            parts.append("\n".join([f"## {_title(group)}", "", "| argument | meaning |", "|---|---|", *rows]))
    if parser.epilog:
        parts.append(f"## Notes\n\n```text\n{parser.epilog.strip()}\n```")
    parts += [_fields(*which) for which in FIELDS.get(name, ())]
    return "\n\n".join([*parts, EXITS]) + "\n"


def _title(group: argparse._ArgumentGroup) -> str:
    return (group.title or "options").replace("positional arguments", "arguments").capitalize()


def _row(action: argparse.Action) -> str:
    metavar = action.metavar or (action.dest.upper() if action.nargs != 0 else "")
    value = metavar if isinstance(metavar, str) else " ".join(metavar)
    names = [_code(f"{option} {value}".strip()) for option in action.option_strings] or [_code(value)]
    return f"| {', '.join(names)} | {_safe(action.help or '')} |"


def _safe(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("%%", "%")


def _code(text: str) -> str:
    """Code in a cell of a table, where a pipe ends the cell and a backslash before it is shown."""
    return f"<code>{html.escape(text, quote=False).replace('|', '&#124;')}</code>" if "|" in text else f"`{text}`"


def _fields(module: str, name: str, title: str) -> str:
    """A table of a dataclass's own fields: name, type, default, and the comment behind it, or above."""
    home = importlib.import_module(module)
    cls = getattr(home, name)
    notes = field_comments(cls)
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(tree, ast.ClassDef)
    rows = []
    for line in tree.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            cells = (
                _code(line.target.id),
                _code(_type(line.annotation, vars(home))),
                _default(line.value),
                _safe(notes.get(line.target.id, "")),
            )
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join([f"## {title}", "", "| field | type | default | meaning |", "|---|---|---|---|", *rows])


def _type(annotation: ast.expr, names: dict[str, object]) -> str:
    """An annotation, where the name of a choice (`Task`) is put as what there is to choose."""
    written = ast.unparse(annotation)
    choices = typing.get_args(names.get(written))
    return " | ".join(map(repr, choices)) if choices else "mapping" if isinstance(names.get(written), type) else written


def _default(value: ast.expr | None) -> str:
    if value is None:
        return "required"
    if isinstance(value, ast.Call) and value.keywords and value.keywords[0].arg == "default_factory":
        made = value.keywords[0].value
        empty = {"list": "[]", "dict": "{}"}
        text = ast.unparse(made.body) if isinstance(made, ast.Lambda) else empty.get(ast.unparse(made), "")
        return _code(text)
    return _code(ast.unparse(value))
