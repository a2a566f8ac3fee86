"""The page in a browser: it loads nothing, logs nothing, its controls work, and it fits a phone."""

import shutil

import comparison_rows as made
import pytest

from flashbone.compare.reading import read_results
from flashbone.compare.report.page import page as page_of
from flashbone.compare.report.ranking import rank

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")]
QUIET = "--no-first-run --disable-background-networking --disable-component-update --disable-sync --disable-quic"
LONG = "an extraordinarily_long_name_of_a_method_without_any_place_to_break_it"


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", *QUIET.split()]
        )
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Pages by name."""
    few = made.comparison({"a": 0.1, "b": -0.4, "c": -0.45}, titles={"a": "Alpha", "b": "Beta", "c": "Gamma"})
    failed = made.comparison({"a": 0.0, "b": 0.0}, titles={"a": "</script><img src=x onerror=alert(1)>"})
    failed[2].update(status="failed", error="</script>\"'<b>x</b> ü漢")
    failed = [line for line in failed if line["kind"] != "run" or line["method"] == "a"]
    long = made.comparison({"a": 0.0, "b": -0.3}, titles={"a": LONG, "b": "b"})
    long[0].update(name=LONG, model=LONG * 2)
    long[1].update(size=LONG, rerun=f"flashbone compare {LONG * 3}")
    unfinished = made.comparison({"a": 0.0, "b": 0.0, "c": 0.0}, finished=False)[:-4]
    unfinished[3].update(status="unfinished", chosen=None)
    none = [made.header(finished=False), made.method("a", status="unfinished", chosen=None)]
    cases = {
        "few": few,
        "failed": failed,
        "long": long,
        "unfinished": unfinished,
        "none": none,
        "all": made.all_methods(),
    }
    folder = tmp_path_factory.mktemp("reports")
    paths = {name: folder / f"{name}.html" for name in cases}
    for name, lines in cases.items():
        ranking = rank(read_results(made.write(folder, lines)), 1000)
        paths[name].write_text(page_of(ranking), encoding="utf-8", newline="\n")
    return paths


@pytest.fixture
def visit(browser, reports):
    """Open a report; at the end of the test, nothing may have been logged, thrown or loaded."""
    seen, contexts = [], []

    def open_page(name, width=1280, scheme="light", **options):
        contexts.append(browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme, **options))
        page = contexts[-1].new_page()
        page.set_default_timeout(5000)
        page.on("console", lambda message: seen.append(message.text))
        page.on("pageerror", lambda error: seen.append(str(error)))
        page.on("dialog", lambda dialog: seen.append(dialog.message))
        page.on("request", lambda request: request.url == reports[name].as_uri() or seen.append(request.url))
        page.goto(reports[name].as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert seen == []


def column(page, number):
    return page.locator(f"#methods tbody tr > :nth-child({number})").all_inner_texts()


@pytest.mark.parametrize("name", ["few", "failed", "long", "unfinished", "none", "all"])
@pytest.mark.parametrize("width", [360, 1280])
def test_every_report_opens_silently_and_without_scrolling_sideways(visit, name, width):
    page = visit(name, width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("#verdict .best").inner_text().endswith(".")
    assert page.locator("#methods tbody tr").count() == {"few": 3, "unfinished": 3, "none": 1, "all": 17}.get(name, 2)
    assert page.locator("#charts svg").count() == {"none": 0, "failed": 6}.get(name, 7)  # one method has no speed


def test_a_failed_method_shows_its_error_as_text(visit):
    page = visit("failed")
    assert "\"'<b>x</b> ü漢" in page.locator("tr.failed td").inner_text()
    assert page.locator("img").count() == 0
    assert "onerror" in page.locator("fieldset").inner_text()


def test_a_head_sorts_up_and_then_down_and_says_so(visit):
    page = visit("all")
    head = page.get_by_role("button", name="peak MiB")
    assert page.locator("#methods thead th").nth(11).inner_text().strip() == "peak MiB"
    for way, reverse in (("ascending", False), ("descending", True)):
        head.click()
        assert page.locator("th[aria-sort]").get_attribute("aria-sort") == way
        values = [float(text.replace(",", "")) for text in column(page, 12)]
        assert len(values) == 16
        assert values == sorted(values, reverse=reverse)
        assert "virtual tokens" in page.locator("#methods tbody tr").last.inner_text()
    page.get_by_role("button", name="method", exact=True).click()
    names = [text.split("\n")[0].split(" ")[0].lower() for text in column(page, 1)]
    assert names[1] == "bat-col"
    assert page.locator("th[aria-sort]").count() == 1


def test_the_first_column_stays_in_sight_on_a_phone(visit):
    page = visit("all", 360)
    first = page.locator("#methods tbody th").first
    before = first.bounding_box()["x"]
    page.evaluate("document.querySelector('.scroll').scrollLeft = 300")
    assert page.evaluate("document.querySelector('.scroll').scrollLeft") == 300
    assert first.bounding_box()["x"] == pytest.approx(before, abs=1)


@pytest.mark.parametrize(("scheme", "ground"), [("light", "rgb(252, 252, 250)"), ("dark", "rgb(22, 24, 28)")])
def test_the_theme_follows_the_system(visit, scheme, ground):
    page = visit("few", scheme=scheme)
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == ground
    line = page.locator(".learning_curves .method-0 path[stroke]").last
    colours = {"light": "rgb(4, 104, 179)", "dark": "rgb(55, 146, 219)"}
    assert line.evaluate("e => getComputedStyle(e).stroke") == colours[scheme]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast_enough(visit, scheme):
    page = visit("all", scheme=scheme)
    script = """() => {
      const light = (css) => { const c = css.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255)
        .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * c[0] + 0.7152 * c[1] + 0.0722 * c[2]; };
      const ground = light(getComputedStyle(document.body).backgroundColor);
      const all = [...document.querySelectorAll('p, li, td, th, dt, dd, button, h1, h2, .tag, svg text')];
      return Math.min(...all.map((e) => { const s = getComputedStyle(e);
        const [a, b] = [ground, light(e.namespaceURI.includes('svg') ? s.fill : s.color)].sort((x, y) => x - y);
        return (b + 0.05) / (a + 0.05); }));
    }"""
    assert page.evaluate(script) >= 4.5


def test_each_method_is_switched_off_and_on_in_all_charts(visit):
    page = visit("few")
    box, drawn = page.get_by_role("checkbox", name="Beta"), page.locator(".method-1")
    assert drawn.count() == 7
    for is_shown in (False, True):
        box.click()
        assert [drawn.nth(i).is_visible() for i in range(7)] == [is_shown] * 7
        assert page.locator(".method-0").first.is_visible()


def test_a_method_that_is_pointed_at_in_the_legend_is_stressed(visit):
    page = visit("few")
    page.locator("label", has_text="Beta").hover()
    opacities = [page.locator(f".method-{i}").first.evaluate("e => getComputedStyle(e).opacity") for i in range(3)]
    assert opacities == ["0.2", "1", "0.2"]


def test_pointing_tapping_and_the_tab_key_read_values(visit):
    page, phone = visit("few"), visit("few", 360, has_touch=True)
    assert page.locator("#values").is_hidden()
    page.locator(".memory_quality .method-0").hover()
    assert page.locator("#values").inner_text().startswith("Alpha: 1,200 MiB, accuracy ")
    page.locator(".memory_quality .method-0").focus()
    page.keyboard.press("Tab")
    assert page.locator("#values").inner_text().startswith("Beta: ")
    assert page.locator("#values").get_attribute("role") == "status"
    phone.locator(".memory_quality .method-0").tap()
    assert phone.locator("#values").is_visible()
    assert phone.evaluate("document.documentElement.scrollWidth") <= 360


def test_the_last_value_of_a_curve_is_the_one_in_the_table(visit):
    page = visit("few")
    text = page.locator(".learning_curves .method-0 title").first.text_content()
    last = page.locator("#methods tbody tr").first.locator("td").nth(1).inner_text()
    assert text.startswith("Alpha: held-out loss ")
    assert text.endswith(f", {last} at step 32")


def test_everything_is_reached_by_the_keyboard_with_focus_in_sight(visit):
    page = visit("few")
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        name, outline = page.evaluate(
            "[(e => e.id || e.classList[0] || e.textContent)(document.activeElement),"
            "getComputedStyle(document.activeElement).outlineStyle]"
        )
        if page.evaluate("document.activeElement !== document.body"):
            reached.add(name)
            assert outline == "solid", name
    assert {"scroll", "shown-0", "shown-2", "method", "copy", "peak MiB"} <= reached
    page.get_by_role("checkbox", name="Beta").focus()
    page.keyboard.press("Space")
    assert not page.locator(".method-1").first.is_visible()
    page.get_by_role("button", name="step ms").focus()
    page.keyboard.press("Enter")
    assert page.locator("th[aria-sort=ascending]").inner_text().startswith("step ms")


@pytest.mark.parametrize("granted", [["clipboard-read", "clipboard-write"], []], ids=["granted", "not granted"])
def test_a_command_is_copied(visit, granted):
    page = visit("few", permissions=granted)
    button = page.locator("#commands .copy").first
    button.click()
    page.wait_for_function("document.querySelector('.copy').textContent !== 'Copy'")
    command = page.locator("#commands code").first.inner_text()
    assert "--variant a " in command
    if granted:
        assert button.inner_text() == "Copied"
        assert page.evaluate("navigator.clipboard.readText()") == command


def test_only_values_copying_and_sorting_need_a_script(visit):
    page = visit("few", java_script_enabled=False)
    assert page.locator("#verdict .best").is_visible()
    assert page.locator("#methods tbody tr").count() == 3
    assert page.locator("#charts svg").first.is_visible()
    assert not page.locator(".copy").first.is_visible()
    page.get_by_role("checkbox", name="Beta").click()
    assert not page.locator(".method-1").first.is_visible()


def test_print_is_light_without_controls(visit):
    page = visit("all", scheme="dark")
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not page.locator(".copy").first.is_visible()
    assert page.locator("#charts svg").first.is_visible()
