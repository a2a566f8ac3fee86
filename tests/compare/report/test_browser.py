"""The page in a browser: it loads nothing, logs nothing, every control does what it says, and it fits a phone."""

import shutil

import comparison_rows as made
import pytest

from flashbone.compare.report.page import page as page_of
from flashbone.compare.report.results import read_results
from flashbone.compare.report.statistics import rank

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
    """Reports that only their pages are opened of, by name."""
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


def curves(page):
    return page.locator("#curves .curve").count()


def texts(page, figure):
    return page.locator(f"#{figure} svg text").all_text_contents()


@pytest.mark.parametrize("name", ["few", "failed", "long", "unfinished", "none", "all"])
@pytest.mark.parametrize("width", [360, 1280])
def test_every_report_opens_without_a_word_and_without_scrolling_sideways(visit, name, width):
    page = visit(name, width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("#verdict .best").inner_text().endswith(".")
    assert page.locator("#methods tbody tr").count() == {"few": 3, "unfinished": 3, "none": 1, "all": 17}.get(name, 2)
    assert page.locator("#charts").is_visible() == (name != "none")


def test_a_failed_method_shows_its_error_as_text(visit):
    page = visit("failed")
    assert "\"'<b>x</b> ü漢" in page.locator("tr.failed td").inner_text()
    assert page.locator("img").count() == 0
    assert "onerror" in page.locator("#legend").inner_text()


def test_a_head_sorts_up_and_then_down_and_says_so(visit):
    page = visit("all")
    head = page.get_by_role("button", name="peak MiB")
    assert page.locator("#methods thead th").nth(8).inner_text().strip() == "peak MiB"
    for way, reverse in (("ascending", False), ("descending", True)):
        head.click()
        assert page.locator("th[aria-sort]").get_attribute("aria-sort") == way
        values = [float(text.replace(",", "")) for text in column(page, 9)]
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


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_theme_follows_the_system_and_its_button(visit, scheme):
    page, other = visit("few", scheme=scheme), {"light": "dark", "dark": "light"}[scheme]
    grounds = {"light": "rgb(252, 252, 250)", "dark": "rgb(22, 24, 28)"}
    button = page.locator("#theme")
    for want in (scheme, other, scheme):
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == grounds[want]
        assert button.get_attribute("aria-pressed") == str(want == "dark").lower()
        button.click()


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
    button = page.locator("#legend button[data-key=b]")
    assert (curves(page), page.locator(".point").count(), page.locator(".rate").count()) == (3, 3, 3)
    button.click()
    assert button.get_attribute("aria-pressed") == "false"
    assert page.locator("[data-key=b]:is(.curve, .point, .rate)").count() == 0
    assert curves(page) == 2
    button.click()
    assert button.get_attribute("aria-pressed") == "true"
    assert curves(page) == 3


def test_all_best_and_none_switch_methods_together(visit):
    page = visit("few")
    for preset, count in (("none", 0), ("all", 3), ("best", 1)):
        page.locator(f"[data-preset={preset}]").click()
        assert curves(page) == count
        assert page.locator("#legend [aria-pressed=true]").count() == count
    page.locator("[data-preset=none]").click()
    assert "switched on" in page.locator("#curves").inner_text()


def test_loss_axis_and_scale_are_chosen(visit):
    page = visit("few")

    def choose(choice):
        button = page.locator(f"[data-choice='{choice}']")
        button.click()
        assert button.get_attribute("aria-pressed") == "true"
        assert page.locator(f"[data-choice^='{choice.split(':')[0]}:'][aria-pressed=true]").count() == 1

    line = page.locator("#curves .curve .line").first
    before = line.get_attribute("d")
    assert "held-out loss (cross-entropy)" in texts(page, "curves")
    choose("log:true")
    assert line.get_attribute("d") != before
    choose("log:false")
    assert line.get_attribute("d") == before
    choose("x:seconds")
    assert "seconds of training, with start-up" in texts(page, "curves")
    choose("kind:train")
    assert "training loss (cross-entropy)" in texts(page, "curves")
    assert line.get_attribute("d").count("L") == 31


def test_bands_show_for_few_methods_and_for_the_one_pointed_at(visit):
    page = visit("all")
    shown = page.locator("#curves .band:not([visibility=hidden])")
    assert shown.count() == 0
    page.locator("#curves svg").scroll_into_view_if_needed()
    box = page.locator("#curves svg").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert shown.count() == 1
    assert page.locator("#curves .curve.faded").count() == 15
    page.mouse.move(5, 5)
    assert page.locator("#curves .faded").count() == 0
    page.locator("[data-preset=none]").click()
    page.locator("#legend [data-key=lora]").click()
    assert shown.count() == 1


def test_pointing_reads_the_means_at_the_nearest_step(visit):
    page = visit("few")
    readout = page.locator("#curves .readout")
    assert readout.is_hidden()
    page.locator("#curves svg").scroll_into_view_if_needed()
    box = page.locator("#curves svg").bounding_box()
    page.mouse.move(box["x"] + box["width"] - 16, box["y"] + 100)
    assert readout.is_visible()
    assert readout.inner_text().startswith("step 32")
    held = {row.split("\t")[0]: row.split("\t")[1] for row in readout.inner_text().split("\n") if "\t" in row}
    assert held["Alpha"] == page.locator("#methods tbody tr").first.locator("td").nth(1).inner_text()
    page.mouse.move(5, 5)
    assert readout.is_hidden()


def test_touching_reads_values_on_a_phone(visit):
    page = visit("few", 360, has_touch=True)
    page.locator("#curves svg").tap()
    assert page.locator("#curves .readout").is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_arrow_keys_read_values(visit):
    page = visit("few")
    page.locator("#curves svg").focus()
    readout = page.locator("#curves .readout")
    for key, step in (("ArrowRight", 0), ("ArrowRight", 8), ("End", 32), ("ArrowLeft", 24), ("Home", 0)):
        page.keyboard.press(key)
        assert readout.inner_text().startswith(f"step {step}\n")
    page.keyboard.press("Escape")
    assert readout.is_hidden()


def test_everything_is_reached_and_worked_by_the_keyboard_with_focus_in_sight(visit):
    page = visit("few")
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        where, outline = page.evaluate(
            "[(e => e.id || e.dataset.key || e.dataset.choice || e.dataset.preset || e.className || e.textContent)"
            "(document.activeElement), getComputedStyle(document.activeElement).outlineStyle]"
        )
        if where and page.evaluate("document.activeElement !== document.body"):
            reached.add(where if isinstance(where, str) else "svg")
            assert outline == "solid", where
    assert {"theme", "scroll", "a", "b", "kind:train", "x:seconds", "log:true", "none", "copy", "peak MiB"} <= reached
    page.locator("#legend [data-key=b]").focus()
    page.keyboard.press("Space")
    assert curves(page) == 2
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


def test_a_point_tells_its_figures(visit):
    page = visit("few")
    title = page.locator("#memory .point[data-key=a] title").text_content()
    assert title.startswith("Alpha: 1,200 MiB, accuracy ")
    assert page.locator("#rates .ring").count() == 3


def test_verdict_and_table_need_no_script(visit):
    page = visit("few", java_script_enabled=False)
    assert page.locator("#verdict .best").is_visible()
    assert page.locator("#methods tbody tr").count() == 3
    assert "need JavaScript" in page.locator(".noscript").inner_text()
    assert not page.locator(".copy").first.is_visible()
    assert not page.locator("#charts").is_visible()


def test_print_is_light_without_controls(visit):
    page = visit("all", scheme="dark")
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not page.locator("#theme").is_visible()
    assert not page.locator("#controls").is_visible()
    assert page.locator("#curves svg").is_visible()
