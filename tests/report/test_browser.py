"""The pages in a real browser: nothing missing, nothing requested, nothing too wide."""

import shutil

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright (extra test)")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
pytestmark = pytest.mark.slow  # starts a browser
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
    page.screenshot(path=tmp_path / "page.png", full_page=True)
    assert messages == []
    assert [url for url in requested if not url.startswith("data:")] == [report.as_uri()]
    boxes = page.evaluate(
        "[...document.querySelectorAll('svg')].map(e => e.getBoundingClientRect())"
        ".map(box => [box.width, box.height, box.right])"
    )
    assert boxes
    assert all(w > 200 and h > 100 and right <= width for w, h, right in boxes)
    widths = page.evaluate("[...document.images].map(image => image.naturalWidth)")
    assert all(natural > 0 for natural in widths)
    assert len(widths) > 0 or report.stem == "compare"
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.close()


def test_labels_lie_within_their_figures(browser, report):
    page = browser.new_page(viewport={"width": 360, "height": 900})
    page.set_default_timeout(0)  # the machine may be busy
    page.goto(report.as_uri())
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
    page.close()


def test_a_page_can_be_printed(browser, report):
    page = browser.new_page()
    page.set_default_timeout(0)  # the machine may be busy
    page.goto(report.as_uri())
    printed = page.pdf(format="A4")
    assert printed.startswith(b"%PDF")
    assert printed.count(b"/Type /Page\n") >= 2
    page.close()
