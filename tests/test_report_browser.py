"""report.html in a real browser, on a phone and a desktop, light and dark.

Nothing overflows, is cut off or empty, every text can be read, nothing is asked of any host, no hostile text acts.

Needs Chromium (LORA_TUNE_CHROMIUM, or `chromium` on the path); skipped without, failed where it is required.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import report_kit

from lora_tune.evaluation.report_page import write_report

FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
NAMES = ("chromium", "chromium-browser", "google-chrome")
SIZES = {"phone": (390, 844), "desktop": (1440, 900)}
SEEN = [("ordinary", size, scheme) for size in SIZES for scheme in ("light", "dark")]
SEEN += [("many", "phone", "light"), ("many", "desktop", "dark")]
SEEN += [("hostile", "phone", "dark"), ("hostile", "desktop", "light")]
LAYOUT, CONTRAST = (
    (Path(__file__).parent / "browser" / name).read_text(encoding="utf-8") for name in ("layout.js", "contrast.js")
)


def chromium() -> str:
    """The browser; skipped without it, failed where LORA_TUNE_BROWSER_REQUIRED is 1."""
    named = os.environ.get("LORA_TUNE_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if named:
        return named
    if os.environ.get("LORA_TUNE_BROWSER_REQUIRED") == "1":
        pytest.fail("no Chromium: install one, or name it in LORA_TUNE_CHROMIUM")
    pytest.skip("no Chromium here; name one in LORA_TUNE_CHROMIUM")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium."""
    executable = chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=executable, args=FLAGS.split())
        yield started
        started.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The kit's reports as files."""
    folder = tmp_path_factory.mktemp("reports")
    kinds = ("ordinary", "many", "hostile")
    for kind in kinds:
        (folder / kind).mkdir()
    return {kind: write_report(folder / kind, getattr(report_kit, kind)()) for kind in kinds}


@pytest.mark.parametrize("kind, size, scheme", SEEN)
def test_the_page_as_people_see_it(kind: str, size: str, scheme: str, browser: Any, pages: dict[str, Path]) -> None:
    width, height = SIZES[size]
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    page = context.new_page()
    page.set_default_timeout(60_000)
    asked: list[str] = []
    said: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: said.append(dialog.message))
    url = pages[kind].as_uri()
    page.goto(url)
    assert page.evaluate(LAYOUT) == []
    page.evaluate("document.querySelectorAll('details').forEach(e => e.open = true)")
    assert page.evaluate(LAYOUT) == []
    assert page.evaluate(CONTRAST) == []
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(19, 21, 25)"
    assert dark == (scheme == "dark")
    assert (asked, said) == ([url], [])
    assert page.evaluate("[window.hacked, document.title.startsWith('hacked')]") == [None, False]
    context.close()


def test_a_section_is_reached_from_the_top(browser: Any, pages: dict[str, Path]) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.goto(pages["ordinary"].as_uri())
    for link in page.locator("nav a").all():
        link.click()
        target = page.locator(str(link.get_attribute("href")))
        assert abs(target.bounding_box()["y"]) < 844 and target.locator("h2").inner_text()
    assert page.locator("nav a").count() >= 7
    page.close()


FAULTS = {
    "layout": {
        "a wide text": "document.querySelector('section p').style.width = '3000px'",
        "a box cut off": "Object.assign(document.querySelector('dl').style, {height: '9px', overflow: 'hidden'})",
        "an empty cell": "document.querySelector('td').textContent = ''",
        "an empty picture": "document.querySelectorAll('svg g').forEach(e => e.remove())",
        "a label that leaves its picture": "document.querySelector('svg g[id*=text_] use').setAttribute('x', '9999')",
    },
    "contrast": {
        "a pale text": "document.documentElement.style.setProperty('--soft', '#9a9a9a')",
        "a pale dot": "document.documentElement.style.setProperty('--better', '#c0f0c0')",
    },
}


def test_the_audit_finds_what_is_wrong(browser: Any, pages: dict[str, Path]) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme="light")
    for audit, faults in FAULTS.items():
        for what, script in faults.items():
            page.goto(pages["ordinary"].as_uri())
            page.evaluate(script)
            assert page.evaluate(LAYOUT if audit == "layout" else CONTRAST), what
    page.close()
