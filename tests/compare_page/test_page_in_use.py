"""The compare page when something is in the way: stops, errors, tokens; by keyboard, by ear, in other colours."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from page_kit import BASE, Opener
from page_server import EXAMPLE, Servers
from playwright.sync_api import expect
from serving_kit import base_section

from lora_tune.serving.engine import Limits
from lora_tune.serving.local import LocalBackend
from lora_tune.serving.settings import ServeSettings

TOKEN = "a-token-of-some-length"


def test_stop_ends_the_answers_and_frees_the_engine(url: str, backend: LocalBackend, opened: Opener) -> None:
    one = opened(url)

    def cancelled() -> int:
        found = backend.statistics().models.get(BASE)
        return 0 if found is None else found.cancelled

    before = cancelled()
    one.page.locator("#max_tokens").evaluate("e => { e.value = 900 }")
    one.page.locator("#prompt").fill("What is the capital of France?")
    one.page.locator("#send").click()
    one.page.locator(".c1[data-state=running]").wait_for()
    one.page.keyboard.press("Escape")
    one.idle()
    assert "stopped" in one.cards().nth(0).locator(".facts").inner_text()
    assert one.texts()[0], "what has come stays"
    expect(one.page.locator("#prompt")).to_be_focused()
    for _ in range(100):
        if cancelled() > before:
            break
        one.page.wait_for_timeout(50)
    assert cancelled() == before + 1
    one.cards().nth(0).get_by_role("button", name="Try again").click(trial=True)


def test_a_busy_server_says_so_and_answers_later(servers: Servers, opened: Opener, votes: Path) -> None:
    small = LocalBackend.start(base_section(BASE), adapters={"example": EXAMPLE}, limits=Limits(rows=1, queue=1))
    one = opened(servers.start(small, ServeSettings()).url)
    assert "preference" not in one.page.locator("#empty").inner_text(), "this server keeps no votes"
    one.page.locator("#add-column").click()
    for column in (1, 2, 3):
        one.page.locator(f"#column-{column}").select_option(BASE)
    one.send("What is the capital of France?", tokens=40)
    failed = one.page.locator("[data-state=failed]")
    assert failed.count() == 1 and "busy" in failed.inner_text() and "try again in" in failed.inner_text()
    assert one.page.locator(".votes").count() == 0, "this server keeps no votes"
    failed.get_by_role("button", name="Try again").click()
    one.page.locator("[data-state=done]").nth(2).wait_for()


def test_a_connection_that_breaks_and_a_server_that_is_gone(
    servers: Servers, backend: LocalBackend, opened: Opener
) -> None:
    served = servers.start(backend, ServeSettings())
    one = opened(served.url)
    one.page.locator("#max_tokens").evaluate("e => { e.value = 900 }")
    one.page.locator("#prompt").fill("What is the capital of France?")
    one.page.locator("#send").click()
    one.page.locator(".c1[data-state=running]").wait_for()
    served.cut()
    one.idle()
    assert "broke off" in one.cards().nth(0).inner_text() and one.texts()[0]
    served.stop()
    one.send("Are you there?")
    assert ["cannot be reached" in card.inner_text() for card in one.cards().all()] == [True, True]
    heard = one.page.evaluate("[...document.getElementById('status').children].map(e => e.textContent)")
    assert ["cannot be reached" in text for text in heard[-2:]] == [True, True]


def test_a_server_with_a_token_shows_an_empty_shell(servers: Servers, backend: LocalBackend, opened: Opener) -> None:
    url = servers.start(backend, ServeSettings(token=TOKEN)).url
    one = opened(url, ready="#token-dialog[open]")
    page = one.page
    assert BASE not in page.content() and "example" not in page.content()
    page.locator("#token").fill("wrong-token-of-some-length")
    page.keyboard.press("Enter")
    page.get_by_text("refuses this token").wait_for()
    page.locator("#token").fill(TOKEN)
    page.keyboard.press("Enter")
    page.locator("#column-1").wait_for()
    one.send("What is the capital of France?")
    assert one.texts()[1]
    kept = page.evaluate(
        "[JSON.stringify(sessionStorage), JSON.stringify(localStorage), document.cookie, location.href]"
    )
    assert TOKEN in kept[0] and TOKEN not in "".join(kept[1:])
    page.get_by_role("button", name="As curl").first.click()
    command = page.locator("#curl").input_value()
    assert TOKEN not in command and "$LORA_TUNE_TOKEN" in command
    page.keyboard.press("Escape")
    page.locator("#token-open").click()
    page.locator("#token-forget").click()
    one.send("Once more?")
    page.locator("#token-dialog[open]").wait_for()
    opened(url, ready="#token-dialog[open]")  # another tab knows nothing of it


def test_a_command_for_the_shell_asks_the_same(url: str, opened: Opener) -> None:
    one = opened(url)
    one.send('It\'s $HOME, `ls` and \\n "quoted"')
    one.cards().nth(1).get_by_role("button", name="As curl").click()
    command = one.page.locator("#curl").input_value()
    reader = "curl() { printf '%s\\0' \"$@\"; }\n"  # what the shell hands to curl
    done = subprocess.run(["sh", "-c", reader + command], capture_output=True, check=True)
    words = done.stdout.decode().split("\0")
    asked = one.sent("v1/chat/completions")[1]
    asked.pop("stream_options")
    assert json.loads(words[words.index("-d") + 1]) == asked and url + "v1/chat/completions" in words


def test_everything_is_done_with_the_keyboard(url: str, votes: Path, opened: Opener) -> None:
    one = opened(url)
    page = one.page
    page.evaluate("document.getElementById('max_tokens').value = 12")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    page.keyboard.type("What is the capital of France?")
    page.keyboard.press("Control+Enter")
    page.locator(".votes").wait_for()
    known = len(votes.read_text().splitlines()) if votes.exists() else 0
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.getAttribute('role')") == "group"
    page.keyboard.press("2")
    page.get_by_text("Saved: 1 preference row.").first.wait_for()
    expect(page.locator("#prompt")).to_be_focused()
    assert len(votes.read_text().splitlines()) == known + 1
    page.keyboard.press("Control+/")
    page.locator("#keys[open]").wait_for()
    page.keyboard.press("Escape")
    reached, wanted = tabbed(page), page.evaluate(
        """[...document.querySelectorAll('button, select, input, textarea, summary, a')]
        .filter(e => e.checkVisibility() && !e.disabled).map(e => e.id || e.textContent.trim())"""
    )  # fmt: skip
    assert set(wanted) - {name for name, _ in reached} == set()
    assert [name for name, outline in reached if outline < 2] == [], "a focus that is not seen"


def tabbed(page: Any) -> list[tuple[str, float]]:
    """What Tab reaches, with the width of the outline that shows it."""
    page.evaluate(
        """() => { document.activeElement.blur(); window.reached = [];
        document.addEventListener('focusin', ({ target }) => { const style = getComputedStyle(target);
        window.reached.push([target.id || target.textContent.trim(),
        style.outlineStyle === 'none' ? 0 : parseFloat(style.outlineWidth)]); }); }"""
    )
    for _ in range(50):
        page.keyboard.press("Tab")
    return [(name, outline) for name, outline in page.evaluate("window.reached")]


def test_a_screen_reader_hears_whole_answers(url: str, opened: Opener) -> None:
    one = opened(url)
    page = one.page
    page.evaluate(
        """() => { window.heard = []; new MutationObserver(changes => changes.forEach(change =>
        change.addedNodes.forEach(node => window.heard.push(node.textContent))))
        .observe(document.getElementById('status'), {subtree: true, childList: true, characterData: true}); }"""
    )
    one.send("What is the capital of France?", tokens=40)
    texts = one.texts()
    heard = page.evaluate("window.heard")
    assert sorted(heard) == sorted([f"1, {BASE}, answers: {texts[0]}", f"2, example, answers: {texts[1]}"])
    live = "[aria-live], [role=status], [role=alert], [role=log]"
    assert page.evaluate(f"document.querySelector('.turn').closest('{live}')") is None
    assert one.cards().nth(0).get_attribute("aria-busy") == "false"
    assert page.get_by_role("main").count() == page.get_by_role("banner").count() == 1
    assert page.get_by_role("group", name=f"Answer 1, {BASE}").count() == 1


def test_what_a_model_says_is_text(url: str, opened: Opener) -> None:
    """The only answer that is put in: no real model here says such things. The page must not read it as HTML."""
    hostile = '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script><style>*{display:none}</style>'
    one = opened(url)
    chunks = [{"choices": [{"index": 0, "delta": {"content": hostile}, "finish_reason": "stop"}]}]
    body = "".join(f"data: {json.dumps(chunk)}\r\n\r\n" for chunk in chunks) + "data: [DONE]\r\n\r\n"
    one.page.route("**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=body))
    one.send(hostile)
    assert one.texts() == [hostile, hostile]
    assert one.page.evaluate(
        "[window.hacked, document.querySelectorAll('.turn img, .turn script, .turn style').length]"
    ) == [None, 0]
    refused = one.page.evaluate(
        "() => { try { document.body.innerHTML = '<b>x</b>' } catch (error) { return error.name } }"
    )
    assert refused == "TypeError", "the policy lets HTML be made from text"
    one.said.clear()  # the browser's word about it


def test_colours_and_motion_are_as_people_want_them(url: str, opened: Opener) -> None:
    one = opened(url, color_scheme="light", reduced_motion="reduce")
    paper = "getComputedStyle(document.body).backgroundColor"
    assert one.page.evaluate(paper) == "rgb(251, 251, 250)"
    one.page.locator("#theme").select_option("dark")
    assert one.page.evaluate(paper) == "rgb(19, 21, 25)"
    one.page.reload()
    one.page.locator("#column-1").wait_for()
    assert one.page.evaluate(paper) == "rgb(19, 21, 25)" and one.page.locator("#theme").input_value() == "dark"
    one.page.locator("#theme").select_option("auto")
    assert one.page.evaluate(paper) == "rgb(251, 251, 250)"
    one.page.locator("#prompt").fill("What is the capital of France?")
    one.page.locator("#send").click()
    one.page.locator(".c1[data-state=running]").wait_for()
    motion = "getComputedStyle(document.querySelector('.c1[data-state] .text'), '::after').animationName"
    assert one.page.evaluate(motion) == "none"
    one.page.keyboard.press("Escape")
    one.idle()


def test_adapters_are_listed_with_their_scores(url: str, opened: Opener) -> None:
    one = opened(url)
    scores = json.loads((EXAMPLE / "manifest.json").read_text())["scores"]
    assert one.page.locator("#column-2 option").all_inner_texts() == [BASE, "example", "twin"]
    one.page.locator("#column-2").select_option("example")
    line = one.page.locator("#columns .scores").nth(1).inner_text()
    assert "exact_match 0 → 0.945" in line
    one.page.locator("#scores summary").click()
    rows = one.page.locator("#score-tables table").first.locator("tbody tr")
    assert rows.count() == len(scores)
    assert [row.locator("td").last.inner_text() for row in rows.all()] == ["better"] * 3
