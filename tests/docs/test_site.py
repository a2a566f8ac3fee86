"""The site: it builds strictly, names every option and every public name, and asks for nothing from elsewhere."""

import importlib
import importlib.util
import re
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest

import flashbone
from flashbone.cli import COMMANDS
from helpers.pages import ROOT

pytestmark = pytest.mark.slow

SITE = ROOT / "docs" / "site"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The built site; the build is strict, so that a link that leads nowhere fails here."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def tools(monkeypatch):
    """The modules of docs/site."""
    monkeypatch.syspath_prepend(str(SITE))
    return importlib.import_module


def words(page: Path) -> str:
    """A built page's text."""
    return unescape(re.sub(r"<[^>]+>", "", page.read_text()))


@pytest.mark.parametrize("name", COMMANDS)
def test_a_commands_page_has_its_description_and_every_option(site, name):
    text = words(site / "commands" / f"{name}.html")
    parser = importlib.import_module(COMMANDS[name][0]).make_parser()
    assert parser.description.replace("`", "") in text
    for action in parser._actions:
        assert [option for option in action.option_strings if option not in text] == []
        assert action.help
        shown = action.help.replace("%%", "%").replace("`", "")
        assert " ".join(shown.split()) in " ".join(text.split())


def test_every_field_of_the_files_of_train_and_compare_has_a_meaning(tools):
    pages = tools("command_pages")
    rows = [row for name in pages.FIELDS for row in pages.page(name).splitlines() if re.match(r"\| `\w+` \|", row)]
    assert len(rows) > 40
    assert [row for row in rows if "\\" in row or row.count(" | ") != 3] == []
    assert [row for row in rows if not row.split(" | ")[-1].rstrip(" |")] == []


def test_every_public_name_is_in_the_reference(site):
    text = "".join(page.read_text() for page in (site / "reference").glob("*.html"))
    rwkv = importlib.import_module("flashbone.rwkv")
    errors = [name for name in vars(importlib.import_module("flashbone.errors")) if name.endswith("Error")]
    for name in [*flashbone.__all__, *rwkv.__all__, *errors]:
        assert re.search(rf'id="flashbone[\w.]*\.{name}"', text), name


def test_the_notebooks_are_pages_with_their_figures(site):
    for script in (ROOT / "examples" / "notebooks").glob("*.py"):
        if "# %%" in script.read_text():
            page = site / "notebooks" / f"{script.stem}.html"
            images = re.findall(r'<img[^>]* src="\.\./(images/notebooks/[^"]+)"', page.read_text())
            assert images
            assert all((site / image).stat().st_size > 1000 for image in images)


class Loaded(HTMLParser):
    """What a page loads by itself: addresses in the attributes that make a browser load, and in styles and scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.inside = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.inside = tag if tag in ("script", "style") else ""
        given = {name: value or "" for name, value in attrs}
        loading = ("src", "srcset", "data", "poster", *(["href"] if tag in ("link", "image", "use") else []))
        self.found += [given[name] for name in loading if re.search(ELSEWHERE, given.get(name, ""))]
        self.found += loads(given.get("style", ""))

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        self.found += loads(data) if self.inside == "style" else []
        self.found += re.findall(rf"""["'`]{ELSEWHERE}[^"'`]*""", data) if self.inside == "script" else []


ELSEWHERE = r"(?i:https?:)?//"


def loads(css: str) -> list[str]:
    """Addresses elsewhere that a style sheet loads."""
    return re.findall(rf"""(?:url\(\s*|@import\s+)["']?({ELSEWHERE}[^"')\s]+)""", css)


def test_a_page_loads_nothing_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 50
    assert {page.name: found for page in pages if (found := Loaded(page.read_text()).found)} == {}


def test_our_style_sheets_and_drawings_load_nothing_from_elsewhere():
    ours = [file for kind in ("css", "svg") for file in (ROOT / "docs").rglob(f"*.{kind}")]
    assert ROOT / "docs" / "assets" / "site.css" in ours
    assert {file.name: found for file in ours if (found := loads(file.read_text()))} == {}
    assert not list((ROOT / "docs").rglob("*.js"))  # scripts are the theme's alone


@pytest.mark.parametrize(
    ("page", "count"),
    [
        ("<script src='https://a.b/c.js'></script>", 1),
        ("<script async src=//a.b/c.js></script>", 1),
        ("<script>import('https://a.b/c.js')</script>", 1),
        ("<style>@import 'http://a.b/c.css'; a { background: url(https://a.b/c.png) }</style>", 2),
        ("<p style='background: url(\"http://a.b/c.png\")'>", 1),
        ("<link rel=stylesheet href='https://a.b/c.css'><img srcset='https://a.b/c.png 2x'>", 2),
        ("<a href='https://a.b/c'>https://a.b</a><script src='../c.js'>x = 1 // http</script>", 0),
        ("<style>a { background: url(c.png); fill: url(#d) }</style><img src='../c.png'>", 0),
    ],
)
def test_what_a_page_loads_from_elsewhere_is_found(page, count):
    assert len(Loaded(page).found) == count


def test_files_of_a_folder_are_all_but_the_hidden_ones(tools, tmp_path):
    folder = tmp_path / ".checkout" / "examples"
    kept = [folder / "a.py", folder / "one" / "two" / "three" / "b.py"]
    left = [folder / ".env", folder / ".cache" / "a" / "b" / "c" / "d" / "e", folder / "one" / "__pycache__" / "f.pyc"]
    for file in [*kept, *left]:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("")
    assert tools("links")._files(folder) == kept


def test_links_to_files_outside_docs_lead_to_their_copies(site):
    for name in ("examples/train_sft.yaml", "CITATION.cff"):
        assert (site / "files" / name).read_bytes() == (ROOT / name).read_bytes()
    assert (site / "project" / "changelog.html").exists()


def test_links_are_led_to_where_the_site_has_what_they_name(tools):
    links = tools("links")
    text = "[a](../CHANGELOG.md#x) [b](adapters.md) [c](../examples/train_sft.yaml) [d](https://a.b/c)"
    want = "[a](project/changelog.md#x) [b](adapters.md) [c](files/examples/train_sft.yaml) [d](https://a.b/c)"
    assert links.rewritten(text, "moving.md", ROOT) == want
    assert links.rewritten("[a](docs/maths.md)", "project/contributing.md", ROOT) == "[a](../maths.md)"
    assert links.rewritten("[a](nowhere.md)", "project/contributing.md", ROOT) == "[a](nowhere.md)"
    titled = "[The mathematics](maths.md#precision) [nowhere.md](nowhere.md)"
    assert links.rewritten(titled.replace("The mathematics", "maths.md"), "tried.md", ROOT) == titled


def test_a_notebook_becomes_markdown_and_code(tools):
    script = "# %% [markdown]\n# # Title\n#\n# Text.\n\n# %%\nx = 1\n\n# %% [markdown]\n# ![a](b.png)\n"
    page = tools("notebook_pages").page(script, "first.py")
    assert page.startswith("# Title\n\n*A notebook, ")
    assert page.endswith("\n\nText.\n\n```python\nx = 1\n```\n\n![a](b.png)\n")


def test_a_broken_link_fails_the_build(tmp_path):
    """On a copy of the configuration with one page, which links to what is not there."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# A page\n\n[gone](gone.md)\n")
    text = (ROOT / "mkdocs.yml").read_text()
    settings = re.findall(r"^(?:site_name|strict|validation):.*\n(?:  .*\n)*", text, re.M)
    assert len(settings) == 3
    (tmp_path / "mkdocs.yml").write_text("".join(settings))
    command = [sys.executable, "-m", "mkdocs", "build"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "gone.md" in done.stderr
