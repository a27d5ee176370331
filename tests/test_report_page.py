"""report.html: what it shows, that hostile texts stay texts, and that big runs stay small."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

import pytest
import report_kit
from hypothesis import given
from hypothesis import strategies as st

from lora_tune.adapter.folder import read_manifest, read_part
from lora_tune.evaluation.pictures import POINTS, curve, thinned
from lora_tune.evaluation.report_facts import facts_of_folder
from lora_tune.evaluation.report_page import ReportFacts, report_page, write_report
from lora_tune.evaluation.report_tables import cost_table, templates_table
from lora_tune.evaluation.scores import Comparison, Sample
from lora_tune.evaluation.side_by_side import marked, side_by_side
from lora_tune.training.metrics_file import read_metrics

NOTHING = Comparison(scores={}, samples=())
_NAMES = (
    "html head meta title style body header main section nav footer h1 h2 h3 h4 p b i strong ul li a div span figure "
    "figcaption svg g path use defs rect clippath table thead tbody tr th td dl dt dd details summary mark del pre code"
)
ELEMENTS = set(_NAMES.split())


class Page(HTMLParser):
    """The elements, attributes and texts of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@cache
def page_of(kind: str) -> str:
    """The page of one of the kit's runs."""
    return report_page(getattr(report_kit, kind)())


def ids(page: Page) -> list[str]:
    """Every id of the page."""
    return [value for _, name, value in page.attributes if name == "id"]


@pytest.mark.parametrize("kind", ["ordinary", "many", "hostile"])
def test_no_element_runs_or_asks_for_anything(kind: str) -> None:
    page = Page(page_of(kind))
    assert set(page.elements) <= ELEMENTS
    assert not [
        entry for entry in page.attributes if entry[1].startswith("on") or entry[1] in ("src", "srcset", "data")
    ]
    links = [value for _, name, value in page.attributes if name in ("href", "xlink:href")]
    assert links and all(link.startswith("#") for link in links)
    assert {link[1:] for link in links} <= set(ids(page))
    assert len(ids(page)) == len(set(ids(page)))
    styles = [value for _, name, value in page.attributes if name == "style"]
    assert not [style for style in styles if "url(" in style.replace("url(#", "")]
    policy = [value for tag, name, value in page.attributes if tag == "meta" and name == "content"]
    assert any(value.startswith("default-src 'none'") for value in policy)


def test_hostile_texts_are_shown_as_texts() -> None:
    page = Page(page_of("hostile"))
    shown = "".join(page.texts)
    assert "<script>document.title='hacked'" in shown and "{{ 7*7 }}{% raw %}" in shown and "&lt;b&gt;" in shown
    assert "\x1b" not in shown and "\u202e" not in shown and "\\x1b[31m\\x202e" in shown
    assert "49" not in [text.strip() for text in page.texts]


def test_no_secret_is_on_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "hf_<&quot>5f0c2d7e41"
    monkeypatch.setenv("MY_API_KEY", secret)
    facts = report_kit.hostile()
    rows = tuple(report_kit.row(n, task=secret, template=secret, text=f"the key {secret}") for n in range(9))
    tasks = {secret: {"loss": report_kit.score(1, 2)}}
    facts = replace(facts, name=secret, recipe=secret, ledger=report_kit.ledger([secret], secret),
                    comparison=replace(facts.comparison, rows=rows, tasks=tasks))  # fmt: skip
    page = report_page(facts)
    assert "5f0c2d7e41" not in page and "[secret]" in page


def test_the_numbers_of_the_facts_are_on_the_page() -> None:
    facts = report_kit.ordinary()
    text = " ".join("".join(Page(page_of("ordinary")).texts).split())
    for name, score in facts.comparison.scores.items():
        for wanted in (name, f"{score.base:.4f}", f"{score.adapter:.4f}", f"{score.low:+.4f} … {score.high:+.4f}"):
            assert wanted in text
    assert facts.hard is not None
    places = [row.place for row in facts.hard.rows]
    for wanted in (
        *places,
        "71 min 11 s",
        "768,000",
        "5.53 GiB",
        "NVIDIA L4",
        "40,370,176",
        "peft",
        "0.21.2",
        *facts.commands.values(),
        "held_out.jsonl:1",
        "9 of 300 held-out rows share",
        "920 of 12,000",
    ):
        assert wanted in text  # fmt: skip
    assert "energy" not in text and "private/folder" not in text


def test_energy_is_told_only_where_it_was_measured() -> None:
    assert "energy" not in str(cost_table(report_kit.TRAINING, energy_wh=None))
    assert "123.4 Wh" in str(cost_table(report_kit.TRAINING, energy_wh=123.4))


def test_a_big_run_stays_a_small_page() -> None:
    page = report_page(report_kit.many(tasks=300, count=20_000))
    assert len(page.encode()) < 2 << 20  # 1.1 MB measured
    assert "the 40 largest of 300" in page and "400 more lines are not shown" in page


def test_a_run_without_anything_to_show_has_a_page() -> None:
    training = report_kit.TRAINING.model_copy(update={"seconds": None, "peak_gib": None, "device": None})
    facts = replace(
        report_kit.ordinary(),
        comparison=NOTHING,
        steps=(),
        hard=None,
        ledger={},
        data=(),
        commands={},
        training=training,
    )
    text = report_page(facts)
    assert "Not measured: the recipe held no rows out." in text and "Training rows that stay hard" not in text


def test_numbers_that_are_not_finite_are_left_out_of_curves() -> None:
    steps = [
        {"step": n, "loss": "nan" if n == 3 else 1.0, "grad_norm": float("inf"), "tokens": 5, "step_s": 0.0}
        for n in range(6)
    ]
    facts = replace(
        report_kit.ordinary(),
        steps=[*steps, {"step": 6, "answers": [["a", "b"]]}, {"step": 6, "eval": {"loss": "inf"}}],
    )
    text = report_page(facts)
    assert (
        "loss (nats per token), steps 0 to 5" in text
        and "gradient norm" not in text
        and "tokens a second, " not in text
    )


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_scores_that_are_not_finite_are_told_and_not_drawn(value: float) -> None:
    broken = report_kit.score(1.0, value, direction="lower")
    tasks = {"one": {"loss": broken}, "two": {"loss": broken}}
    templates = {"one": {"a": {"loss": broken}, "b": {"loss": broken}}}
    comparison = Comparison(scores={"loss": broken}, samples=(), tasks=tasks, templates=templates)
    facts = replace(report_kit.ordinary(), comparison=comparison, steps=(), hard=None)
    text = report_page(facts)
    assert "<svg" not in text and f">{value:.4f}<" in text


def test_the_example_folder_can_be_reported_again(root: Path, tmp_path: Path) -> None:
    folder = root / "adapters" / "example"
    manifest = read_manifest(folder)
    steps = read_metrics(folder / "metrics.jsonl")
    comparison = replace(NOTHING, samples=(Sample("Who?", "Ann", "Bob", "Ann"),))
    facts = facts_of_folder(folder, manifest, comparison, steps=steps, command="lora-tune eval adapters/example")
    text = write_report(tmp_path, facts).read_text(encoding="utf-8")
    assert facts.ledger == read_part(folder, "ledger.json")
    assert "builtin:quickstart" in text and "Made again by <code>lora-tune eval adapters/example</code>" in text
    assert f"steps 1 to {manifest.training.steps}" in text


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=3000))
def test_thinned_points_keep_ends_and_extremes(values: list[float]) -> None:
    points = [(float(step), value) for step, value in enumerate(values)]
    kept = thinned(points, 50)
    assert len(kept) <= 50 and set(kept) <= set(points) and kept == sorted(kept)
    assert kept[0] == points[0] and kept[-1] == points[-1]
    assert max(value for _, value in kept) == max(values) and min(value for _, value in kept) == min(values)


def test_a_curve_of_one_point_and_of_none() -> None:
    one = curve("loss", [(1, 2.0)], name="x")
    assert one is not None and "from 2 to 2" in one.about
    assert curve("loss", [(1, float("nan"))], name="x") is None
    many = curve("loss", [(n, n % 7) for n in range(50_000)], name="x", smooth="smoothed")
    assert many is not None and len(many.svg) < 60_000 and POINTS <= 400


def test_a_picture_is_the_same_again() -> None:
    page = page_of("ordinary")
    assert page == report_page(report_kit.ordinary())
    assert not [code for code in ("#01f0f1", "#06f0f6", "#1f77b4") if code in page]


WORDS = st.lists(st.sampled_from(["a", "b", "c", " ", "\n", ".", "ä"]), max_size=30).map("".join)


@given(answer=WORDS, reference=WORDS)
def test_marks_lose_no_letter(answer: str, reference: str) -> None:
    runs = marked(answer, reference)
    assert "".join(run.text for run in runs if run.kind != "missing") == answer
    if len({run.kind for run in runs}) > 1:
        rest = "".join(run.text for run in runs if run.kind != "other")
        assert rest.split() == reference.split() or "".join(rest.split()) == "".join(reference.split())


def test_marks_name_the_words_that_differ() -> None:
    runs = marked("the quick red fox", "the quick brown fox jumps")
    assert [run.text.strip() for run in runs if run.kind == "other"] == ["red"]
    assert [run.text.strip() for run in runs if run.kind == "missing"] == ["brown", "jumps"]
    assert [run.kind for run in marked("a cat\n", "a  cat")][:1] == ["same"]
    assert [run.kind for run in marked("an amber sweater", "creamy pepper soup")] == ["other"]
    assert marked("same", "same")[0].kind == "same" and marked("", "x") == ()
    assert marked("entirely different", "nothing of it")[0].kind == "other"


def comparison_of(values: Sequence[float]) -> Comparison:
    """Rows with these scores of the adapter."""
    rows = tuple(
        replace(report_kit.row(n), metrics={"rouge_l": (0.5, value), "loss": (1.0, 1.0)})
        for n, value in enumerate(values, 1)
    )
    scores = {"loss": report_kit.score(1, 1, direction="lower"), "rouge_l": report_kit.score(0, 1)}
    return Comparison(scores=scores, samples=(), rows=rows)


@given(values=st.lists(st.floats(0, 1), min_size=1, max_size=60), seed=st.integers(0, 5))
def test_twenty_rows_worst_best_and_drawn(values: list[float], seed: int) -> None:
    shown = side_by_side(comparison_of(values), seed=seed)
    assert len(shown) == min(20, len(values))
    assert len({row.place for row in shown}) == len(shown)
    found = {order: [row.scores[0][2] for row in shown if row.order == order] for order in range(3)}
    if len(set(values)) > 1:
        assert found[0] == sorted(values)[: len(found[0])]
    assert found[1] == sorted(found[1], reverse=True)
    assert all(best >= other for best in found[1] for other in found[2])
    assert shown == side_by_side(comparison_of(values), seed=seed)


def test_without_scored_rows_the_samples_are_shown() -> None:
    only = Comparison(scores={}, samples=(Sample("Who?", "Ann", "Bob", "Ann"),))
    (row,) = side_by_side(only, seed=1)
    assert (row.prompt, row.reference, row.place) == ("Who?", "Ann", "")


def test_median_and_quartiles_over_templates() -> None:
    templates = {f"p{n}": {"accuracy": report_kit.score(0.1 * n, 0.2 * n, 0.01)} for n in range(1, 4)}
    found = replace(NOTHING, templates={"rte": templates, "alone": {"p": templates["p1"]}})
    table = templates_table(found)
    assert table is not None and len(table.lines) == 1
    cells = [cell.text for cell in table.lines[0]]
    assert cells[:3] == ["rte", "accuracy ↑", "3"]
    assert cells[3:7] == ["0.2000", "0.1500 … 0.2500", "0.4000", "0.3000 … 0.5000"]
    assert cells[7] == "3 better, 0 worse" and templates_table(NOTHING) is None


def test_facts_are_plain_enough_for_json() -> None:
    """What a report is made of can be stored: nothing in it is a tensor or an array."""
    facts: ReportFacts = report_kit.ordinary()
    json.dumps([facts.ledger, list(facts.steps), [row.metrics for row in facts.comparison.rows]], allow_nan=False)
