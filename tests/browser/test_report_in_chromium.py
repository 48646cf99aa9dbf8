"""The report in a real browser: opens without a network, shows everything, fits the screen."""

import shutil

import pytest
from report_example import VARIANTS, example_facts

from server.audit.report import render_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

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


@pytest.mark.parametrize("name", VARIANTS)
def test_report_opens_offline_without_errors_and_fits(browser, tmp_path, name):
    path = tmp_path / "report.html"
    path.write_text(render_report(example_facts(**VARIANTS[name])), encoding="utf-8")
    context = browser.new_context(viewport={"width": 1280, "height": 900}, offline=True)
    page = context.new_page()
    requests, complaints = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(path.as_uri())

    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
    assert complaints == []
    headings = page.locator("h2").all_inner_texts()
    assert {"In plain words", "Epsilon of every hospital", "Course of training", "Privacy statement"} <= set(headings)
    assert page.locator("h1").count() == 1
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280
    assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
    verdict = page.locator("#verdict").bounding_box()
    assert verdict["y"] + verdict["height"] < 900, "the verdict is on the first screen"
    page.set_viewport_size({"width": 390, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    context.close()


def test_report_prints_on_a_few_pages_of_a4(browser, tmp_path):
    path = tmp_path / "report.html"
    path.write_text(render_report(example_facts()), encoding="utf-8")
    page = browser.new_page()
    page.goto(path.as_uri())
    pdf = page.pdf(format="A4", prefer_css_page_size=True)
    page.close()
    assert 3 <= pdf.count(b"/Type /Page\n") <= 9
