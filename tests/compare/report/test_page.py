"""The page's text and the figures: one file, nothing loaded, everything escaped, whole or not at all."""

import base64
import hashlib
import html
import itertools
import re

import comparison_rows as made
import numpy as np
import pytest

from flashbone.compare.reading import read_results
from flashbone.compare.report import figures, write_report
from flashbone.compare.report.page import page
from flashbone.compare.report.ranking import rank
from flashbone.errors import FormatError

CHARTS = ("learning_curves", "learning_speed", "memory_quality", "learning_rates")
EVIL = "</script><script>alert(1)</script>\"'&<b>ü漢\u2028"
# Machado, Oliveira and Fernandes (2009), severity 1.0, on linear RGB.
SEEN_AS = {
    "by all cones": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
}


def linear(colour):
    values = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    """CIE L*a*b* of linear sRGB, D65."""
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = np.cbrt(to_xyz @ np.clip(rgb, 0, 1) / (0.9505, 1.0, 1.089))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def contrast(first, second):
    dark, light = sorted(linear(c) @ (0.2126, 0.7152, 0.0722) for c in (first, second))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("eye", SEEN_AS)
@pytest.mark.parametrize("palette", [figures.LIGHT, figures.DARK], ids=["light", "dark"])
def test_colours_are_told_apart_by_every_eye(eye, palette):
    seen = [lab(np.array(SEEN_AS[eye]) @ linear(colour)) for colour in palette]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 18


def test_red_and_green_of_the_same_lightness_would_fail_that_test():
    seen = [lab(np.array(SEEN_AS["deuteranopia"]) @ linear(colour)) for colour in ("#b07030", "#7a8a30")]
    assert np.linalg.norm(seen[0] - seen[1]) < 18


@pytest.mark.parametrize(
    ("palette", "ground"),
    [(figures.LIGHT, figures.LIGHT_GROUND), (figures.DARK, figures.DARK_GROUND)],
    ids=["light", "dark"],
)
def test_colours_stand_out_from_their_ground(palette, ground):
    assert min(contrast(colour, ground) for colour in palette) >= 3


def test_no_two_of_twenty_one_methods_look_the_same():
    assert len({figures.look_of(n) for n in range(21)}) == 21


@pytest.mark.slow
def test_the_report_is_a_page_and_four_figures(tmp_path):
    paths = write_report(made.write(tmp_path, made.all_methods()), tmp_path / "new" / "report")
    names = ["report.html", *(f"{name}.png" for name in CHARTS)]
    assert [path.name for path in paths] == names
    assert sorted(path.name for path in paths[0].parent.iterdir()) == sorted(names)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths[1:])


def test_a_broken_file_leaves_no_report(tmp_path):
    path = made.write(tmp_path, made.comparison({"a": 0.0}))
    path.write_text(path.read_text() + "{")
    with pytest.raises(FormatError):
        write_report(path, tmp_path / "report")
    assert not (tmp_path / "report").exists()


def page_of(tmp_path, lines):
    return page(rank(read_results(made.write(tmp_path, lines)), 1000))


def test_nothing_can_break_out_of_the_page(tmp_path):
    lines = made.comparison({"a": 0.0, "b": 0.0, "c": 0.0}, titles={"a": EVIL}, sweep=False)
    lines[0].update(name=EVIL, model=EVIL, hardware=EVIL, versions={EVIL: EVIL})
    lines[0]["fairness"] = {"checked": [EVIL], "problems": [EVIL]}
    lines[1].update(size=EVIL, rerun=EVIL, train=EVIL)
    lines[2].update(status="failed", error=EVIL)
    text = page_of(tmp_path, [line for line in lines if line.get("method") != "b" or line["kind"] == "method"])
    assert "<script>alert" not in text
    assert "<b>ü" not in text
    assert len(re.findall("</script", text)) == 1
    assert text.count(html.escape(EVIL)) >= 10


def test_the_policy_allows_only_this_style_and_this_script(tmp_path):
    text = page_of(tmp_path, made.comparison({"a": 0.0}))
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', text)[1]
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy
    for tag in ("style", "script"):
        inside = re.search(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_the_page_names_no_other_file(tmp_path):
    text = page_of(tmp_path, made.all_methods())
    assert not re.findall(r"""(?:src|href)="(?!#)|url\((?!#)|@import|https?://| style=""", text)


def test_every_id_of_the_page_is_unique_and_every_reference_has_one(tmp_path):
    text = page_of(tmp_path, made.comparison({"a": 0.0, "b": 0.1}))
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', text)) <= set(ids)


@pytest.mark.parametrize(
    "lines",
    [
        [made.header(finished=False)],
        [made.header(finished=False), made.method("a", status="unfinished", chosen=None)],
        [made.header(), made.method("a", status="failed", error="no", chosen=None)],
    ],
)
def test_without_any_run_there_is_a_page_and_no_figure(tmp_path, lines):
    assert [path.name for path in write_report(made.write(tmp_path, lines), tmp_path)] == ["report.html"]


def test_labels_that_matplotlib_reads_as_something_else_are_drawn(tmp_path):
    lines = made.comparison(
        {"a": 0.0, "b": 0.0}, titles={"a": "_$x^", "b": "a very long name of a method indeed, it is"}
    )
    assert len(write_report(made.write(tmp_path, lines), tmp_path)) == 1 + len(CHARTS)
