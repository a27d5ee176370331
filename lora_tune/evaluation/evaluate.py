"""Base against adapter: one loaded model, adapter on and off, the same rows, the same decoding."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from lora_tune.data.conversation import Conversation
from lora_tune.evaluation.bootstrap import paired_interval, paired_p_value
from lora_tune.evaluation.fit import HeldOut, check_fit, loss_rows
from lora_tune.evaluation.losses import RowLoss, row_losses
from lora_tune.evaluation.metrics import METRICS, Answered, RowScores, mean_of
from lora_tune.evaluation.questions import Question, calls_text, questions_of, readable, shown
from lora_tune.evaluation.rank import Choice, RankedRow, choice_scores, ranked_rows
from lora_tune.evaluation.scores import Comparison, RowScore, Sample, Score
from lora_tune.model.generation import Answer, generate
from lora_tune.terminal import progress_bar

if TYPE_CHECKING:
    from peft import PeftModel
    from rich.progress import Progress
    from transformers import PreTrainedModel

    from lora_tune.data.chat_template import ChatTemplate, TokenRow
    from lora_tune.recipe import Eval

MOST_NEW_TOKENS = 512
_ANSWER_MARGIN = 16  # tokens an answer may be longer than the longest reference


@dataclass(frozen=True, slots=True)
class _Work:
    """What is asked of each side: rows with a loss, questions to answer, questions whose choices are ranked."""

    metrics: Sequence[str]
    conversations: Sequence[Conversation]
    rows: list[tuple[int, TokenRow]]
    questions: list[Question]
    shown: list[int]
    asked: list[int]
    ranked: list[int]
    choices: list[RankedRow]
    prompts: list[list[int]]
    max_new_tokens: int


@dataclass(frozen=True, slots=True)
class _Side:
    """What one side, adapter or base, did with them; answers and choices by number of the question."""

    losses: list[RowLoss]
    answers: dict[int, Answer] = field(default_factory=dict)
    choices: dict[int, list[Choice]] = field(default_factory=dict)


def compare(
    model: PeftModel,
    chat: ChatTemplate,
    held_out: HeldOut,
    *,
    metrics: Sequence[str],
    evaluation: Eval,
    seed: int,
) -> Comparison:
    """Score and sample the adapter and its base on held-out rows.

    The model is loaded once: the adapter's side runs with it on, the base's side under `model.disable_adapter()`.
    Rows are the same on both sides: all held-out rows, or `evaluation.max_rows` of them chosen by content hash and
    seed; a metric scores those of them that it fits. The loss is taken over the token rows, the other metrics over the
    last assistant turn of each conversation. Answers are greedy and end at the longest reference + 16 tokens, at most
    at 512. The model is left in the mode in which it was, and no global random number is drawn.

    Raises DataError where a metric has no row to score.
    """
    work = _work(chat, held_out, metrics=metrics, evaluation=evaluation, seed=seed)
    sides: dict[str, _Side] = {}
    with progress_bar() as bar:
        for name, setting in (("adapter", nullcontext()), ("base", model.disable_adapter())):
            with setting:
                sides[name] = _side(model, chat, work, bar=bar, name=name)
    found = {name: (_row_scores(name, sides["base"], work), _row_scores(name, sides["adapter"], work))
             for name in metrics}  # fmt: skip
    places = {name: _scored(name, work) for name in metrics}
    tasks = dict.fromkeys(conversation.task for conversation in held_out[0] if conversation.task)
    scored = partial(_part_scores, found=found, places=places, conversations=held_out[0], seed=seed)
    by_task = {task: scored(task) for task in tasks}
    by_template = {task: {name: scored(task, name) for name in _templates(task, held_out[0])} for task in by_task}
    return Comparison(
        scores={name: _score(name, base, adapter, seed=seed) for name, (base, adapter) in found.items()},
        samples=tuple(_sample(work.questions[place], sides, place) for place in work.shown),
        max_new_tokens=work.max_new_tokens if work.asked else None,
        stopped={name: _stopped(side) for name, side in sides.items() if work.asked},
        tasks={task: scores for task, scores in by_task.items() if scores},
        templates={
            task: {name: scores for name, scores in found_.items() if scores} for task, found_ in by_template.items()
        },
        rows=_rows(work, sides, found, places),
    )


def adapter_scores(
    model: PeftModel | PreTrainedModel,
    *,
    chat: ChatTemplate,
    held_out: HeldOut,
    metrics: Sequence[str],
    evaluation: Eval,
    seed: int,
) -> dict[str, float]:
    """The adapter's side of `compare`, by metric, of the model as it is now: what is measured during training."""
    work = _work(chat, held_out, metrics=metrics, evaluation=evaluation, seed=seed, samples="none")
    side = _side(model, chat, work, bar=None, name="held-out rows")
    return {name: _row_scores(name, side, work).score() for name in metrics}


def sample_answers(
    model: PreTrainedModel | PeftModel,
    *,
    chat: ChatTemplate,
    conversations: Sequence[Conversation],
    evaluation: Eval,
    seed: int,
) -> list[tuple[str, str]]:
    """Prompt and answer of the rows that `compare` shows as samples, from the model as it is now."""
    questions = questions_of(conversations, evaluation, seed=seed)
    asked = [questions[place] for place in shown(questions, evaluation)]
    longest = _longest_answer(chat, asked)
    answers = generate(model, chat, _prompts(chat, asked), max_new_tokens=longest)
    return [(readable(question.messages), answer.text) for question, answer in zip(asked, answers, strict=True)]


def _work(
    chat: ChatTemplate,
    held_out: HeldOut,
    *,
    metrics: Sequence[str],
    evaluation: Eval,
    seed: int,
    samples: str = "shown",
) -> _Work:
    """Everything that both sides are asked. Raises DataError where a metric has no row to score."""
    check_fit(held_out, metrics=metrics, evaluation=evaluation, seed=seed)
    questions = questions_of(held_out[0], evaluation, seed=seed)
    reads = {METRICS[name].reads for name in metrics}
    fitting = {name: [n for n, question in enumerate(questions) if METRICS[name].fits(question)] for name in metrics}
    sampled = shown(questions, evaluation) if samples == "shown" else []
    by_answers = [number for name in metrics if METRICS[name].reads == "answers" for number in fitting[name]]
    asked = sorted({*by_answers, *sampled})
    ranked = sorted({number for name in metrics if METRICS[name].reads == "choices" for number in fitting[name]})
    return _Work(
        metrics=metrics,
        conversations=held_out[0],
        rows=loss_rows(held_out, evaluation=evaluation, seed=seed) if "tokens" in reads else [],
        questions=questions,
        shown=sampled,
        asked=asked,
        ranked=ranked,
        choices=ranked_rows(chat, [questions[number] for number in ranked]),
        prompts=_prompts(chat, [questions[number] for number in asked]),
        max_new_tokens=_longest_answer(chat, [questions[number] for number in asked]),
    )


def _side(
    model: PeftModel | PreTrainedModel, chat: ChatTemplate, work: _Work, *, bar: Progress | None, name: str
) -> _Side:
    """One side's losses, answers and choices."""
    rows = [row for _, row in work.rows]
    losses = row_losses(model, rows, pad_id=chat.pad_id, progress=_stage(bar, f"{name}: loss", len(rows)))
    ranking = _stage(bar, f"{name}: choices", len(work.ranked))
    choices = choice_scores(model, work.choices, pad_id=chat.pad_id, progress=ranking)
    reporting = _stage(bar, f"{name}: answers", len(work.asked))
    answers = generate(model, chat, work.prompts, max_new_tokens=work.max_new_tokens, progress=reporting)
    return _Side(losses, dict(zip(work.asked, answers, strict=True)), dict(zip(work.ranked, choices, strict=True)))


def _scored(name: str, work: _Work) -> list[int]:
    """Numbers of the conversations that a metric scores, in the order of its row scores."""
    if METRICS[name].reads == "tokens":
        return list(dict.fromkeys(owner for owner, _ in work.rows))
    return [question.number for question in work.questions if METRICS[name].fits(question)]


def _row_scores(name: str, side: _Side, work: _Work) -> RowScores:
    """One metric of one side; the token rows of one conversation count as one row."""
    metric = METRICS[name]
    if metric.reads == "tokens":
        by_owner: dict[int, list[RowLoss]] = {}
        for (owner, _), row in zip(work.rows, side.losses, strict=True):
            by_owner.setdefault(owner, []).append(row)
        nll = [math.fsum(row.nll for row in rows) for rows in by_owner.values()]
        return metric.over_tokens(nll, [sum(row.tokens for row in rows) for rows in by_owner.values()])
    fitting = [number for number, question in enumerate(work.questions) if metric.fits(question)]
    if metric.reads == "choices":
        return mean_of([_choice_score(name, work.questions[number], side.choices[number]) for number in fitting])
    answers = [(work.questions[number], side.answers[number]) for number in fitting]
    return metric.over_answers([Answered(question, answer.text, answer.stopped) for question, answer in answers])


def _choice_score(name: str, question: Question, choices: Sequence[Choice]) -> float:
    right = [text.strip() for text in question.choices].index(question.reference.strip())
    return METRICS[name].function(right, [one.log_prob for one in choices], [one.tokens for one in choices])


def _score(name: str, base: RowScores, adapter: RowScores, *, seed: int) -> Score:
    """One metric on both sides, with the interval of the difference and a test of it."""
    low, high = paired_interval(base, adapter, seed=seed)
    return Score(
        base=base.score(),
        adapter=adapter.score(),
        low=low,
        high=high,
        p_value=paired_p_value(base, adapter, seed=seed),
        rows=len(base.rows),
        direction=METRICS[name].direction,
    )


def _templates(task: str, conversations: Sequence[Conversation]) -> list[str]:
    """The names of the templates by which the rows of a task are asked."""
    return list(dict.fromkeys(row.template for row in conversations if row.task == task and row.template))


def _part_scores(
    task: str,
    template: str | None = None,
    *,
    found: dict[str, tuple[RowScores, RowScores]],
    places: dict[str, list[int]],
    conversations: Sequence[Conversation],
    seed: int,
) -> dict[str, Score]:
    """The scores over the rows of one task, or of one of its templates, of the metrics that fit some of them."""
    scores = {}
    for name, (base, adapter) in found.items():
        asked = [conversations[number] for number in places[name]]
        own = [n for n, row in enumerate(asked) if row.task == task and template in (None, row.template)]
        if own:
            scores[name] = _score(name, base.take(own), adapter.take(own), seed=seed)
    return scores


def _rows(
    work: _Work,
    sides: dict[str, _Side],
    found: dict[str, tuple[RowScores, RowScores]],
    places: dict[str, list[int]],
) -> tuple[RowScore, ...]:
    """Every row that was scored or shown, with its answers and its score by metric."""
    pairs: dict[int, dict[str, tuple[float, float]]] = {work.questions[place].number: {} for place in work.shown}
    for name, (base, adapter) in found.items():
        for row, number in enumerate(places[name]):
            pairs.setdefault(number, {})[name] = (base.rows[row], adapter.rows[row])
    by_number = {question.number: place for place, question in enumerate(work.questions)}
    rows = []
    for number in sorted(pairs):
        conversation, place = work.conversations[number], by_number.get(number)
        question = None if place is None else work.questions[place]
        said = {
            name: "" if place is None else _said(side, work.questions[place], place) for name, side in sides.items()
        }
        rows.append(
            RowScore(
                source=conversation.file,
                line=conversation.line,
                task=conversation.task,
                template=conversation.template,
                prompt=readable(question.messages) if question else (conversation.text or ""),
                reference=question.shown_reference if question else "",
                base=said["base"],
                adapter=said["adapter"],
                metrics=pairs[number],
            )
        )
    return tuple(rows)


def _said(side: _Side, question: Question, place: int) -> str:
    """The answer of one side, or the choice that it holds most likely; empty where it was asked for neither."""
    if place in side.answers:
        return side.answers[place].text
    if place not in side.choices:
        return ""
    log_probs = [choice.log_prob for choice in side.choices[place]]
    return question.choices[log_probs.index(max(log_probs))]


def _prompts(chat: ChatTemplate, questions: Sequence[Question]) -> list[list[int]]:
    return [chat.prompt_ids(question.messages, tools=question.tools) for question in questions]


def _longest_answer(chat: ChatTemplate, questions: Sequence[Question]) -> int:
    """Where answers are cut: the longest reference in tokens and a margin, at most MOST_NEW_TOKENS."""
    if not questions:
        return _ANSWER_MARGIN
    texts = [question.reference + calls_text(question.calls) for question in questions]
    ids = chat.tokenizer(texts, add_special_tokens=False)["input_ids"]
    return min(MOST_NEW_TOKENS, max(map(len, ids)) + _ANSWER_MARGIN)


def _stopped(side: _Side) -> float:
    return sum(answer.stopped for answer in side.answers.values()) / len(side.answers)


def _sample(question: Question, sides: dict[str, _Side], place: int) -> Sample:
    base, adapter = (sides[name].answers[place].text for name in ("base", "adapter"))
    return Sample(prompt=readable(question.messages), reference=question.shown_reference, base=base, adapter=adapter)


def _stage(bar: Progress | None, name: str, total: int) -> Callable[[int], None] | None:
    """A counter for one stage of the work; none where there is nothing to do."""
    if not total or bar is None:
        return None
    task = bar.add_task(name, total=total)
    return lambda rows: bar.advance(task, rows)
