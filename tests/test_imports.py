"""The import rule of docs/design.md, read off every source file: imports go one way."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "flashbone"

# Package or module -> what it may import of flashbone, besides itself. What is missing here is an error, too.
ALLOWED = {
    "errors": set(),
    "import_hook": set(),
    "host_hooks": {"import_hook"},
    "sources": {"errors"},
    "shards": {"errors"},
    "ops": {"errors", "shards"},
    "variants": {"errors", "shards", "ops"},
    "checkpoint": {"errors", "sources", "shards", "variants"},
    "cards": {"errors", "variants"},
    "merge": {"errors", "sources", "shards", "variants", "checkpoint"},
    "conversion": {"errors", "sources", "variants", "checkpoint", "cards"},
    "verify": {"errors", "sources", "tuner", "checkpoint", "variants", "rwkv"},
    "tuner": {"errors", "sources", "shards", "ops", "variants", "cards"},
    "rwkv": {"errors", "checkpoint"},
    "train": {"errors", "sources", "tuner", "checkpoint", "variants", "rwkv", "conversion", "merge"},
    "report": {"errors", "sources", "tuner", "checkpoint", "variants", "conversion", "rwkv"},
    "evaluate": {"errors", "sources", "tuner", "checkpoint", "variants", "rwkv", "train"},
    "compare": {"errors", "sources", "tuner", "variants", "rwkv", "train", "evaluate"},
    "cli": {
        "errors",
        "sources",
        "train",
        "report",
        "merge",
        "conversion",
        "verify",
        "checkpoint",
        "evaluate",
        "compare",
    },
    "__main__": {"cli"},
    "__init__": {"errors", "import_hook", "host_hooks", "tuner", "merge", "conversion", "rwkv"},
}
# Maths and files work without the hosts; the commands start without anything heavy.
WITHOUT_HOSTS = {
    "errors",
    "sources",
    "import_hook",
    "host_hooks",
    "shards",
    "ops",
    "variants",
    "checkpoint",
    "merge",
    "conversion",
    "cards",
}
HEAVY = {"torch", "transformers", "peft", "trl", "datasets", "matplotlib", "numpy"}

FILES = sorted(SOURCE.rglob("*.py"))


def room(path: Path) -> str:
    """The top-level package or module that a file belongs to."""
    first = path.relative_to(SOURCE).parts[0]
    return first.removesuffix(".py")


def imported(path: Path) -> list[tuple[str, bool]]:
    """Full names that a file imports, each with whether it does so when it is loaded itself."""
    tree = ast.parse(path.read_text())
    late = {
        child
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        for child in ast.walk(node)
    }
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [(alias.name, node not in late) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            names += [(f"{module}.{a.name}" if module == "flashbone" else module, node not in late) for a in node.names]
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_go_one_way(path):
    here = room(path)
    assert here in ALLOWED, f"{here} is new: give it a place in the import rule"
    public = {"BoneConfig", "BoneLayer", "BoneLinear", "BoneModel", "FlashboneError", "__version__"}
    for name, _ in imported(path):
        parts = name.split(".")
        if parts[0] != "flashbone":
            continue
        if len(parts) == 1:
            assert "tuner" in ALLOWED[here] | {here}, f"{here} must not import all of flashbone"
            continue
        there = "tuner" if parts[1] in public - {"FlashboneError", "__version__"} else parts[1]
        assert there in ALLOWED[here] | {here, "__version__"}, f"{here} must not import {name}"


@pytest.mark.parametrize(
    "path", [p for p in FILES if room(p) in WITHOUT_HOSTS], ids=lambda p: str(p.relative_to(SOURCE))
)
def test_maths_and_files_know_neither_peft_nor_transformers(path):
    assert not {name.split(".")[0] for name, _ in imported(path)} & {"peft", "transformers", "trl", "accelerate"}


@pytest.mark.parametrize("path", [p for p in FILES if room(p) in ("cli", "__main__", "__init__")], ids=lambda p: p.name)
def test_commands_import_nothing_heavy_when_they_are_loaded(path):
    assert not {name.split(".")[0] for name, at_load in imported(path) if at_load} & HEAVY
