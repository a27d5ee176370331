"""The metrics: one table, each a pure function with its range, direction, source and the rows that it fits.

A metric gives every row numbers that are added up over rows, and makes its score of the sums: for most the value and 1,
so that the score is the mean over rows; for `loss` nats and tokens; for BLEU and chrF counts of n-grams. The bootstrap
draws rows and makes the score of the drawn rows' sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lora_tune.evaluation import corpus_metrics, structured_metrics, text_metrics
from lora_tune.evaluation.questions import Question

Reads = Literal["tokens", "answers", "choices"]


def ratio(sums: np.ndarray) -> np.ndarray:
    """The first of two sums (..., 2) over the second."""
    return np.asarray(sums[..., 0] / sums[..., 1])


def exponential(sums: np.ndarray) -> np.ndarray:
    """The exponential of `ratio`."""
    return np.exp(ratio(sums))


@dataclass(frozen=True, slots=True, eq=False)
class RowScores:
    """What one metric found: the score of each row alone, the numbers (N, K) that add up, and the score of a sum."""

    rows: tuple[float, ...]
    sums: np.ndarray
    combine: Callable[[np.ndarray], np.ndarray] = ratio

    def score(self) -> float:
        """The score over all rows. Raises ValueError where there is nothing to score."""
        if not len(self.rows) or (self.sums.shape[1] == 2 and self.sums[:, 1].sum() <= 0):
            raise ValueError("a metric over no rows has no value")
        exact = np.array([math.fsum(column) for column in self.sums.T])
        return float(self.combine(exact))

    def take(self, places: Sequence[int]) -> RowScores:
        """The same of some of the rows."""
        return RowScores(tuple(self.rows[place] for place in places), self.sums[list(places)], self.combine)


def mean_of(values: Sequence[float]) -> RowScores:
    """Rows whose score is the mean of their values."""
    return RowScores(tuple(values), np.array([[value, 1.0] for value in values]).reshape(-1, 2))


@dataclass(frozen=True, slots=True)
class Answered:
    """A question with an answer: what metrics of answers read."""

    question: Question
    text: str
    stopped: bool = True

    @property
    def references(self) -> tuple[str, ...]:
        """The right answers, at least one text."""
        return self.question.references


@dataclass(frozen=True, slots=True)
class Metric:
    """One line of the table.

    `function` gives the score of one row: of an `Answered`, of nats and tokens, or of the log-probabilities of the
    choices and their lengths. `counts` gives the numbers that add up where the score is no mean over rows, and
    `combine` makes the score of their sum. `fits` says which questions it can score and `needs` what those have.
    """

    name: str
    direction: Literal["lower", "higher"]
    low: float
    high: float
    reads: Reads
    source: str
    function: Callable[..., float]
    needs: str = "an answer with text"
    fits: Callable[[Question], bool] = lambda question: bool(question.reference.strip())
    counts: Callable[[Answered], list[float]] | None = None
    combine: Callable[[np.ndarray], np.ndarray] = ratio

    def over_tokens(self, nll_sums: Sequence[float], tokens: Sequence[int]) -> RowScores:
        """Scores of rows from their summed negative log-likelihoods (nats) and numbers of answer tokens."""
        rows = tuple(self.function(nll, count) for nll, count in zip(nll_sums, tokens, strict=True))
        return RowScores(rows, np.array([nll_sums, tokens], dtype=np.float64).T.reshape(-1, 2), self.combine)

    def over_answers(self, answered: Sequence[Answered]) -> RowScores:
        """Scores of answers; every question must fit."""
        rows = tuple(self.function(row) for row in answered)
        if self.counts is None:
            return mean_of(rows)
        counts = np.array([self.counts(row) for row in answered], dtype=np.float64)
        return RowScores(rows, counts, self.combine)


def loss(nll_sum: float, tokens: int) -> float:
    """Mean negative log-likelihood of a row's answer tokens, in nats per token.

    The score of a data set weights rows by their answer tokens (the sum over all answer tokens, divided by their
    number), which is what training minimises. Raises ValueError for a row without answer tokens.
    """
    if tokens < 1:
        raise ValueError(f"a row needs at least one answer token, got {tokens}")
    return nll_sum / tokens


def perplexity(nll_sum: float, tokens: int) -> float:
    """The exponential of `loss`: among how many equally likely tokens the model is undecided. Raises ValueError."""
    return math.exp(loss(nll_sum, tokens))


def accuracy(right: int, log_probs: Sequence[float], tokens: Sequence[int]) -> float:
    """1.0 if the choice with the highest summed log-probability is the right one, else 0.0; of equals the first counts.

    Source: T0 (Sanh et al. 2022, §5.2; no length normalisation), FLAN.
    """
    return float(max(range(len(log_probs)), key=lambda place: log_probs[place]) == right)


def accuracy_norm(right: int, log_probs: Sequence[float], tokens: Sequence[int]) -> float:
    """`accuracy` with log-probabilities divided by the number of tokens of the choice."""
    means = [log_prob / max(1, count) for log_prob, count in zip(log_probs, tokens, strict=True)]
    return accuracy(right, means, tokens)


def _text(function: Callable[[str, Sequence[str]], float]) -> Callable[[Answered], float]:
    """A metric of answer and references as one of an `Answered`."""
    return lambda row: function(row.text, row.references)


def _schema(row: Answered) -> float:
    """`json_schema` by the reference, or `tool_schema` by the declared tools where the reference calls one."""
    if row.question.calls:
        return structured_metrics.tool_schema(row.text, row.question.tools)
    return max(
        structured_metrics.json_schema(row.text, structured_metrics.schema_of(structured_metrics.read_json(reference)))
        for reference in row.references
        if structured_metrics.read_json(reference) is not None
    )


def _is_json(question: Question) -> bool:
    return structured_metrics.read_json(question.reference) is not None


def _has_number(question: Question) -> bool:
    return all(text_metrics.final_number(reference) is not None for reference in question.references)


def _has_choices(question: Question) -> bool:
    return len(question.choices) > 1 and question.reference.strip() in [text.strip() for text in question.choices]


_INF = math.inf
METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("loss", "lower", 0.0, _INF, "tokens", "negative log-likelihood, nats per answer token", loss,
               "an answer token"),
        Metric("perplexity", "lower", 1.0, _INF, "tokens", "exp of the loss", perplexity, "an answer token",
               combine=exponential),
        Metric("exact_match", "higher", 0.0, 1.0, "answers", "string equality after strip()",
               _text(text_metrics.exact_match)),
        Metric("token_f1", "higher", 0.0, 1.0, "answers", "SQuAD 1.1; Rajpurkar et al. 2016",
               _text(text_metrics.token_f1)),
        Metric("rouge_1", "higher", 0.0, 1.0, "answers", "rouge-score, rouge1 with stemmer; Lin 2004",
               _text(text_metrics.rouge_1)),
        Metric("rouge_2", "higher", 0.0, 1.0, "answers", "rouge-score, rouge2 with stemmer; Lin 2004",
               _text(text_metrics.rouge_2)),
        Metric("rouge_l", "higher", 0.0, 1.0, "answers", "rouge-score, rougeL with stemmer; Lin 2004",
               _text(text_metrics.rouge_l)),
        Metric("bleu", "higher", 0.0, 100.0, "answers", "sacrebleu, 13a, exp; Papineni et al. 2002, Post 2018",
               _text(corpus_metrics.bleu_row), counts=lambda row: corpus_metrics.bleu_counts(row.text, row.references),
               combine=corpus_metrics.bleu_of, needs="an answer of at least 4 words",
               fits=lambda question: len(question.reference.split()) >= corpus_metrics.ORDER),
        Metric("chrf", "higher", 0.0, 100.0, "answers", "sacrebleu, chrF2; Popović 2015",
               _text(corpus_metrics.chrf_row), counts=lambda row: corpus_metrics.chrf_counts(row.text, row.references),
               combine=corpus_metrics.chrf_of),
        Metric("accuracy", "higher", 0.0, 1.0, "choices", "summed log-probability of the choices; Sanh et al. 2022",
               accuracy, "answer choices with the right one among them", _has_choices),
        Metric("accuracy_norm", "higher", 0.0, 1.0, "choices", "mean log-probability per token of the choices",
               accuracy_norm, "answer choices with the right one among them", _has_choices),
        Metric("numeric_match", "higher", 0.0, 1.0, "answers", "number after ####, else the last; Cobbe et al. 2021",
               _text(text_metrics.numeric_match), "a number in the answer", _has_number),
        Metric("json_valid", "higher", 0.0, 1.0, "answers", "RFC 8259, an object or a list",
               lambda row: structured_metrics.json_valid(row.text),
               "an answer that is a JSON object or list", _is_json),
        Metric("json_schema", "higher", 0.0, 1.0, "answers",
               "jsonschema: keys and types of the reference, or the parameters of the declared tool", _schema,
               "an answer that is a JSON object or list, or calls a tool",
               lambda question: bool(question.calls) or _is_json(question)),
        Metric("tool_match", "higher", 0.0, 1.0, "answers", "name and arguments of all calls; Patil et al. 2024",
               lambda row: structured_metrics.tool_match(row.text, row.question.calls),
               "a tool call in the answer", lambda question: bool(question.calls)),
        Metric("length_error", "lower", 0.0, _INF, "answers", "distance of the lengths over that of the reference",
               _text(text_metrics.length_error)),
        Metric("stop_rate", "higher", 0.0, 1.0, "answers", "share of answers that a stop token ended",
               lambda row: float(row.stopped), "an answer", lambda question: True),
        Metric("repetition", "lower", 0.0, 1.0, "answers", "seq-rep-4; Welleck et al. 2020",
               lambda row: text_metrics.repetition(row.text), "an answer", lambda question: True),
    )
}  # fmt: skip
