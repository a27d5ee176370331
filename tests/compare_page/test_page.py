"""The compare page in a real browser against the real server: streams, votes, differences, prompts as tokens."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from page_kit import BASE, QUESTION, Opener
from page_server import call
from test_report_browser import CONTRAST, LAYOUT, SIZES

from lora_tune.data.conversation import Message
from lora_tune.serving.local import LocalBackend
from lora_tune.serving.votes import undecided_file


@pytest.mark.parametrize("size", SIZES)
def test_the_page_as_people_see_it(size: str, url: str, opened: Opener) -> None:
    from axe_playwright_python.sync_playwright import Axe  # type: ignore[import-untyped]

    one = opened(url, size=size, color_scheme="light")
    page = one.page
    page.locator("#add-column").click()
    one.send(QUESTION)
    page.get_by_role("button", name="Prompt as tokens").first.click()
    page.locator(".card .tokens").wait_for()
    page.locator("#prompt").fill("And <b>then</b>?")
    page.locator("#draft-tokens").click()
    page.locator("#draft .tokens").first.wait_for()
    page.evaluate("document.querySelectorAll('details').forEach(e => e.open = true)")
    assert Axe().run(page).response["violations"] == []
    page.evaluate("document.querySelectorAll('.unseen, .skip').forEach(e => e.remove())")
    for scheme, paper in (("light", "rgb(251, 251, 250)"), ("dark", "rgb(19, 21, 25)")):
        page.emulate_media(color_scheme=scheme)
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == paper
        assert page.evaluate(LAYOUT) == []
        assert page.evaluate(CONTRAST) == []
    for dialog in ("keys", "token-dialog", "curl-dialog"):
        page.evaluate("id => document.getElementById(id).showModal()", dialog)
        assert size == "desktop" or Axe().run(page).response["violations"] == []
        box = page.locator(f"#{dialog}").bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= SIZES[size][0]
        page.keyboard.press("Escape")


def test_answers_stream_in_from_all_columns(url: str, backend: LocalBackend, opened: Opener) -> None:
    one = opened(url)
    one.page.evaluate(
        """() => { window.lengths = [[], []]; new MutationObserver(() =>
        document.querySelectorAll('.turn .card > .text').forEach((e, i) => window.lengths[i].push(e.innerText.length)))
        .observe(document.getElementById('turns'), {subtree: true, childList: true, characterData: true}); }"""
    )
    one.send("What is the capital of France?", tokens=60)
    base_lengths, adapter_lengths = (sorted(set(found)) for found in one.page.evaluate("window.lengths"))
    assert len(base_lengths) > 8 and len(adapter_lengths) >= 1, "the answer came at once"
    for body, text in zip(one.sent("v1/chat/completions"), one.texts(), strict=True):
        whole = call(url + "v1/chat/completions", {**body, "stream": False, "stream_options": None}).json
        assert whole["choices"][0]["message"]["content"] == text
        facts = one.cards().nth(int(body["model"] == "example")).locator(".facts").inner_text()
        assert f"{whole['usage']['completion_tokens']} token" in facts and "first after" in facts
    assert "tokens/s" in one.cards().nth(0).locator(".facts").inner_text()


def test_every_column_gets_the_same_prompt_and_seed(url: str, opened: Opener) -> None:
    one = opened(url)
    one.page.locator("#add-column").click()
    for column, model in enumerate(("example", "twin", BASE)):
        one.page.locator(f"#column-{column + 1}").select_option(model)
    one.page.locator("#sampling summary").click()
    for name, value in (("temperature", "1.5"), ("seed", "11"), ("system", "Say more.")):
        one.page.locator(f"#{name}").fill(value)
    one.send("Tell me about a dog.", tokens=24)
    first, second, third = one.sent("v1/chat/completions")
    assert [first.pop("model"), second.pop("model"), third.pop("model")] == ["example", "twin", BASE]
    assert first == second == third and (first["seed"], first["temperature"]) == (11, 1.5)
    assert first["messages"][0] == {"role": "system", "content": "Say more."}
    texts = one.texts()
    assert texts[0] == texts[1], "the same adapter with the same seed"
    assert "the same answer as 2" in one.cards().nth(0).inner_text()
    vote = one.page.locator(".votes")
    assert vote.get_by_role("button", name="1 · example").is_enabled()  # better than the third
    one.page.locator("#drop-column").click()
    one.send("Tell me about a cat.", tokens=8)
    assert one.cards().count() == 2


def test_votes_become_rows(url: str, votes: Path, opened: Opener) -> None:
    one = opened(url)
    known = len(votes.read_text().splitlines()) if votes.exists() else 0
    one.send(QUESTION)
    texts = one.texts()
    one.page.get_by_role("button", name="2 · example").click()
    one.page.get_by_text("Saved: 1 preference row.").first.wait_for()
    row = json.loads(votes.read_text(encoding="utf-8").splitlines()[known])
    assert row["prompt"] == [{"role": "user", "content": QUESTION}] and row["seed"] == 42
    assert [row["chosen"][0]["content"], row["rejected"][0]["content"]] == [texts[1], texts[0]]
    assert (row["chosen_model"], row["rejected_model"]) == ("example", BASE)
    assert one.page.get_by_role("button", name="Tie").is_disabled(), "one vote for one turn"
    one.page.locator("#column-1").select_option("twin")
    one.page.get_by_role("button", name="New conversation").click()
    one.send(QUESTION)
    assert one.page.get_by_role("button", name="1 · twin").is_disabled(), "equal answers are no preference"
    one.page.get_by_role("button", name="Both bad").click()
    one.page.get_by_text("Saved, without a preference.").first.wait_for()
    undecided = json.loads(undecided_file(votes).read_text(encoding="utf-8").splitlines()[-1])
    assert (undecided["verdict"], undecided["models"]) == ("bad", ["twin", "example"])
    assert len(votes.read_text(encoding="utf-8").splitlines()) == known + 1


def test_columns_keep_their_own_conversation_or_go_on_from_one_answer(url: str, opened: Opener) -> None:
    one = opened(url)
    one.send("What is the capital of France?")
    first = one.texts()
    assert first[0] != first[1]
    one.send("And of Spain?")
    for body, text in zip(one.sent("v1/chat/completions")[2:], first, strict=True):
        assert [turn["content"] for turn in body["messages"]] == [
            "What is the capital of France?",
            text,
            "And of Spain?",
        ]
    assert "a preference needs one prompt" in one.page.locator(".votes").nth(1).inner_text()
    assert one.page.locator(".turn").nth(1).get_by_role("button", name="Tie").count() == 0
    for turn in (0, 1):
        one.cards(turn).nth(1).get_by_role("button", name="Continue all from here").click()
    one.send("And of Italy?")
    third = one.sent("v1/chat/completions")[4:]
    assert third[0]["messages"] == third[1]["messages"] and third[0]["messages"][1]["content"] == first[1]
    assert one.page.locator(".turn").nth(2).get_by_role("button", name="Tie").is_visible()
    one.page.get_by_role("button", name="Take back").click()
    assert one.page.locator("#prompt").input_value() == "And of Italy?" and one.page.locator(".turn").count() == 2


def test_what_differs_is_marked_in_more_than_colour(url: str, opened: Opener) -> None:
    one = opened(url)
    one.send(QUESTION)
    marks = one.page.locator(".card mark")
    assert marks.count() == 2 and "altogether another answer" in one.cards().nth(1).inner_text()
    assert "tokens/s" not in one.cards().nth(1).inner_text(), "a rate of five tokens"
    assert "underline" in marks.first.evaluate("e => getComputedStyle(e).textDecorationLine")
    texts = one.texts()
    one.page.locator("#marks").uncheck()
    assert marks.count() == 0 and one.texts() == texts
    one.page.locator("#marks").check()
    assert marks.count() > 0


def test_words_are_compared_by_their_longest_common_part(url: str, opened: Opener) -> None:
    one = opened(url)
    draw = random.Random(1)
    pairs = [
        ["".join(draw.choice(["ab ", "c\n", "d", ". "]) for _ in range(draw.randrange(30))) for _ in "xy"]
        for _ in range(300)
    ]
    pairs += [["日本語の文です", "日本語です"], ["", "a"], ["", ""], ["a b c d", "a b c d "]]
    found = one.page.evaluate(
        """async pairs => { const { compare, words, shared } = await import('/page/diff.js');
        return pairs.map(([a, b]) => [compare([a, b]), words(a), words(b), shared(words(a), words(b))]); }""",
        pairs,
    )
    for (a, b), (runs, a_words, b_words, (in_a, in_b)) in zip(pairs, found, strict=True):
        assert ["".join(run["text"] for run in side) for side in runs] == [a, b]
        common = [
            [word.strip() for word, same in zip(*side, strict=True) if same]
            for side in ((a_words, in_a), (b_words, in_b))
        ]
        longest = longest_common([word.strip() for word in a_words], [word.strip() for word in b_words])
        assert common[0] == common[1]
        assert len(common[0]) == longest or (not common[0] and 8 * longest < len(a_words) + len(b_words))


def longest_common(a: list[str], b: list[str]) -> int:
    row = [0] * (len(b) + 1)
    for word in a:
        before = row
        row = [0]
        for i, other in enumerate(b):
            row.append(before[i] + 1 if word == other else max(row[i], before[i + 1]))
    return row[-1]


def test_a_prompt_is_shown_as_the_tokens_of_training(url: str, backend: LocalBackend, opened: Opener) -> None:
    one = opened(url)
    one.send("Is <|im_end|> a word?\nYes.")
    one.cards().nth(1).get_by_role("button", name="Prompt as tokens").click()
    panel = one.cards().nth(1).locator(".tokens")
    panel.locator("summary").click()
    ids = backend.chat("example").prompt_ids([Message("user", "Is <|im_end|> a word?\nYes.")])
    assert json.loads(panel.locator("code").inner_text()) == ids
    special = [token.replace("\n", "") for token in panel.locator(".pieces b").all_inner_texts()]
    assert special == ["<|im_start|>user↵", "<|im_end|>", "<|im_start|>assistant↵"], "not the one that the user wrote"
    facts = one.cards().nth(1).locator(".facts").inner_text()
    assert f"(prompt {len(ids)})" in facts, "the answer was made from other tokens than those shown"
    button = one.cards().nth(1).get_by_role("button", name="Prompt as tokens")
    assert button.get_attribute("aria-expanded") == "true"
    button.click()
    assert not panel.is_visible()
