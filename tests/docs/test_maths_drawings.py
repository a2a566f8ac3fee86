"""The drawings of blocks and moves: what is committed is what the scripts draw, and it can be read by everybody."""

import importlib
import itertools
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "docs" / "images"
DRAWINGS = ("shards", "moves", "variants", "overview")
PAGES = dict.fromkeys(DRAWINGS, ("docs/maths.md", "images")) | {"overview": ("README.md", "docs/images")}
# Machado, Oliveira and Fernandes (2009), severity 1.0, on linear RGB.
SEEN_AS = {
    "by all cones": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


@pytest.fixture(scope="module")
def scripts():
    """The scripts, imported as `python docs/images/NAME.py` finds them."""
    sys.path.insert(0, str(IMAGES))
    try:
        yield {name: importlib.import_module(name) for name in DRAWINGS}
    finally:
        sys.path.remove(str(IMAGES))
        for name in DRAWINGS:
            sys.modules.pop(name, None)


@pytest.mark.parametrize("name", DRAWINGS)
def test_a_drawing_is_what_its_script_draws(scripts, name):
    assert (IMAGES / f"{name}.svg").read_text(encoding="utf-8") == scripts[name].svg()


@pytest.mark.parametrize("name", DRAWINGS)
def test_the_page_shows_each_drawing_with_a_description(name):
    page, folder = PAGES[name]
    shown = re.findall(rf"!\[([^]]*)\]\({folder}/{name}\.svg\)", (ROOT / page).read_text())
    assert len(shown) == 1
    assert len(shown[0].split()) > 20


def texts(name: str) -> list[tuple[str, float, float, float, float]]:
    """Each line of a drawing with the box that it fills in DejaVu Sans, the widest of its fonts."""
    found = []
    for element in ElementTree.parse(IMAGES / f"{name}.svg").iter("{http://www.w3.org/2000/svg}text"):
        words, kinds = "".join(element.itertext()).replace("\u200b", ""), element.get("class", "").split()
        size = 15 if "title" in kinds else 12 if "small" in kinds else 13
        font = FontProperties(family="DejaVu Sans", weight="bold" if "title" in kinds else "normal")
        width = TextPath((0, 0), words, size, prop=font).get_extents().width
        x, y = float(element.get("x", "nan")), float(element.get("y", "nan"))
        x -= width if "end" in kinds else width / 2 if "middle" in kinds else 0
        found.append((words, x, x + width, y - 0.75 * size, y + 1))
    return found


@pytest.mark.parametrize("name", DRAWINGS)
def test_a_drawing_can_be_read_on_a_narrow_phone(scripts, name):
    root = ElementTree.parse(IMAGES / f"{name}.svg").getroot()
    width = scripts["variants"].WIDTH
    assert root.get("viewBox", "").split()[2] == str(width)
    sizes = [int(size) for size in re.findall(r"font-size: (\d+)px", scripts["variants"].STYLE)]
    assert min(sizes) * 328 / width >= 10  # pixels of letters in a column of a page 360 pixels wide
    lines = texts(name)
    assert [line for line in lines if not (line[1] >= 8 and line[2] <= width - 8)] == []
    for (one, left, right, top, bottom), (other, *box) in itertools.combinations(lines, 2):
        apart = right <= box[0] or box[1] <= left or bottom <= box[2] or box[3] <= top
        assert apart, f"{name}.svg: {one!r} runs into {other!r}"


@pytest.mark.parametrize("name", DRAWINGS)
def test_a_drawing_has_a_ground_of_its_own_and_fetches_nothing(name):
    text = (IMAGES / f"{name}.svg").read_text()
    ground = re.search(r"<rect [^>]*/>", text)
    assert ground is not None
    assert 'x="0" y="0"' in ground[0]
    assert 'class="page"' in ground[0]
    assert "prefers-color-scheme: dark" in text
    assert set(re.findall(r"https?://[^\"']*", text)) == {"http://www.w3.org/2000/svg"}


def linear(colour: str) -> np.ndarray:
    values = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIE L*a*b* of linear sRGB, D65; for colours that are not nearly black."""
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = np.cbrt(to_xyz @ np.clip(rgb, 0, 1) / (0.9505, 1.0, 1.089))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("eye", SEEN_AS)
def test_the_colours_are_told_apart_by_every_eye(scripts, eye):
    def nearest(*colours: str) -> float:
        seen = [lab(np.array(SEEN_AS[eye]) @ linear(colour)) for colour in colours]
        return min(float(np.linalg.norm(a - b)) for a, b in itertools.combinations(seen, 2))

    assert nearest(*scripts["variants"].FILLS) > 25
    if eye in ("protanopia", "deuteranopia"):  # an orange and a green as light as each other fail
        assert nearest("#ffd28f", "#b5dd8b") < 25


def test_letters_stand_out_from_the_colours(scripts):
    def luminance(colour: str) -> float:
        return float(linear(colour) @ (0.2126, 0.7152, 0.0722))

    ink = luminance(scripts["variants"].INK) + 0.05
    assert min((luminance(fill) + 0.05) / ink for fill in scripts["variants"].FILLS) >= 4.5
