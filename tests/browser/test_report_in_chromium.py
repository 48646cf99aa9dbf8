"""The report in a real browser: opens without a network, shows everything, fits screen and paper, is accessible."""

import shutil

import pytest
from report_example import rendered

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
SHOWN = ("release", "reject", "inconclusive", "everything", "alone")
A4_WIDTH = 794  # CSS pixels of 210 mm
PRINTED_WIDTH = 688  # of these without the page's margins

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as running:
        started = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def opened(browser, tmp_path):
    """opened(name, ...) -> page of a context without a network; settings are those of a new context."""
    contexts = []

    def open_report(name: str, **settings):
        path = tmp_path / "report.html"
        path.write_text(rendered(name), encoding="utf-8")
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, "offline": True, **settings})
        contexts.append(context)
        page = context.new_page()
        page.requests, page.complaints = [], []
        page.on("request", lambda request: page.requests.append(request.url))
        page.on("console", lambda message: page.complaints.append(message.text))
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        page.goto(path.as_uri())
        return page

    yield open_report
    for context in contexts:
        context.close()


def beyond(page, width: int) -> list[str]:
    """Elements that stick out to the right, by their beginning."""
    return page.evaluate(
        """width => [...document.querySelectorAll('main *:not(.skip)')]
            .filter(e => e.getBoundingClientRect().right > width + 1 && !e.closest('svg'))
            .map(e => e.outerHTML.slice(0, 90))""",
        width,
    )


@pytest.mark.parametrize("name", SHOWN)
def test_report_opens_offline_without_errors_and_fits(opened, name):
    page = opened(name)
    assert [url for url in page.requests if not url.startswith(("file:", "data:"))] == []
    assert page.complaints == []
    headings = page.locator("h2").all_inner_texts()
    assert headings[1] == "In plain words"
    assert len(headings) == 2 + 14
    assert page.locator("h1").count() == 1
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280
    assert beyond(page, 1280) == []
    assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
    verdict = page.locator("#verdict").bounding_box()
    assert verdict["y"] + verdict["height"] < 900, "the verdict is on the first screen"
    page.set_viewport_size({"width": 390, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


@pytest.mark.parametrize("name", SHOWN)
def test_nothing_is_cut_off_on_paper(opened, name):
    page = opened(name, viewport={"width": PRINTED_WIDTH, "height": 1123})
    page.emulate_media(media="print")
    assert beyond(page, PRINTED_WIDTH) == []


def test_every_table_fits_the_screen_without_scrolling(opened):
    page = opened("everything")
    wide = page.evaluate(
        "[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth)"
        ".map(e => e.getAttribute('aria-label'))"
    )
    assert wide == []


@pytest.mark.parametrize(
    ("name", "scheme"), [*((name, "light") for name in SHOWN), *((name, "dark") for name in SHOWN[:3])]
)
def test_axe_finds_nothing_to_complain_about(opened, name, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    page = opened(name, bypass_csp=True, color_scheme=scheme)
    found = axe.Axe().run(page)
    assert [(v["id"], [n["html"][:120] for n in v["nodes"][:3]]) for v in found.response["violations"]] == []


def test_every_link_goes_where_it_says(opened):
    page = opened("everything")
    broken = page.evaluate(
        "[...document.querySelectorAll('a')].map(a => a.getAttribute('href'))"
        ".filter(h => !h.startsWith('#') || !document.getElementById(h.slice(1)))"
    )
    assert broken == []


def test_report_prints_on_a_few_pages_of_a4_with_room_to_sign(opened):
    page = opened("release")
    pdf = page.pdf(format="A4", prefer_css_page_size=True)
    assert 8 <= pdf.count(b"/Type /Page\n") <= 18
    page.set_viewport_size({"width": A4_WIDTH, "height": 1123})
    page.emulate_media(media="print")
    assert page.locator(".blanks .line").count() >= 10
    assert page.locator(".blanks .line").first.bounding_box()["width"] > 500
