"""Metrics of an answer as text, each a pure function of the answer and the right answers of its row."""

from __future__ import annotations

import functools
import re
import string
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?|-?\$?\.\d+")
_FINAL = "####"
_NGRAM = 4


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1.0 if the answer equals a reference, else 0.0.

    Normalisation: white space at both ends is removed and nothing else; case and punctuation count.
    Raises ValueError without a reference.
    """
    _require(references)
    return float(answer.strip() in {reference.strip() for reference in references})


def token_f1(answer: str, references: Sequence[str]) -> float:
    """F1 of the words that answer and reference share, the best over the references, as SQuAD 1.1 scores.

    Words are lower-cased, without punctuation and English articles (Rajpurkar et al. 2016, §6.1). A text of which
    nothing is left equals one of which nothing is left either (SQuAD 2.0). Raises ValueError without a reference.
    """
    _require(references)
    words = _squad_words(answer)
    return max(_f1(words, _squad_words(reference)) for reference in references)


def rouge_1(answer: str, references: Sequence[str]) -> float:
    """ROUGE-1 F-measure (words) with Porter stemmer, the best over the references (Lin 2004)."""
    return _rouge("rouge1", answer, references)


def rouge_2(answer: str, references: Sequence[str]) -> float:
    """ROUGE-2 F-measure (pairs of words) with Porter stemmer, the best over the references (Lin 2004)."""
    return _rouge("rouge2", answer, references)


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """ROUGE-L F-measure with Porter stemmer, the best over the references (Lin 2004; as Super-NaturalInstructions
    scores).

    rouge-score reads lower-cased letters a-z and digits only: other scripts score 0. Raises ValueError without a
    reference.
    """
    return _rouge("rougeL", answer, references)


def numeric_match(answer: str, references: Sequence[str]) -> float:
    """1.0 if the final number of the answer equals that of a reference, else 0.0 (GSM8K, Cobbe et al. 2021).

    Raises ValueError without a reference, or with one that holds no number.
    """
    _require(references)
    right = [final_number(reference) for reference in references]
    if None in right:
        raise ValueError("a reference without a number")
    return float(final_number(answer) in right)


def final_number(text: str) -> Decimal | None:
    """The number after the last `####`, or the last number where the text has no such mark; None without one.

    Thousands separators and a dollar sign are left out: `$1,000.00` is 1000.
    """
    _, mark, after = text.rpartition(_FINAL)
    found = _NUMBER.findall(after if mark else text)
    if not found:
        return None
    try:
        return Decimal((found[0] if mark else found[-1]).replace(",", "").replace("$", ""))
    except InvalidOperation:
        return None


def length_error(answer: str, references: Sequence[str]) -> float:
    """How far the answer's length lies from the nearest reference's, in characters over those of the reference.

    0 is the right length, 1 twice as long or nothing at all. Raises ValueError without a reference.
    """
    _require(references)
    lengths = [len(reference.strip()) for reference in references]
    return min(abs(len(answer.strip()) - length) / max(1, length) for length in lengths)


def repetition(answer: str) -> float:
    """Share of the answer's word 4-grams that have stood in it before (seq-rep-4, Welleck et al. 2020); 0 below 4
    words."""
    words = answer.split()
    grams = [tuple(words[place : place + _NGRAM]) for place in range(len(words) - _NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _squad_words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def _f1(answer: Sequence[str], reference: Sequence[str]) -> float:
    if not answer or not reference:
        return float(list(answer) == list(reference))
    shared = sum((Counter(answer) & Counter(reference)).values())
    return 2 * shared / (len(answer) + len(reference))


def _rouge(kind: str, answer: str, references: Sequence[str]) -> float:
    _require(references)
    scorer = _scorer(kind)
    return float(max(scorer.score(reference, answer)[kind].fmeasure for reference in references))


@functools.cache
def _scorer(kind: str) -> RougeScorer:
    from rouge_score.rouge_scorer import RougeScorer  # brings nltk, scipy and scikit-learn: a second of CPU

    return RougeScorer([kind], use_stemmer=True)


def _require(references: Sequence[str]) -> None:
    if isinstance(references, str) or not references:
        raise ValueError("references must be a list with at least one text")
