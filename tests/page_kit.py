"""The compare page in a browser: what it was asked, what it said, what every page must keep to."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from test_report_browser import SIZES

BASE = "builtin:quickstart"
QUESTION = (
    "Answer the question about the text.\n\nHefin carried a violet rope. He talked about a sister called Kemen. Kotofa "
    "brought a green blanket. Sozo was the sister of Kotofa. Bidirel carried a blue wallet and was there with a sister "
    "named Tanola.\n\nWho was the sister of Bidirel?"
)
"""A held-out row of the quickstart: the adapter answers `Tanola`, the base has that word among others."""
SHORT = 12  # new tokens, where an answer need not be long


@dataclass
class Opened:
    """A page, and everything that it asked for and said."""

    page: Any
    url: str
    asked: list[Any] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    def sent(self, path: str) -> list[dict[str, Any]]:
        """The bodies that were sent to a path."""
        return [json.loads(one.post_data) for one in self.asked if one.url == self.url + path and one.post_data]

    def send(self, prompt: str, *, tokens: int = SHORT, keys: str = "Control+Enter") -> None:
        """Write a prompt, send it, and wait until every column has answered."""
        turns = self.page.locator(".turn").count()
        self.page.evaluate("n => { document.getElementById('max_tokens').value = n }", tokens)
        self.page.locator("#prompt").fill(prompt)
        self.page.keyboard.press(keys)
        self.page.locator(".turn").nth(turns).wait_for()
        self.idle()

    def idle(self) -> None:
        """Wait until nothing is being answered."""
        self.page.locator("#send").wait_for()

    def texts(self, turn: int = -1) -> list[str]:
        """The answers of a turn as they are shown."""
        return [card.inner_text() for card in self.cards(turn).locator("> .text").all()]

    def cards(self, turn: int = -1) -> Any:
        """The cards of a turn."""
        return self.page.locator(".turn").nth(turn).locator(".card")


class Opener:
    """Opens pages in contexts of their own, and looks at the end at what each did."""

    def __init__(self, started: Any) -> None:
        self._browser, self._opened = started, list[Opened]()

    def __call__(self, url: str, *, size: str = "desktop", ready: str = "#column-1", **context: Any) -> Opened:
        """A page of this size in a new context, once `ready` is there."""
        width, height = SIZES[size]
        page = self._browser.new_context(viewport={"width": width, "height": height}, **context).new_page()
        page.set_default_timeout(60_000)
        opened = Opened(page, url)
        page.on("request", lambda request: opened.asked.append(request))
        page.on("console", lambda message: opened.said.append(message.text))
        page.on("pageerror", lambda error: opened.said.append(str(error)))
        page.on("dialog", lambda dialog: opened.said.append(dialog.message))
        page.goto(url)
        page.locator(ready).wait_for()
        self._opened.append(opened)
        return opened

    def close(self) -> None:
        """What holds for every page: no other host is asked, nothing is complained of, nothing leaves it sideways."""
        for opened in self._opened:
            assert {one.url for one in opened.asked if not one.url.startswith(opened.url)} == set(), "another host"
            assert [text for text in opened.said if not text.startswith("Failed to load resource")] == []
            assert opened.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
            opened.page.context.close()
