"""The import rule of docs/design.md, read off every source file: imports go one way."""

import ast
import functools
import graphlib
import re
from contextlib import suppress
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "flashbone"

# Package or module -> what it may import of flashbone, besides itself. A room that is missing here is an error, and so
# is an entry that nothing needs.
ALLOWED = {
    "errors": set(),
    "printing": {"errors"},
    "floors": {"errors"},
    "import_hook": set(),
    "host_hooks": {"floors", "import_hook", "tuner"},  # the tuner once a host has been imported
    "shards": {"errors"},
    "ops": {"errors", "shards"},
    "variants": {"errors", "shards", "ops"},
    "files": {"errors", "variants"},
    "conversion": {"errors", "variants", "files"},
    "merge": {"errors", "variants", "files", "rwkv"},  # RWKV's models in merge/verify alone
    "tuner": {"errors", "files", "shards", "ops", "variants", "rwkv"},
    "rwkv": {"errors", "files", "ops"},
    "train": {"errors", "floors", "printing", "tuner", "files", "variants", "rwkv", "merge"},
    "evaluate": {"errors", "printing", "files", "train"},
    "generation": {"errors", "files", "train", "evaluate", "rwkv"},
    "inspect": {"errors", "printing", "tuner", "files", "variants", "conversion", "rwkv"},
    "compare": {"errors", "printing", "files", "tuner", "variants", "train", "evaluate"},
    "hosts": {"all", "tuner", "variants"},
    "cli": {
        "errors",
        "floors",
        "printing",
        "files",
        "train",
        "inspect",
        "merge",
        "conversion",
        "evaluate",
        "generation",
        "compare",
    },
    "__main__": {"cli"},
    "__init__": {"errors", "floors", "import_hook", "host_hooks", "tuner", "merge", "conversion", "rwkv"},
}
# Maths and files work without the hosts; the commands start without anything heavy.
WITHOUT_HOSTS = {"errors", "floors", "import_hook", "host_hooks", "shards", "ops", "variants", "files"}
WITHOUT_HOSTS |= {"merge", "conversion"}
WITH_HOSTS = "merge/verify"  # runs models
LIGHT = {"cli", "__main__", "__init__", "floors", "import_hook", "host_hooks"}
HOSTS = {"peft", "transformers", "trl", "accelerate"}
NAMED_HOSTS = {"host_hooks": {"peft"}}  # once it is there
HEAVY = {"torch", "transformers", "peft", "trl", "datasets", "matplotlib", "numpy"}

# Names that `flashbone` itself gives, and the rooms that they are from.
PUBLIC = dict.fromkeys(("BoneConfig", "BoneLayer", "BoneLinear", "BoneModel"), "tuner")
PUBLIC |= {"FlashboneError": "errors", "__version__": "__init__"}

UNREADABLE = "flashbone.?"
FILES = sorted(SOURCE.rglob("*.py"))


def name_of(path: Path) -> str:
    return str(path.relative_to(SOURCE))


def room(path: Path, source: Path = SOURCE) -> str:
    """The top-level package or module that a file belongs to."""
    return path.relative_to(source).parts[0].removesuffix(".py")


def imported(path: Path) -> list[tuple[str, bool]]:
    """Full names that a file imports, `from` its package or by `import_module`, each with whether it does so when it is
    loaded itself. An import whose name cannot be read gives "flashbone.?", which no room may import."""
    return _imported(path, path.read_text(encoding="utf-8"))


@functools.cache
def _imported(path: Path, text: str) -> list[tuple[str, bool]]:
    tree = ast.parse(text)
    late = {child for node in ast.walk(tree) for later in _run_later(node) for child in ast.walk(later)}
    literals = _literals(tree)
    called = {node.func for node in ast.walk(tree) if isinstance(node, ast.Call) and _loader(node.func)}
    found = []
    for node in ast.walk(tree):
        if _loader(node) and node not in called:  # given another name, or handed on
            names = [UNREADABLE]
        else:
            names = _names(node, path, literals)
        found += [(name, node not in late) for name in names]
    return found


def _run_later(node: ast.AST) -> list[ast.AST]:
    """The parts of a statement that do not run when its file is loaded: defaults and decorators do, and an `else`."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return list(node.body)
    if isinstance(node, ast.Lambda):
        return [node.body]
    if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
        return list(node.body)
    return []


def _loader(node: ast.AST) -> bool:
    """Whether this is `import_module` or `__import__`, also as a text (for getattr)."""
    name = getattr(node, "attr", None) or getattr(node, "id", None) or getattr(node, "value", None)
    return isinstance(node, (ast.Attribute, ast.Name, ast.Constant)) and name in ("import_module", "__import__")


def _literals(tree: ast.Module) -> dict[str, object]:
    """Constants of a file, also tables, that nothing in it binds a second time."""
    bound = [node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)]
    bound += [node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)]
    found = {}
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        value = getattr(node, "value", None)
        if len(targets) == 1 and isinstance(targets[0], ast.Name) and value and bound.count(targets[0].id) == 1:
            with suppress(ValueError):
                found[targets[0].id] = ast.literal_eval(value)
    return found


def _values(node: ast.AST, literals: dict[str, object]) -> list:
    """All that an expression may stand for; nothing if that cannot be told."""
    if isinstance(node, ast.Constant):
        return [node.value]
    if isinstance(node, ast.Name) and node.id in literals:
        return [literals[node.id]]
    if isinstance(node, ast.JoinedStr) and isinstance(node.values[0], ast.Constant):
        # Whatever follows, `flashbone.room.` is in that room, and `peft.` in peft.
        known = re.match(r"(flashbone\.\w+|(?!flashbone)\w+)\.", str(node.values[0].value))
        return [known[1]] if known else []
    if isinstance(node, ast.Subscript):
        tables = _values(node.value, literals)
        if isinstance(node.slice, ast.Constant):
            return [table[node.slice.value] for table in tables]
        return [value for table in tables if isinstance(table, dict) for value in table.values()]
    return []


def _names(node: ast.AST, path: Path, literals: dict[str, object]) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"{path}: relative import"
        if node.module in ("flashbone", "flashbone.__init__"):
            return [f"flashbone.{alias.name}" for alias in node.names]
        renamed = any(alias.name == "import_module" and alias.asname not in (None, alias.name) for alias in node.names)
        return [node.module or "", *([UNREADABLE] if renamed else [])]
    if isinstance(node, ast.Call) and _loader(node.func):
        given = [*node.args, *(keyword.value for keyword in node.keywords)]
        named = [keyword.value for keyword in node.keywords if keyword.arg == "name"] or node.args[:1]
        # With more than a name, such as a package, the name may be relative.
        names = _values(named[0], literals) if len(given) == len(named) == 1 else []
        return names if names and all(isinstance(name, str) for name in names) else [UNREADABLE]
    return []


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
    assert len(FILES) > 150
    assert {room(path) for path in FILES} == set(ALLOWED)


def test_imports_go_one_way():
    assert {name_of(path): wrong for path in FILES if (wrong := misfits(path))} == {}


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
        ("merge/a.py", "import_module('flashbone.tuner.hosts.registration')", ["merge must not import tuner"]),
        ("train/a.py", "if TYPE_CHECKING:\n    import flashbone.cli", ["train must not import cli"]),
        ("train/a.py", "import flashbone", ["train must not import all"]),
        ("errors.py", "from flashbone.__init__ import tuner", ["errors must not import tuner"]),
        ("merge/a.py", "import_module(name='flashbone.tuner')", ["merge must not import tuner"]),
        ("merge/a.py", "importlib.import_module(f'flashbone.tuner.{x}')", ["merge must not import tuner"]),
        ("merge/a.py", "importlib.import_module(f'flashbone.{x}')", ["merge must not import ?"]),
        ("merge/a.py", "import_module(f'{x}')", ["merge must not import ?"]),
        ("merge/a.py", "NAME = 'flashbone.tuner'\nimport_module(NAME)", ["merge must not import tuner"]),
        ("merge/a.py", "T = {1: ('flashbone.tuner', 'x')}\nimport_module(T[n][0])", ["merge must not import tuner"]),
        ("merge/a.py", "NAME = 'peft'\ndef f(NAME):\n    import_module(NAME)", ["merge must not import ?"]),
        ("merge/a.py", "import_module(name)", ["merge must not import ?"]),
        ("merge/a.py", "import_module()", ["merge must not import ?"]),
        ("merge/a.py", "import_module(*names)", ["merge must not import ?"]),
        ("merge/a.py", "import_module('.tuner', 'flashbone')", ["merge must not import ?"]),
        ("merge/a.py", "__import__('flashbone.tuner')", ["merge must not import tuner"]),
        ("merge/a.py", "from importlib import import_module as load\nload(name)", ["merge must not import ?"]),
        ("merge/a.py", "load = importlib.import_module\nload(name)", ["merge must not import ?"]),
        ("merge/a.py", "getattr(importlib, 'import_module')(name)", ["merge must not import ?"]),
        ("merge/a.py", "import_module('peft')\nimport_module(f'peft.{x}')", []),
        ("ops/a.py", "from flashbone.errors import ShapeError\nfrom flashbone.ops.moves import Moves", []),
    ],
)
def test_a_file_against_the_rule_is_found(tmp_path, place, text, wrong):
    path = tmp_path / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    assert misfits(path, tmp_path) == wrong


@pytest.mark.parametrize(
    ("text", "at_load"),
    [
        ("import torch", True),
        ("if TYPE_CHECKING:\n    import torch", False),
        ("if typing.TYPE_CHECKING:\n    import torch", False),
        ("if not TYPE_CHECKING:\n    import torch", True),
        ("if TYPE_CHECKING or True:\n    import torch", True),
        ("if TYPE_CHECKING:\n    pass\nelse:\n    import torch", True),
        ("if TYPE_CHECKING:\n    pass\nelif x:\n    import torch", True),
        ("def f():\n    import torch", False),
        ("f = lambda: import_module('torch')", False),
        ("def f(x=import_module('torch')):\n    pass", True),
        ("class A:\n    import torch", True),
    ],
)
def test_an_import_is_late_only_where_loading_the_file_does_not_run_it(tmp_path, text, at_load):
    path = tmp_path / "a.py"
    path.write_text(text)
    assert imported(path) == [("torch", at_load)]


def test_maths_and_files_know_neither_peft_nor_transformers():
    for path in FILES:
        if room(path) in WITHOUT_HOSTS and not name_of(path).startswith(WITH_HOSTS):
            hosts = {name.split(".")[0] for name, _ in imported(path)} & HOSTS
            assert hosts <= NAMED_HOSTS.get(room(path), set()), name_of(path)


def test_commands_and_hooks_import_nothing_heavy_when_they_are_loaded():
    for path in FILES:
        if room(path) in LIGHT:
            assert not {name.split(".")[0] for name, at_load in imported(path) if at_load} & HEAVY, name_of(path)


def module(path: Path) -> str:
    """The name of a file's module, without `flashbone.`; of the package itself it is empty."""
    return ".".join(part for part in path.relative_to(SOURCE).with_suffix("").parts if part != "__init__")


def modules_imported(path: Path, modules: set[str]) -> set[str]:
    """The modules that a file names in import statements, wherever they are. Public names that an `__init__` loads on
    first use, and lists for type checkers, do not count."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if path.name == "__init__.py":
        tree.body = [node for node in tree.body if not (isinstance(node, ast.If) and _run_later(node))]
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name.removeprefix("flashbone.") in modules else str(node.module) for name in inner}
    named = {name.removeprefix("flashbone").removeprefix(".") for name in names if name.split(".")[0] == "flashbone"}
    return (named & modules) - {module(path)}


def test_no_modules_import_each_other_in_a_circle():
    """Late imports and those for types included: what two modules need goes below both."""
    modules = {module(path) for path in FILES}
    graph = {module(path): modules_imported(path, modules) for path in FILES}
    circle = ""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        circle = " imports ".join(reversed(error.args[1]))
    assert circle == ""
