"""The pages in a real browser: nothing missing, nothing requested, nothing too wide."""

import re
import shutil

import pytest

from fusenorm_openood.report.page import Card, Report, Rows, Section, render

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright (extra test)")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
pytestmark = pytest.mark.slow  # starts a browser
PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAA"
    "AABJRU5ErkJggg=="
)
PAGES = ("eval_page", "compare_page", "score_page")


@pytest.fixture(scope="module")
def browser():
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"needs a browser: install one of {', '.join(BROWSERS)}")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(params=PAGES)
def report(request):
    return request.getfixturevalue(request.param)


UNFOLD = "document.querySelectorAll('details').forEach(details => details.open = true)"
HOSTILE = "</script><img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def browsed(browser, tmp_path_factory):
    """A page with a list of 1,000 images, the time of its script, and what went wrong."""
    rows = []
    for n in range(1_000):
        verdict, conf = ("rejected" if n < 100 else "accepted"), f"{(n * 7919) % 1000 - 500}.5"
        name = HOSTILE if n == 7 else f"{n}.png"
        picture = ((PIXEL, ""),) if n < 500 else ()
        expert = ("mds", "layer4", HOSTILE)[n % 3]
        cells = (verdict, f"class {n % 12}", conf, expert)
        facts = tuple(zip(("verdict", "predicted", "confidence", "expert"), cells, strict=True))
        rows.append(Card(name, picture, facts, link=f"file:///images/{n}.png"))
    choose = frozenset(("verdict", "predicted", "expert"))
    section = Section("Images", listed=Rows("All images", choose, tuple(rows)))
    path = tmp_path_factory.mktemp("browsed") / "page.html"
    path.write_text(render(Report("Many", (), (), (section,))), encoding="utf-8")
    page, wrong = browser.new_page(), []
    for event in ("console", "pageerror", "dialog"):
        page.on(event, lambda what: wrong.append(str(what)))
    page.on("request", lambda request: wrong.append(request.url))
    measure = page.context.new_cdp_session(page)
    measure.send("Performance.enable")
    page.goto(path.as_uri())
    timed = {m["name"]: m["value"] for m in measure.send("Performance.getMetrics")["metrics"]}
    yield page, timed["ScriptDuration"]
    assert [w for w in wrong if not w.startswith(("data:", path.as_uri()))] == []
    page.close()


def shown(page, column=1):
    """The texts of a column of the visible rows."""
    rows = "document.querySelectorAll('.list tbody tr:not([hidden])')"
    return page.evaluate(f"[...{rows}].map(row => row.cells[{column}].textContent.trim())")


def test_a_thousand_images_open_quickly(browsed):
    page, seconds = browsed
    assert seconds < 2
    assert len(shown(page)) == 1_000


@pytest.mark.parametrize("by", ["mouse", "keyboard"])
def test_a_list_can_be_sorted_filtered_and_searched(browsed, by):
    page, _ = browsed

    def press(button):
        button.click() if by == "mouse" else button.press("Enter")

    button = page.get_by_role("button", name="confidence")
    for is_up in (True, False):
        press(button)
        numbers = [*map(float, shown(page, 4))]
        assert numbers == sorted(numbers, reverse=not is_up)
    press(page.get_by_role("button", name="file"))
    assert shown(page)[:3] == [HOSTILE, "0.png", "1.png"]
    page.get_by_label("verdict").select_option("rejected")
    assert set(shown(page, 2)) == {"rejected"}
    page.get_by_label("expert").select_option("mds")
    page.get_by_label("predicted").select_option("class 3")
    expected = [f"{n}.png" for n in range(100) if n % 12 == 3 and n % 3 == 0]
    assert shown(page) == expected
    assert page.locator("output").inner_text() == f"{len(expected)} of 1000 images"
    for name in ("verdict", "expert", "predicted"):
        page.get_by_label(name).select_option("all")
    page.get_by_label("search").fill("IMAGES/31")
    assert shown(page) == [f"{n}.png" for n in (31, *range(310, 320))]
    page.get_by_label("search").fill("onerror=")
    assert HOSTILE in shown(page)
    page.get_by_label("search").fill("")


def test_an_image_is_enlarged_and_the_next_one_by_key(browsed):
    page, _ = browsed
    page.reload()
    dialog, rows = page.locator("dialog"), page.locator(".list tbody tr")
    rows.nth(6).locator("td").first.click()
    assert dialog.is_visible()
    assert dialog.locator("img").get_attribute("src") == PIXEL
    assert dialog.locator("img").bounding_box()["width"] > 200
    page.keyboard.press("ArrowRight")
    link = dialog.get_by_role("link")
    assert (link.inner_text(), link.get_attribute("href")) == (HOSTILE, "file:///images/7.png")
    page.get_by_role("button", name="previous").click()
    assert link.inner_text() == "6.png"
    page.keyboard.press("Escape")
    assert not dialog.is_visible()
    page.keyboard.press("End")  # the row that was open has the focus
    page.keyboard.press("Enter")
    assert link.inner_text() == "999.png"
    assert dialog.locator("img").count() == 0
    page.keyboard.press("Escape")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Enter")
    assert link.inner_text() == "998.png"
    page.get_by_role("button", name="close").click()


def test_an_evaluation_lists_the_worst_mistakes_of_each_data_set_first(browser, eval_page):
    page = browser.new_page()
    page.goto(eval_page.as_uri())
    assert set(shown(page, 3)) > {"digits", "digit8", "noise"}
    page.get_by_label("data set").select_option("digit9")
    numbers = [*map(float, shown(page, 6))]
    assert numbers == sorted(numbers, reverse=True)
    assert len(numbers) == 40
    page.locator(".list tbody tr:not([hidden])").first.click()
    assert page.locator("dialog img").is_visible()
    assert page.locator("dialog dd").nth(2).inner_text() == "near-OOD, digit9"
    page.close()


def test_without_script_a_list_is_a_folded_table(browser, score_page):
    page = browser.new_context(java_script_enabled=False).new_page()
    page.goto(score_page.as_uri())
    assert page.locator(".controls").count() == 0
    assert not page.locator(".list table").is_visible()
    page.locator(".list summary").click()
    assert page.locator(".list table").is_visible()
    page.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_light_and_dark(browser, score_page, scheme):
    page = browser.new_context(color_scheme=scheme).new_page()
    page.goto(score_page.as_uri())
    pairs = page.evaluate(
        """[...document.querySelectorAll('p, td, dt, dd, figcaption, a, svg text')].map(e => {
            let paper = e;
            while (getComputedStyle(paper).backgroundColor === 'rgba(0, 0, 0, 0)')
                paper = paper.parentElement;
            const style = getComputedStyle(e);
            return [e.tagName === 'text' ? style.fill : style.color,
                getComputedStyle(paper).backgroundColor];
        })"""
    )
    assert pairs
    assert min(contrast(*pair) for pair in pairs) >= 4.5
    page.context.close()


def contrast(*colours):
    """The contrast of two colours as WCAG 2 defines it."""
    bright = []
    for colour in colours:
        c = [int(value) / 255 for value in re.findall(r"\d+", colour)[:3]]
        r, g, b = (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in c)
        bright.append(0.2126 * r + 0.7152 * g + 0.0722 * b)
    return (max(bright) + 0.05) / (min(bright) + 0.05)


@pytest.mark.parametrize("width", [360, 1280])
def test_a_page_is_whole_silent_and_not_too_wide(browser, report, width, tmp_path):
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.set_default_timeout(0)  # the machine may be busy
    messages, requested = [], []
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("dialog", lambda dialog: messages.append(dialog.message))
    page.on("request", lambda request: requested.append(request.url))
    page.goto(report.as_uri())
    page.evaluate(UNFOLD)
    page.screenshot(path=tmp_path / "page.png", full_page=True)
    assert messages == []
    assert [url for url in requested if not url.startswith("data:")] == [report.as_uri()]
    boxes = page.evaluate(
        "[...document.querySelectorAll('figure:not(.key) svg')].map(e => e.getBoundingClientRect())"
        ".map(box => [box.width, box.height, box.right])"
    )
    assert boxes
    assert all(w > 140 and h > 90 and right <= width for w, h, right in boxes)
    widths = page.evaluate("[...document.images].map(image => image.naturalWidth)")
    assert all(natural > 0 for natural in widths)
    assert len(widths) > 0
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.close()


def test_labels_lie_within_their_figures_and_a_page_can_be_printed(browser, report):
    page = browser.new_page(viewport={"width": 360, "height": 900})
    page.set_default_timeout(0)  # the machine may be busy
    page.goto(report.as_uri())
    page.evaluate(UNFOLD)
    outside = page.evaluate(
        """[...document.querySelectorAll('svg')].flatMap(svg => {
            const box = svg.getBoundingClientRect();
            return [...svg.querySelectorAll('text')].filter(text => {
                const t = text.getBoundingClientRect();
                return t.left < box.left - 2 || t.right > box.right + 2
                    || t.top < box.top - 2 || t.bottom > box.bottom + 2;
            }).map(text => text.textContent);
        })"""
    )
    assert outside == []
    printed = page.pdf(format="A4")
    assert printed.startswith(b"%PDF")
    assert printed.count(b"/Type /Page\n") >= 2
    page.close()
