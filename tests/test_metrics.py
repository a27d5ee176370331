"""The table of metrics, each against its definition, and the paired bootstrap against theory."""

from __future__ import annotations

import inspect
import json
import math
import re
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_tune.evaluation.bootstrap import paired_interval
from lora_tune.evaluation.metrics import METRICS, RowScores, exact_match, loss, rouge_l
from lora_tune.recipe import Eval

TEXT = st.text(max_size=40)


def flat(values: list[float]) -> RowScores:
    return RowScores(tuple(values), (1.0,) * len(values))


def test_the_table_and_the_recipe_name_the_same_metrics() -> None:
    metrics = Eval.model_json_schema()["properties"]["metrics"]
    assert set(METRICS) == set(re.findall(r"'enum': \[(.*?)\]", str(metrics))[0].replace("'", "").split(", ")), metrics


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_says_what_it_is(name: str) -> None:
    metric = METRICS[name]
    assert metric.low < metric.high and metric.direction in ("lower", "higher") and metric.source
    assert inspect.getdoc(metric.function)


@pytest.mark.parametrize("name", [name for name in METRICS if METRICS[name].reads == "answers"])
@given(answer=TEXT, reference=TEXT, other=TEXT)
@settings(max_examples=60, deadline=None)
def test_metrics_of_answers_stay_in_range_and_never_fall_with_one_more_reference(
    name: str, answer: str, reference: str, other: str
) -> None:
    metric = METRICS[name]
    alone, both = metric.function(answer, [reference]), metric.function(answer, [other, reference])
    assert metric.low <= alone <= metric.high
    assert both >= alone
    assert metric.function(answer, [reference]) == alone  # a pure function


@pytest.mark.parametrize("name", [name for name in METRICS if METRICS[name].reads == "answers"])
def test_a_right_answer_gets_the_highest_score_and_an_empty_one_the_lowest(name: str) -> None:
    metric = METRICS[name]
    assert metric.function("The cat sat.", ["The cat sat."]) == metric.high
    assert metric.function("", ["The cat sat."]) == metric.low


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [(" cat\n", "cat", 1.0), ("Cat", "cat", 0.0), ("cat.", "cat", 0.0), ("a  b", "a b", 0.0), ("猫", "猫", 1.0)],
)
def test_exact_match_normalises_white_space_at_the_ends_only(answer: str, reference: str, score: float) -> None:
    assert exact_match(answer, [reference]) == score


def test_loss_is_weighted_by_tokens() -> None:
    scores = METRICS["loss"].over_tokens([10.0, 1.0], [10, 1])
    assert scores.mean() == pytest.approx(11 / 11)
    assert METRICS["loss"].over_tokens([30.0, 1.0], [10, 1]).mean() == pytest.approx(31 / 11)
    assert loss(3.0, 2) == 1.5


@pytest.mark.parametrize("broken", [lambda: flat([]).mean(), lambda: loss(1.0, 0), lambda: exact_match("a", []),
                                    lambda: rouge_l("a", []), lambda: rouge_l("a", "abc"),
                                    lambda: METRICS["loss"].over_tokens([1.0], [0]),
                                    lambda: METRICS["exact_match"].over_answers(["a"], []),
                                    lambda: paired_interval(flat([]), flat([]), seed=1),
                                    lambda: paired_interval(flat([1]), flat([1, 2]), seed=1)])  # fmt: skip
def test_nothing_to_score_is_an_error_and_not_a_zero(broken) -> None:
    with pytest.raises(ValueError):
        broken()


def test_rouge_l_equals_the_numbers_of_the_original_perl_script(corpus: Path) -> None:
    folder = corpus / "data" / "metrics" / "rouge"
    expected = json.loads((folder / "expected.json").read_text())
    targets, predictions = ((folder / name).read_text().splitlines() for name in ("target.txt", "prediction.txt"))
    for target, prediction, numbers, stemmed in zip(
        targets, predictions, expected["rougeL"], expected["rouge1_stem"], strict=False
    ):
        # the vectors of ROUGE-L were made without stemmer: it can only raise the score, up to the stemmed ROUGE-1
        assert numbers[2] - 1e-5 <= rouge_l(prediction, [target]) <= stemmed[2] + 1e-5
    assert rouge_l(predictions[0], [targets[0]]) == pytest.approx(expected["rougeL"][0][2], abs=1e-5)
    for case in expected["simple"]:
        right = 0.0 if "all" in case else case.get("rougeL", case.get("rouge1"))["f"]
        assert rouge_l(case["prediction"], [case["target"]]) == pytest.approx(right, abs=1e-9)


def test_rouge_l_and_exact_match_equal_documented_examples(corpus: Path) -> None:
    rows = (corpus / "data" / "metrics" / "evaluate" / "readme_examples.jsonl").read_text().splitlines()
    seen = 0
    for row in map(json.loads, rows):
        references = (
            [[text] if isinstance(text, str) else text for text in row["references"]] if "references" in row else []
        )
        if row["metric"] == "rouge":
            scores = METRICS["rouge_l"].over_answers(row["predictions"], references)
            assert scores.mean() == pytest.approx(row["printed_result"]["rougeL"], abs=1e-4)
        elif row["metric"] == "exact_match" and row["call"] == "references=refs, predictions=preds":
            scores = METRICS["exact_match"].over_answers(row["predictions"], references)
            assert scores.mean() == pytest.approx(row["printed_result"], abs=5e-3)
        else:
            continue
        seen += 1
    assert seen >= 4


def test_the_interval_has_the_width_that_theory_gives() -> None:
    generator = np.random.default_rng(0)
    base, gain = generator.normal(0, 5, 400), generator.normal(0.3, 1, 400)
    low, high = paired_interval(flat(list(base)), flat(list(base + gain)), seed=1)
    error = gain.std() / math.sqrt(400)  # the pairing takes the rows' own spread of 5 out
    assert (low + high) / 2 == pytest.approx(gain.mean(), abs=0.1 * error)
    assert (high - low) / (2 * 1.96 * error) == pytest.approx(1, abs=0.05)


def test_the_interval_covers_the_true_difference_in_about_95_of_100_samples() -> None:
    generator = np.random.default_rng(7)
    hits = 0
    for trial in range(200):
        base, adapter = (generator.random(60) < 0.3).astype(float), (generator.random(60) < 0.5).astype(float)
        low, high = paired_interval(flat(list(base)), flat(list(adapter)), seed=trial, resamples=1000)
        hits += low <= 0.2 <= high
    assert (
        178 <= hits <= 199
    )  # 95 % of 200 is 190, with 4 standard deviations of 3.1 around it, less a small-sample bias


def test_the_interval_of_a_token_weighted_loss_resamples_rows() -> None:
    tokens = [1] * 99 + [10_000]
    base = METRICS["loss"].over_tokens([2.0 * count for count in tokens], tokens)
    adapter = METRICS["loss"].over_tokens([*([1.0] * 99), 20_000.0], tokens)
    low, high = paired_interval(base, adapter, seed=0)
    assert adapter.mean() - base.mean() == pytest.approx(-99 / 10_099)
    assert low == pytest.approx(-1.0)  # samples without the long row: 37 of 100
    assert -0.02 < high <= 0


def test_equal_sides_have_an_interval_of_nothing_and_seeds_repeat() -> None:
    same = flat([0.0, 1.0, 1.0])
    assert paired_interval(same, same, seed=3) == (0.0, 0.0)
    other = flat([1.0, 1.0, 0.0])
    assert paired_interval(same, other, seed=3) == paired_interval(same, other, seed=3)
    assert paired_interval(flat([0.0]), flat([1.0]), seed=3) == (1.0, 1.0)


def test_ten_thousand_resamples_of_a_thousand_rows_take_no_time() -> None:
    generator = np.random.default_rng(0)
    base, adapter = flat(list(generator.random(1000))), flat(list(generator.random(1000)))
    began = time.perf_counter()
    paired_interval(base, adapter, seed=0)
    assert time.perf_counter() - began < 5
