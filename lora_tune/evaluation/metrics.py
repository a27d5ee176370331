"""The metrics: one table, each a pure function over one row with its range, direction and source.

A metric gives every row a value and a weight; its score is the sum of values over the sum of weights. For `loss` the
weight is the number of answer tokens, for all others it is 1.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from rouge_score.rouge_scorer import RougeScorer


@dataclass(frozen=True, slots=True)
class RowScores:
    """Values and weights of one metric, row by row."""

    values: tuple[float, ...]
    weights: tuple[float, ...]

    def mean(self) -> float:
        """Sum of the values over the sum of the weights. Raises ValueError where there is nothing to score."""
        if len(self.values) != len(self.weights):
            raise ValueError(f"as many weights as values, got {len(self.weights)} and {len(self.values)}")
        if not self.values or sum(self.weights) <= 0:
            raise ValueError("a metric over no rows has no value")
        return math.fsum(self.values) / math.fsum(self.weights)


@dataclass(frozen=True, slots=True)
class Metric:
    """One line of the table. `function` gives a row's score from what the metric reads."""

    name: str
    direction: Literal["lower", "higher"]
    low: float
    high: float
    reads: Literal["tokens", "answers"]
    source: str
    function: Callable[..., float]

    def over_tokens(self, nll_sums: Sequence[float], tokens: Sequence[int]) -> RowScores:
        """Scores of rows from their summed negative log-likelihoods (nats) and numbers of answer tokens."""
        for nll, count in zip(nll_sums, tokens, strict=True):
            self.function(nll, count)
        return RowScores(tuple(nll_sums), tuple(float(count) for count in tokens))

    def over_answers(self, answers: Sequence[str], references: Sequence[Sequence[str]]) -> RowScores:
        """Scores of answers against the references of each row (at least one)."""
        values = tuple(self.function(answer, right) for answer, right in zip(answers, references, strict=True))
        return RowScores(values, (1.0,) * len(values))


def loss(nll_sum: float, tokens: int) -> float:
    """Mean negative log-likelihood of a row's answer tokens, in nats per token; its exponential is the perplexity.

    The score of a data set weights rows by their answer tokens (the sum over all answer tokens, divided by their
    number), which is what training minimises. Raises ValueError for a row without answer tokens.
    """
    if tokens < 1:
        raise ValueError(f"a row needs at least one answer token, got {tokens}")
    return nll_sum / tokens


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1.0 if the answer equals a reference, else 0.0.

    Normalisation: white space at both ends is removed and nothing else; case and punctuation count.
    Raises ValueError without a reference.
    """
    _require(references)
    return float(answer.strip() in {reference.strip() for reference in references})


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """ROUGE-L F-measure with Porter stemmer, the best over the references (Lin 2004; as Super-NaturalInstructions
    scores).

    rouge-score reads lower-cased letters a-z and digits only: other scripts score 0. Raises ValueError without a
    reference.
    """
    _require(references)
    return max(_rouge_l_scorer().score(reference, answer)["rougeL"].fmeasure for reference in references)


@functools.cache
def _rouge_l_scorer() -> RougeScorer:
    return RougeScorer(["rougeL"], use_stemmer=True)


def _require(references: Sequence[str]) -> None:
    if isinstance(references, str) or not references:
        raise ValueError("references must be a list with at least one text")


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("loss", "lower", 0.0, math.inf, "tokens", "negative log-likelihood, nats per answer token", loss),
        Metric("exact_match", "higher", 0.0, 1.0, "answers", "string equality after strip()", exact_match),
        Metric("rouge_l", "higher", 0.0, 1.0, "answers", "rouge-score 0.1.2, rougeL with stemmer; Lin 2004", rouge_l),
    )
}
