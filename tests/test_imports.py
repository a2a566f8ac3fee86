"""The import rule of docs/design.md, read off every source file: imports go one way."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "flashbone"

# Package or module -> what it may import of flashbone, besides itself. A room that is missing here is an error, and so
# is an entry that nothing needs.
ALLOWED = {
    "errors": set(),
    "import_hook": set(),
    "host_hooks": {"import_hook", "tuner"},  # the tuner once a host has been imported
    "sources": {"errors"},
    "outputs": set(),
    "shards": {"errors"},
    "ops": {"errors", "shards"},
    "variants": {"errors", "shards", "ops"},
    "checkpoint": {"errors", "sources", "variants"},
    "cards": set(),
    "merge": {"errors", "sources", "variants", "checkpoint"},
    "conversion": {"errors", "variants", "checkpoint", "cards"},
    "verify": {"errors", "checkpoint", "rwkv"},
    "tuner": {"errors", "sources", "shards", "ops", "variants", "cards"},
    "rwkv": {"errors", "checkpoint"},
    "train": {"errors", "outputs", "sources", "tuner", "checkpoint", "variants", "rwkv", "conversion", "merge"},
    "report": {"errors", "outputs", "sources", "tuner", "checkpoint", "variants", "conversion", "rwkv"},
    "evaluate": {"errors", "outputs", "sources", "checkpoint", "rwkv", "train"},
    "compare": {"errors", "outputs", "tuner", "variants", "train", "evaluate"},
    "cli": {
        "errors",
        "outputs",
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
    "outputs",
    "sources",
    "import_hook",
    "shards",
    "ops",
    "variants",
    "checkpoint",
    "merge",
    "conversion",
    "cards",
}
LIGHT = {"cli", "__main__", "__init__", "import_hook", "host_hooks"}
HEAVY = {"torch", "transformers", "peft", "trl", "datasets", "matplotlib", "numpy"}

# Names that `flashbone` itself gives, and the rooms that they are from.
PUBLIC = dict.fromkeys(("BoneConfig", "BoneLayer", "BoneLinear", "BoneModel"), "tuner")
PUBLIC |= {"FlashboneError": "errors", "__version__": "__init__"}

FILES = sorted(SOURCE.rglob("*.py"))


def name_of(path: Path) -> str:
    return str(path.relative_to(SOURCE))


def room(path: Path, source: Path = SOURCE) -> str:
    """The top-level package or module that a file belongs to."""
    return path.relative_to(source).parts[0].removesuffix(".py")


def imported(path: Path) -> list[tuple[str, bool]]:
    """Full names that a file imports, `from` its package or by `import_module`, each with whether it does so when it is
    loaded itself."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    late = {
        child
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        for child in ast.walk(node)
    }
    return [(name, node not in late) for node in ast.walk(tree) for name in _names(node, path)]


def _names(node: ast.AST, path: Path) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"{path}: relative import"
        module = node.module or ""
        yield from ([f"{module}.{alias.name}" for alias in node.names] if module == "flashbone" else [module])
    elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
        yield from (argument.value for argument in node.args if isinstance(argument, ast.Constant))


def rooms_imported(path: Path, source: Path = SOURCE) -> set[str]:
    """The other rooms that a file imports from; "all" where it imports the whole package."""
    names = [name.split(".") for name, _ in imported(path) if name.split(".")[0] == "flashbone"]
    found = {PUBLIC.get(parts[1], parts[1]) if len(parts) > 1 else "all" for parts in names}
    return found - {room(path, source), "__init__"}  # the version is everybody's


def misfits(path: Path, source: Path = SOURCE) -> list[str]:
    """What a file imports against the rule."""
    here = room(path, source)
    if here not in ALLOWED:
        return [f"{here} is new: give it a place in the import rule"]
    return [f"{here} must not import {there}" for there in sorted(rooms_imported(path, source) - ALLOWED[here])]


def test_every_file_under_src_is_looked_at():
    assert {path for path in SOURCE.parent.rglob("*.py") if "egg-info" not in str(path)} == set(FILES)
    assert len(FILES) > 200
    assert {room(path) for path in FILES} == set(ALLOWED)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_go_one_way(path):
    assert misfits(path) == []


def test_the_rule_allows_nothing_that_no_file_needs():
    needed = {here: set() for here in ALLOWED}
    for path in FILES:
        needed[room(path)] |= rooms_imported(path)
    assert {here: there - needed[here] for here, there in ALLOWED.items() if there - needed[here]} == {}


@pytest.mark.parametrize(
    ("place", "text", "wrong"),
    [
        ("attic/boxes.py", "", ["attic is new: give it a place in the import rule"]),
        ("attic.py", "", ["attic is new: give it a place in the import rule"]),
        ("shards.py", "from flashbone.ops.moves import Moves", ["shards must not import ops"]),
        ("ops/deep/file.py", "import flashbone.variants.bone", ["ops must not import variants"]),
        ("variants/a.py", "def f():\n    from flashbone import tuner", ["variants must not import tuner"]),
        ("variants/a.py", "from flashbone import BoneLayer", ["variants must not import tuner"]),
        ("merge/a.py", "import_module('flashbone.tuner.register')", ["merge must not import tuner"]),
        ("train/a.py", "if TYPE_CHECKING:\n    import flashbone.cli", ["train must not import cli"]),
        ("train/a.py", "import flashbone", ["train must not import all"]),
        ("ops/a.py", "from flashbone.errors import ShapeError\nfrom flashbone.ops.moves import Moves", []),
    ],
)
def test_a_file_against_the_rule_is_found(tmp_path, place, text, wrong):
    path = tmp_path / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    assert misfits(path, tmp_path) == wrong


@pytest.mark.parametrize("path", [p for p in FILES if room(p) in WITHOUT_HOSTS], ids=name_of)
def test_maths_and_files_know_neither_peft_nor_transformers(path):
    hosts = {"peft", "transformers", "trl", "accelerate"}
    assert not {name.split(".")[0] for name, _ in imported(path)} & hosts


@pytest.mark.parametrize("path", [p for p in FILES if room(p) in LIGHT], ids=name_of)
def test_commands_and_hooks_import_nothing_heavy_when_they_are_loaded(path):
    assert not {name.split(".")[0] for name, at_load in imported(path) if at_load} & HEAVY
