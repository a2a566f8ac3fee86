"""SECURITY.md names tests that exist, and the source has no call that would break its promises."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "src/flashbone").rglob("*.py"))
RUNS_CODE = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "pickle.load", "pickle.loads"),
    *("pickle.Unpickler", "marshal.load", "marshal.loads", "shelve.open", "yaml.load", "yaml.load_all"),
    *("yaml.full_load", "yaml.unsafe_load", "np.load", "numpy.load", "torch.jit.load", "torch.hub.load"),
}
NETWORK = {
    *("aiohttp", "ftplib", "http", "httpx", "requests", "smtplib", "socket", "ssl", "urllib", "urllib3", "websockets"),
}


def claims() -> list[tuple[str, str]]:
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    return re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)


@pytest.mark.parametrize(("file", "name"), claims(), ids=[name for _, name in claims()])
def test_every_test_that_the_policy_names_exists(file, name):
    assert re.search(rf"^def {name}\(", (ROOT / file).read_text(encoding="utf-8"), re.M)


def test_every_row_of_the_policy_names_a_test():
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ") and "| shown by |" not in line]
    assert len(rows) > 15
    assert [row for row in rows if "::test_" not in row] == []


def risks(source: str) -> list[str]:
    """Calls in Python source that run what they are given, or load a pickle without a check."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name, given = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
        unchecked = name == "torch.load" and given.get("weights_only") != "True"
        trusting = given.get("trust_remote_code", "False") != "False" or given.get("shell", "False") != "False"
        starts = re.match(r"(subprocess\.|os\.exec|os\.spawn)\w+$", name)
        if name in RUNS_CODE or starts or unchecked or trusting:
            found.append(name)
    return found


def imported(source: str) -> set[str]:
    """The top-level packages that Python source imports, at any place."""
    nodes = list(ast.walk(ast.parse(source)))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return {name.split(".")[0] for name in plain | {n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)}}


def test_no_call_in_the_source_runs_what_a_file_says():
    found = {str(path.relative_to(ROOT / "src/flashbone")): risks(path.read_text(encoding="utf-8")) for path in SOURCES}
    # git is asked for the commit of the package's own checkout; the loader of YAML is a subclass of the safe one.
    known = {"compare/about.py": {"subprocess.run"}, "files/plain_yaml.py": {"yaml.load"}}
    assert {path: set(names) for path, names in found.items() if names} == known


@pytest.mark.parametrize(
    "line",
    [
        *("eval(x)", "os.system(x)", "pickle.load(f)", "yaml.load(f, Loader=yaml.Loader)", "torch.load(f)"),
        *("torch.load(f, weights_only=False)", "subprocess.run(x)", "f(trust_remote_code=True)", "f(x, shell=True)"),
    ],
)
def test_such_a_call_would_be_seen(line):
    assert len(risks(f"def g():\n    return {line}")) == 1


def test_the_source_opens_no_connection_of_its_own():
    assert {
        str(path): found for path in SOURCES if (found := imported(path.read_text(encoding="utf-8")) & NETWORK)
    } == {}
    assert imported("def f():\n    from urllib.request import urlopen") & NETWORK
