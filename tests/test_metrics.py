"""The table of metrics, each against its definition, and the paired bootstrap against theory."""

from __future__ import annotations

import inspect
import json
import math
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from scipy import stats

from lora_tune.evaluation.bootstrap import paired_interval, paired_p_value
from lora_tune.evaluation.corpus_metrics import bleu_of
from lora_tune.evaluation.metrics import METRICS, Answered, RowScores, accuracy, accuracy_norm, loss, mean_of
from lora_tune.evaluation.questions import Question
from lora_tune.evaluation.structured_metrics import calls_in, json_schema, schema_of, tool_match, tool_schema
from lora_tune.evaluation.text_metrics import exact_match, final_number, repetition, rouge_l, token_f1
from lora_tune.recipe import MetricName

TEXT = st.text(max_size=40)
OF_TEXT = ["exact_match", "token_f1", "rouge_1", "rouge_2", "rouge_l", "bleu", "chrf", "length_error"]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo", "days": 2}}}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def flat(values: Sequence[float]) -> RowScores:
    return mean_of(list(values))


def answered(answer: str, references: Sequence[str], **about: Any) -> Answered:
    first, *others = references or [""]
    return Answered(Question((), about.pop("tools", ()), first, "", others=tuple(others), **about), answer)


def over(name: str, answers: Sequence[str], references: Sequence[Sequence[str]]) -> RowScores:
    return METRICS[name].over_answers([answered(*pair) for pair in zip(answers, references, strict=True)])


def test_the_table_and_the_recipe_name_the_same_metrics() -> None:
    assert list(METRICS) == list(get_args(MetricName))


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_says_what_it_is(name: str) -> None:
    metric = METRICS[name]
    assert metric.low < metric.high and metric.direction in ("lower", "higher") and metric.source and metric.needs
    assert metric.reads == "answers" or inspect.getdoc(metric.function)


@pytest.mark.parametrize("name", OF_TEXT)
@given(answer=TEXT, reference=TEXT, other=TEXT)
@settings(max_examples=60, deadline=None)
def test_metrics_of_text_stay_in_range_and_never_get_worse_with_one_more_reference(
    name: str, answer: str, reference: str, other: str
) -> None:
    metric = METRICS[name]
    alone, both = (metric.function(answered(answer, right)) for right in ([reference], [other, reference]))
    assert metric.low <= alone <= metric.high + 1e-9
    if name != "bleu":  # its nearest reference decides the length
        assert both >= alone if metric.direction == "higher" else both <= alone
    assert metric.function(answered(answer, [reference])) == alone  # a pure function


@pytest.mark.parametrize("name", OF_TEXT)
def test_a_right_answer_gets_the_best_score_and_an_empty_one_the_worst(name: str) -> None:
    metric = METRICS[name]
    best, worst = (metric.high, metric.low) if metric.direction == "higher" else (0.0, 1.0)
    assert metric.function(answered("The cat sat down.", ["The cat sat down."])) == pytest.approx(best)
    assert metric.function(answered("", ["The cat sat down."])) == worst


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [(" cat\n", "cat", 1.0), ("Cat", "cat", 0.0), ("cat.", "cat", 0.0), ("a  b", "a b", 0.0), ("猫", "猫", 1.0)],
)
def test_exact_match_normalises_white_space_at_the_ends_only(answer: str, reference: str, score: float) -> None:
    assert exact_match(answer, [reference]) == score


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [("The Eiffel Tower!", "eiffel tower", 1.0), ("a cat sat", "the dog sat", 0.5), ("the", "a", 1.0), ("x", "", 0.0)],
)
def test_token_f1_reads_words_as_squad_does(answer: str, reference: str, score: float) -> None:
    assert token_f1(answer, [reference]) == score


def test_loss_is_weighted_by_tokens_and_perplexity_is_its_exponential() -> None:
    scores = METRICS["loss"].over_tokens([10.0, 1.0], [10, 1])
    assert scores.score() == pytest.approx(11 / 11)
    assert METRICS["loss"].over_tokens([30.0, 1.0], [10, 1]).score() == pytest.approx(31 / 11)
    assert METRICS["perplexity"].over_tokens([30.0, 1.0], [10, 1]).score() == pytest.approx(math.exp(31 / 11))
    assert loss(3.0, 2) == 1.5


@pytest.mark.parametrize("broken", [lambda: flat([]).score(), lambda: loss(1.0, 0), lambda: exact_match("a", []),
                                    lambda: rouge_l("a", []), lambda: rouge_l("a", "abc"),
                                    lambda: METRICS["loss"].over_tokens([1.0], [0]),
                                    lambda: METRICS["loss"].over_tokens([], []).score(),
                                    lambda: METRICS["bleu"].over_answers([]).score(),
                                    lambda: tool_match("{}", []),
                                    lambda: METRICS["numeric_match"].function(answered("1", ["none"])),
                                    lambda: paired_interval(flat([]), flat([]), seed=1),
                                    lambda: paired_p_value(flat([]), flat([]), seed=1),
                                    lambda: paired_interval(flat([1]), flat([1, 2]), seed=1)])  # fmt: skip
def test_nothing_to_score_is_an_error_and_not_a_zero(broken) -> None:
    with pytest.raises(ValueError):
        broken()


# --- against libraries and their vectors ----------


def test_rouge_equals_the_numbers_of_the_original_perl_script(corpus: Path) -> None:
    folder = corpus / "data" / "metrics" / "rouge"
    expected = json.loads((folder / "expected.json").read_text())
    targets, predictions = ((folder / name).read_text().splitlines() for name in ("target.txt", "prediction.txt"))
    for target, prediction, numbers, stemmed in zip(
        targets, predictions, expected["rougeL"], expected["rouge1_stem"], strict=False
    ):
        assert METRICS["rouge_1"].function(answered(prediction, [target])) == pytest.approx(stemmed[2], abs=1e-5)
        # the vectors of ROUGE-L were made without stemmer: it can only raise the score, up to the stemmed ROUGE-1
        assert numbers[2] - 1e-5 <= rouge_l(prediction, [target]) <= stemmed[2] + 1e-5
    assert rouge_l(predictions[0], [targets[0]]) == pytest.approx(expected["rougeL"][0][2], abs=1e-5)
    for case in expected["simple"]:
        for name in ("rouge_1", "rouge_2", "rouge_l"):
            numbers = case.get(name.replace("_", "").replace("l", "L"))
            if numbers or "all" in case:
                right = numbers["f"] if numbers else 0.0
                found = METRICS[name].function(answered(case["prediction"], [case["target"]]))
                assert found == pytest.approx(right, abs=1e-9)


def test_rouge_equals_the_library_on_many_pairs(corpus: Path) -> None:
    folder = corpus / "data" / "metrics" / "rouge"
    targets, predictions = (
        (folder / name).read_text().splitlines()[:60] for name in ("target_large.txt", "prediction_large.txt")
    )
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    for target, prediction in zip(targets, predictions, strict=True):
        right = scorer.score(target, prediction)
        for name, key in (("rouge_1", "rouge1"), ("rouge_2", "rouge2"), ("rouge_l", "rougeL")):
            assert METRICS[name].function(answered(prediction, [target])) == right[key].fmeasure


def test_metrics_equal_documented_examples(corpus: Path) -> None:
    rows = (corpus / "data" / "metrics" / "evaluate" / "readme_examples.jsonl").read_text().splitlines()
    seen: dict[str, int] = {}
    for row in map(json.loads, rows):
        kind, expected = row["metric"], row.get("printed_result")
        texts = [text["prediction_text"] if isinstance(text, dict) else text for text in row.get("predictions", [])]
        right = [
            one["answers"]["text"] if isinstance(one, dict) else [one] if isinstance(one, str) else one
            for one in row.get("references", [])
        ]
        if kind == "rouge":
            for name, key in (("rouge_1", "rouge1"), ("rouge_2", "rouge2"), ("rouge_l", "rougeL")):
                assert over(name, texts, right).score() == pytest.approx(expected[key], abs=1e-4)
        elif kind == "exact_match" and row["call"] == "references=refs, predictions=preds":
            assert over("exact_match", texts, right).score() == pytest.approx(expected, abs=5e-3)
        elif kind in ("squad", "squad_v2"):
            assert 100 * over("token_f1", texts, right).score() == pytest.approx(expected["f1"])
        elif kind == "sacrebleu":
            assert over("bleu", texts, right).score() == pytest.approx(expected, abs=0.05)
        else:
            continue
        seen[kind] = seen.get(kind, 0) + 1
    assert seen == {"rouge": 2, "exact_match": 2, "squad": 3, "squad_v2": 3, "sacrebleu": 2}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_bleu_and_chrf_equal_the_vectors_of_sacrebleu(corpus: Path) -> None:
    expected = json.loads((corpus / "data" / "metrics" / "sacrebleu" / "expected.json").read_text())
    seen = 0
    for hypotheses, references, options, score in expected["test_bleu"]["test_corpus_bleu_cases"]:
        if options:
            continue
        rows = [[text for text in row if text] for row in zip(*references, strict=True)]
        assert over("bleu", hypotheses, rows).score() == pytest.approx(score, abs=1e-5)
        seen += 1
    for (counts, answer, reference), score in expected["test_bleu"]["test_case_scoring"]:
        sums = np.array([answer, reference, *counts[0], *counts[1]], dtype=float)
        assert float(bleu_of(sums)) == pytest.approx(100 * score, abs=1e-6)
        seen += 1
    for hypotheses, references, score in expected["test_chrf"]["test_cases_effective_order"]:
        references = references if isinstance(references[0], list) else [references]
        rows = [list(row) for row in zip(*references, strict=True)]
        assert over("chrf", hypotheses, rows).score() == pytest.approx(score, abs=1e-4)
        seen += 1
    for hypothesis, references, score in expected["test_chrf"]["test_sentence_level_chrf"]:
        found = METRICS["chrf"].function(answered(hypothesis, references))
        assert found == pytest.approx(score, abs=1e-3)  # the vectors smooth with 1e-16, which shows in the fourth digit
        seen += 1
    assert seen == 13


@given(st.lists(st.tuples(TEXT, st.lists(TEXT, min_size=2, max_size=2)), min_size=1, max_size=8))
@settings(max_examples=80, deadline=None)
def test_corpus_scores_of_summed_counts_equal_the_library(rows: list[tuple[str, list[str]]]) -> None:
    answers, references = [answer for answer, _ in rows], [right for _, right in rows]
    streams = [[right[place] for right in references] for place in range(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, library in (("bleu", BLEU()), ("chrf", CHRF())):
            right = library.corpus_score(answers, streams).score
            assert over(name, answers, references).score() == pytest.approx(right, abs=1e-6)


def test_final_numbers_agree_with_the_verdicts_of_gsm8k(corpus: Path) -> None:
    path = corpus / "data" / "metrics" / "gsm8k" / "example_model_solutions.jsonl"
    agreed = total = 0
    for row in map(json.loads, path.read_text().splitlines()):
        for one in row.values():
            if isinstance(one, dict):
                found = METRICS["numeric_match"].function(answered(one["solution"], [row["ground_truth"]]))
                agreed += found == one["is_correct"]
                total += 1
    assert total == 4 * 1319 and agreed == total


@pytest.mark.parametrize(
    ("text", "number"),
    [("so 3 + 4 = 7\n#### 1,234", "1234"), ("#### -5 apples and 6", "-5"), ("It costs $1,000.50.", "1000.50"),
     ("first 3, then 4.", "4"), ("none", None), ("####", None), ("5 #### none", None), ("-.5", "-.5")],
)  # fmt: skip
def test_the_final_number_of_a_text(text: str, number: str | None) -> None:
    found = final_number(text)
    assert (found is None) == (number is None) and (number is None or found == pytest.approx(float(number)))


# --- structured answers ----------


@pytest.mark.parametrize(
    ("answer", "score"),
    [('{"a": 1}', 1), (" [1, 2]\n", 1), ("```json\n{}\n```", 0), ("{'a': 1}", 0), ("1", 0), ('{"a": NaN}', 0),
     ("[" * 100_000, 0), ("", 0)],
)  # fmt: skip
def test_json_is_an_object_or_a_list_and_nothing_else(answer: str, score: int) -> None:
    assert METRICS["json_valid"].function(answered(answer, ['{"a": 2}'])) == score


@pytest.mark.parametrize(
    ("answer", "score"),
    [('{"name": "Bo", "age": 3, "tags": ["x"]}', 1), ('{"name": "Bo", "age": 3.5, "tags": []}', 1),
     ('{"name": "Bo", "age": "3", "tags": []}', 0), ('{"name": "Bo", "tags": []}', 0),
     ('{"name": "Bo", "age": 3, "tags": [], "x": 1}', 0), ("name: Bo", 0)],
)  # fmt: skip
def test_the_schema_of_a_reference_asks_for_its_keys_and_types(answer: str, score: int) -> None:
    reference = {"name": "Ann", "age": 30, "tags": ["a", "b"]}
    assert json_schema(answer, schema_of(reference)) == score
    assert METRICS["json_schema"].function(answered(answer, [json.dumps(reference)])) == score


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
                    max_leaves=8).map(lambda value: {"value": value}))  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_a_reference_fits_its_own_schema(value: Any) -> None:
    assert json_schema(json.dumps(value), schema_of(value)) == 1


@pytest.mark.parametrize(
    ("answer", "match", "schema"),
    [
        ('<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo", "days": 2}}\n</tool_call>', 1, 1),
        ('{"name": "weather", "parameters": {"days": 2.0, "city": "Oslo"}}', 1, 1),
        ('[{"function": {"name": "weather", "arguments": "{\\"city\\": \\"Oslo\\", \\"days\\": 2}"}}]', 1, 1),
        ('{"name": "weather", "arguments": {"city": "Rome", "days": 2}}', 0, 1),
        ('{"name": "weather", "arguments": {"days": 2}}', 0, 0),
        ('{"name": "time", "arguments": {"city": "Oslo", "days": 2}}', 0, 0),
        ('{"name": "weather", "arguments": {"city": "Oslo", "days": 2}} {"name": "weather", "arguments": {}}', 0, 0),
        ("The weather {in} Oslo", 0, 0),
    ],
)  # fmt: skip
def test_tool_calls_match_by_name_and_arguments(answer: str, match: int, schema: int) -> None:
    row = answered(answer, [""], calls=(CALL,), tools=(TOOL,))
    assert METRICS["tool_match"].function(row) == match == tool_match(answer, [CALL])
    assert METRICS["json_schema"].function(row) == schema == tool_schema(answer, [TOOL])


def test_calls_may_come_in_any_order_and_a_schema_opens_no_address() -> None:
    other = {"function": {"name": "time", "arguments": {}}}
    both = json.dumps([CALL, other])
    assert tool_match(both, [other, CALL]) == 1 and tool_match(both, [CALL]) == 0
    assert [name for name, _ in calls_in(both)] == ["weather", "time"]
    assert json_schema("{}", {"$ref": "http://127.0.0.1:9/schema.json"}) == 1
    assert json_schema("{}", {"type": "no such type"}) == 1


@pytest.mark.parametrize(
    ("answer", "share"), [("a b c d", 0), ("a b c", 0), ("a b c d a b c d", 0.2), ("x " * 13, 0.9), ("", 0)]
)
def test_repetition_is_the_share_of_4_grams_that_came_before(answer: str, share: float) -> None:
    assert repetition(answer) == pytest.approx(share)


def test_accuracy_takes_sums_and_its_norm_takes_means() -> None:
    assert accuracy(0, [-2.0, -3.0], [1, 3]) == 1 and accuracy_norm(0, [-2.0, -3.0], [1, 3]) == 0
    assert accuracy(0, [-2.0, -2.0], [1, 1]) == 1 and accuracy(1, [-2.0, -2.0], [1, 1]) == 0


@pytest.mark.parametrize(
    ("name", "fits", "does_not"),
    [("exact_match", {"reference": "x"}, {"reference": " "}), ("json_valid", {"reference": "{}"}, {"reference": "1"}),
     ("numeric_match", {"reference": "#### 5"}, {"reference": "five"}),
     ("tool_match", {"reference": "", "calls": (CALL,)}, {"reference": "x"}),
     ("accuracy", {"reference": "b ", "choices": ("a", "b")}, {"reference": "c", "choices": ("a", "b")}),
     ("accuracy", {"reference": "b", "choices": ("a", "b")}, {"reference": "b"})],
)  # fmt: skip
def test_a_metric_knows_which_rows_it_fits(name: str, fits: dict[str, Any], does_not: dict[str, Any]) -> None:
    assert METRICS[name].fits(Question((), (), rank="", **fits))
    assert not METRICS[name].fits(Question((), (), rank="", **does_not))


# --- the paired statistics ----------


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
    assert adapter.score() - base.score() == pytest.approx(-99 / 10_099)
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


def test_the_interval_of_bleu_draws_rows_and_not_scores() -> None:
    answers = ["the cat sat on the mat", "a dog", "rain in the long night again", "yes it is"] * 5
    worse = [text.replace("the", "a") for text in answers]
    base, adapter = over("bleu", worse, [[text] for text in answers]), over("bleu", answers, [[t] for t in answers])
    low, high = paired_interval(base, adapter, seed=1, resamples=2000)
    assert adapter.score() == pytest.approx(100) and low < adapter.score() - base.score() < high
    assert paired_p_value(base, adapter, seed=1) < 0.01
    generator = np.random.default_rng(1)
    drawn = generator.integers(0, 20, size=(2000, 20))
    again = [over("bleu", [worse[n] for n in row], [[answers[n]] for n in row]).score() for row in drawn[:20]]
    times = np.array([np.bincount(row, minlength=20) for row in drawn[:20]], dtype=float)
    assert base.combine(times @ base.sums) == pytest.approx(np.array(again))


def test_binary_metrics_are_tested_by_the_exact_mcnemar() -> None:
    base, adapter = [0.0] * 9 + [1.0] * 3 + [1.0] * 8, [1.0] * 9 + [0.0] * 3 + [1.0] * 8
    right = stats.binomtest(9, 12, 0.5).pvalue
    assert paired_p_value(flat(base), flat(adapter), seed=1) == pytest.approx(right)
    assert paired_p_value(flat(base), flat(base), seed=1) == 1.0


@pytest.mark.parametrize("rows", [6, 40])
def test_other_metrics_are_tested_by_swapping_sides(rows: int) -> None:
    generator = np.random.default_rng(2)
    base = generator.random(rows)
    adapter = base + generator.normal(0.1, 0.2, rows)
    right = stats.permutation_test(
        (base, adapter), lambda x, y: x.mean() - y.mean(), permutation_type="samples", n_resamples=20_000, rng=5
    ).pvalue
    for seed in (0, 1):
        assert paired_p_value(flat(base), flat(adapter), seed=seed) == pytest.approx(right, abs=0.02)
    assert paired_p_value(flat(base), flat(adapter), seed=3) == paired_p_value(flat(base), flat(adapter), seed=3)
    tokens = [3] * rows
    one, two = (METRICS["perplexity"].over_tokens(list(side), tokens) for side in (base, adapter))
    assert paired_p_value(one, two, seed=0) == pytest.approx(right, abs=0.02), "a monotone score, the same test"


def test_a_p_value_is_small_in_5_of_100_samples_without_a_difference() -> None:
    generator = np.random.default_rng(11)
    small = 0
    for trial in range(200):
        base = generator.normal(0, 1, 12)
        small += paired_p_value(flat(base), flat(base + generator.normal(0, 1, 12)), seed=trial, resamples=500) < 0.05
    assert 2 <= small <= 22  # 10, with 4 standard deviations of 3.1
