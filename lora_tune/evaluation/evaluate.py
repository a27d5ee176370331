"""Base against adapter: one loaded model, adapter on and off, the same rows, the same decoding."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_tune.data.conversation import Conversation, Message
from lora_tune.errors import DataError, Problem
from lora_tune.evaluation.bootstrap import paired_interval, paired_p_value
from lora_tune.evaluation.losses import RowLoss, row_losses
from lora_tune.evaluation.metrics import METRICS, RowScores
from lora_tune.evaluation.scores import Comparison, Sample, Score
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
class Question:
    """A held-out conversation up to its last assistant turn, and the text of that turn."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...]
    reference: str
    rank: str  # seeded hash of the content: the order in which rows are chosen


@dataclass(frozen=True, slots=True)
class _Side:
    """What one side, adapter or base, did with the rows."""

    losses: list[RowLoss]
    answers: dict[int, Answer]  # by number of the question


def compare(
    model: PeftModel,
    chat: ChatTemplate,
    held_out: tuple[Sequence[Conversation], Sequence[TokenRow]],
    *,
    metrics: Sequence[str],
    evaluation: Eval,
    seed: int,
) -> Comparison:
    """Score and sample the adapter and its base on held-out rows.

    The model is loaded once: the adapter's side runs with it on, the base's side under `model.disable_adapter()`.
    Rows are the same on both sides: all held-out rows, or `evaluation.max_rows` of them chosen by content hash and
    seed. The loss is taken over the token rows, the other metrics over the last assistant turn of each conversation
    (plain text and turns without text have none). Answers are greedy and end at the longest reference + 16 tokens, at
    most at 512. The model is left in the mode in which it was, and no global random number is drawn.

    Raises DataError where a metric has no row to score.
    """
    rows = loss_rows(held_out, evaluation=evaluation, seed=seed) if "loss" in metrics else []
    questions = _questions(held_out[0], evaluation, seed)
    _require_rows(metrics, questions=len(questions), rows=len(rows))
    shown = _shown(questions, evaluation)
    by_answers = any(METRICS[name].reads == "answers" for name in metrics)
    asked = list(range(len(questions))) if by_answers else shown
    longest = _longest_answer(chat, [questions[place].reference for place in asked])
    prompts = _prompts(chat, [questions[place] for place in asked])

    sides: dict[str, _Side] = {}
    with progress_bar() as bar:
        for name, setting in (("adapter", nullcontext()), ("base", model.disable_adapter())):
            with setting:
                losses = row_losses(model, rows, pad_id=chat.pad_id, progress=_stage(bar, f"{name}: loss", len(rows)))
                reporting = _stage(bar, f"{name}: answers", len(asked))
                answers = generate(model, chat, prompts, max_new_tokens=longest, progress=reporting)
            sides[name] = _Side(losses, dict(zip(asked, answers, strict=True)))
    return Comparison(
        scores={name: _score(name, sides, questions, seed=seed) for name in metrics},
        samples=tuple(_sample(questions[place], sides, place) for place in shown),
        max_new_tokens=longest if asked else None,
        stopped={name: _stopped(side) for name, side in sides.items() if asked},
    )


def sample_answers(
    model: PreTrainedModel | PeftModel,
    *,
    chat: ChatTemplate,
    conversations: Sequence[Conversation],
    evaluation: Eval,
    seed: int,
) -> list[tuple[str, str]]:
    """Prompt and answer of the rows that `compare` shows as samples, from the model as it is now."""
    questions = _questions(conversations, evaluation, seed)
    asked = [questions[place] for place in _shown(questions, evaluation)]
    longest = _longest_answer(chat, [question.reference for question in asked])
    answers = generate(model, chat, _prompts(chat, asked), max_new_tokens=longest)
    return [(readable(question.messages), answer.text) for question, answer in zip(asked, answers, strict=True)]


def loss_rows(
    held_out: tuple[Sequence[Conversation], Sequence[TokenRow]], *, evaluation: Eval, seed: int
) -> list[TokenRow]:
    """Token rows over which the held-out loss is taken: of the chosen conversations, with a token to predict."""
    chosen = choose(held_out[0], evaluation.max_rows, seed=seed)
    places = {(row.source, row.file, row.line) for row in chosen}
    return [row for row in held_out[1] if (row.source, row.file, row.line) in places and row.mask[1:].any()]


def choose(conversations: Sequence[Conversation], most: int | None, *, seed: int) -> list[Conversation]:
    """At most `most` conversations, chosen by a seeded hash of their content and kept in their order.

    The same rows are chosen whatever the order of the data set is.
    """
    if most is None or most >= len(conversations):
        return list(conversations)
    ranked = sorted(range(len(conversations)), key=lambda place: (_rank(conversations[place], seed), place))
    return [conversations[place] for place in sorted(ranked[:most])]


def as_question(conversation: Conversation, *, seed: int) -> Question | None:
    """The conversation up to its last assistant turn; None for plain text and where that turn has no text."""
    turns = [place for place, message in enumerate(conversation.messages) if message.role == "assistant"]
    if not turns or not turns[-1] or not conversation.messages[turns[-1]].content.strip():
        return None
    last = turns[-1]
    reference = conversation.messages[last].content
    return Question(conversation.messages[:last], conversation.tools, reference, _rank(conversation, seed))


def readable(messages: Sequence[Message]) -> str:
    """A prompt as a person reads it: a single user message as it is, else one paragraph per turn with its role."""
    if len(messages) == 1 and messages[0].role == "user":
        return messages[0].content
    return "\n".join(f"{message.role}: {message.content}" for message in messages)


def _rank(conversation: Conversation, seed: int) -> str:
    turns = [message.as_template_input() for message in conversation.messages]
    content = json.dumps([seed, turns, conversation.text], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _questions(conversations: Sequence[Conversation], evaluation: Eval, seed: int) -> list[Question]:
    """The questions of the chosen conversations, in their order."""
    chosen = choose(conversations, evaluation.max_rows, seed=seed)
    return [question for question in (as_question(row, seed=seed) for row in chosen) if question]


def _shown(questions: Sequence[Question], evaluation: Eval) -> list[int]:
    """Numbers of the questions whose answers are shown."""
    return sorted(range(len(questions)), key=lambda place: questions[place].rank)[: evaluation.samples]


def _prompts(chat: ChatTemplate, questions: Sequence[Question]) -> list[list[int]]:
    return [chat.prompt_ids(question.messages, tools=question.tools) for question in questions]


def _require_rows(metrics: Sequence[str], *, questions: int, rows: int) -> None:
    """A metric over no rows is an error, never a zero."""
    fix = "hold out more rows (eval.hold_out) or take the metric away"
    problems = []
    for name in metrics:
        by_answers = METRICS[name].reads == "answers"
        lacking = "assistant turn with text" if by_answers else "answer token"
        if not (questions if by_answers else rows):
            reason = f"{name} has nothing to score: no held-out row has an {lacking}"
            problems.append(Problem(reason, fix, key="eval.metrics"))
    if problems:
        raise DataError(problems)


def _longest_answer(chat: ChatTemplate, references: Sequence[str]) -> int:
    """Where answers are cut: the longest reference in tokens and a margin, at most MOST_NEW_TOKENS."""
    if not references:
        return _ANSWER_MARGIN
    ids = chat.tokenizer(list(references), add_special_tokens=False)["input_ids"]
    return min(MOST_NEW_TOKENS, max(map(len, ids)) + _ANSWER_MARGIN)


def _stopped(side: _Side) -> float:
    return sum(answer.stopped for answer in side.answers.values()) / len(side.answers)


def _score(name: str, sides: dict[str, _Side], questions: Sequence[Question], *, seed: int) -> Score:
    """One metric on both sides with the interval of the difference."""
    metric = METRICS[name]
    found: dict[str, RowScores] = {}
    for side_name, side in sides.items():
        if metric.reads == "tokens":
            found[side_name] = metric.over_tokens([row.nll for row in side.losses], [row.tokens for row in side.losses])
        else:
            answers = [side.answers[place].text for place in range(len(questions))]
            found[side_name] = metric.over_answers(answers, [[question.reference] for question in questions])
    low, high = paired_interval(found["base"], found["adapter"], seed=seed)
    return Score(
        base=found["base"].mean(),
        adapter=found["adapter"].mean(),
        low=low,
        high=high,
        p_value=paired_p_value(found["base"], found["adapter"], seed=seed),
        rows=len(found["base"].values),
        direction=metric.direction,
    )


def _sample(question: Question, sides: dict[str, _Side], place: int) -> Sample:
    base, adapter = (sides[name].answers[place].text for name in ("base", "adapter"))
    return Sample(prompt=readable(question.messages), reference=question.reference, base=base, adapter=adapter)


def _stage(bar: Progress, name: str, total: int) -> Callable[[int], None] | None:
    """A counter for one stage of the work; none where there is nothing to do."""
    if not total:
        return None
    task = bar.add_task(name, total=total)
    return lambda rows: bar.advance(task, rows)
