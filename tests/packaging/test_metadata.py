"""pyproject.toml, constraints.txt, the Makefile and the files around them, held against each other."""

import re
from pathlib import Path

import pytest
import tomllib
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import flashbone

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
EXTRAS = PROJECT["optional-dependencies"]
MAKEFILE = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("Makefile", "environments.mk"))
NOT_FOR_USERS = {"dev", "test", "docs", "all"}
# What no pin is for, and why.
TRACKERS = {"trackio", "tensorboard", "wandb", "mlflow"}  # of which a user has one
UNPINNED: dict[str, str] = dict.fromkeys(TRACKERS - {"trackio", "tensorboard"}, "no target installs it")


def pins() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    assert all(len(pair) == 2 for pair in pairs), "a line is no exact pin"
    found = {canonicalize_name(name): Version(version) for name, version in pairs}
    assert len(found) == len(pairs), "a package is pinned twice"
    return found


def requirements() -> list[Requirement]:
    listed = [*PROJECT["dependencies"], *(line for name, lines in EXTRAS.items() if name != "all" for line in lines)]
    return [Requirement(line) for line in listed]


def test_all_covers_every_extra_of_users_and_nothing_else():
    (line,) = EXTRAS["all"]
    everything = Requirement(line)
    assert everything.name == PROJECT["name"]
    assert everything.extras == set(EXTRAS) - NOT_FOR_USERS - TRACKERS


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_every_requirement_is_pinned_within_its_bounds_or_excused(requirement):
    name = canonicalize_name(requirement.name)
    assert (name in pins()) != (name in UNPINNED)
    assert name in UNPINNED or requirement.specifier.contains(pins()[name])


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_every_requirement_says_from_which_version_on_and_not_until_when(requirement):
    assert [clause.operator for clause in requirement.specifier] == [">="]


def test_an_isolated_build_asks_for_hatchling_alone():
    assert PYPROJECT["build-system"]["requires"] == ["hatchling"]
    assert "hooks" not in PYPROJECT["tool"]["hatch"].get("build", {})


def test_torch_is_asked_for_by_its_pin():
    asked = re.findall(r"torch==([\w.]+)", MAKEFILE)
    assert asked
    assert {Version(version) for version in asked} == {pins()["torch"]}


def test_the_version_is_written_in_one_place():
    assert "version" not in PROJECT
    assert PROJECT["dynamic"] == ["version"]
    place = PYPROJECT["tool"]["hatch"]["version"]["path"]
    written = [
        path
        for path in sorted((ROOT / "src").rglob("*.py"))
        if re.search(r"^__version__\s*[:=]", path.read_text(encoding="utf-8"), re.M)
    ]
    assert written == [ROOT / place]
    assert str(Version(flashbone.__version__)) == flashbone.__version__
    assert not re.search(r"^version:", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.M)


def test_the_changelog_speaks_of_this_version_or_of_what_is_not_released_yet():
    heads = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert heads[0] == "Unreleased" or heads[0].split()[0] == flashbone.__version__


def test_the_package_is_typed_and_says_so():
    assert (ROOT / "src/flashbone/py.typed").is_file()
    assert "Typing :: Typed" in PROJECT["classifiers"]


def test_the_licence_is_apache_2_and_needs_no_notice():
    assert PROJECT["license"] == "Apache-2.0"
    assert PROJECT["license-files"] == ["LICENSE"]
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert text.split()[:4] == ["Apache", "License", "Version", "2.0,"]
    assert "END OF TERMS AND CONDITIONS" in text
    # A classifier for the licence is refused beside an expression; a NOTICE would have to be in license-files.
    assert not [name for name in PROJECT["classifiers"] if name.startswith("License ::")]
    assert not list(ROOT.glob("NOTICE*"))


def test_what_the_sdist_is_to_hold_is_there():
    listed = PYPROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    assert all(name.startswith("/") for name in listed), "without a slash it would match in any folder"
    assert [name for name in listed if not (ROOT / name[1:]).exists()] == []
    assert {"/LICENSE", "/README.md", "/constraints.txt", "/tests"} <= set(listed)


@pytest.mark.parametrize("target", re.findall(r"^(test-[\w-]+):(?! export)", MAKEFILE, re.M))
def test_every_test_of_the_makefile_is_in_its_help_and_in_the_release_checklist(target):
    assert re.search(rf'echo ".*make {target}\b', MAKEFILE)
    assert f"`make {target}`" in (ROOT / "docs/releasing.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", ["SECURITY.md", "CONTRIBUTING.md"])
def test_links_of_the_pages_at_the_top_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#:]+)\)", text)
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_contributors_find_the_release_checklist_and_the_security_policy():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert "(docs/releasing.md)" in text
    assert "(SECURITY.md)" in text
