"""Base against adapter: exact losses, the same rows on both sides, and no trace left in the model."""

from __future__ import annotations

import io
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from lora_tune.data.chat_template import ChatTemplate, TokenRow, load_chat_template
from lora_tune.data.conversation import Conversation, Message
from lora_tune.errors import DataError
from lora_tune.evaluation import losses, report
from lora_tune.evaluation.evaluate import adapter_scores, compare, sample_answers
from lora_tune.evaluation.losses import RowLoss, mean_loss, row_losses
from lora_tune.evaluation.metrics import METRICS
from lora_tune.evaluation.questions import as_question, choose, readable
from lora_tune.evaluation.scores import Sample, Score
from lora_tune.model.base import load_base
from lora_tune.model.methods import attach
from lora_tune.model.source import find_base
from lora_tune.recipe import Base, Eval, Lora

ALL = ("loss", "exact_match", "rouge_l")


@pytest.fixture(scope="module")
def chat(tiny_base: Path) -> ChatTemplate:
    return load_chat_template(AutoTokenizer.from_pretrained(tiny_base))


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)


def peft_model(folder: Path, *, quantize: str = "none", dtype: str = "float32") -> torch.nn.Module:
    """A base with an adapter that changes its answers."""
    base = Base(name=str(folder), quantize=quantize, compute_dtype=dtype)
    source = find_base(base)
    adapted = attach(load_base(source, base), Lora(rank=4), source=source, base=base, seed=1)
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    return adapted


def token_rows(count: int, *, longest: int = 70, seed: int = 0) -> list[TokenRow]:
    """Random rows with masks in one piece, in several, everywhere, and at the first token."""
    generator = np.random.default_rng(seed)
    rows = []
    for line in range(count):
        length = int(generator.integers(2, longest))
        mask = [np.arange(length) >= length // 2, generator.random(length) < 0.4, np.ones(length, bool)][line % 3]
        ids = generator.integers(4, 260, length).astype(np.int32)
        rows.append(TokenRow(ids, np.asarray(mask, bool), source=0, file="rows", line=line, notes=frozenset()))
    return rows


def conversations(count: int) -> list[Conversation]:
    generator = random.Random(3)
    rows = []
    for line in range(1, count + 1):
        words = ["word" + str(generator.randrange(1000)) for _ in range(generator.randint(1, 4))]
        turns = (Message("user", "say " + " ".join(words)), Message("assistant", " ".join(words)))
        rows.append(Conversation(turns, source=0, file="rows.jsonl", line=line))
    return rows


def encoded(chat: ChatTemplate, rows: list[Conversation]) -> list[TokenRow]:
    return [row for drafts in chat.rows(rows, loss_on="assistant") for row in drafts]


def plain_loss(model: PreTrainedModel, row: TokenRow) -> RowLoss:
    """The loss of a row by the definition: one forward pass of this row alone, all logits, float64."""
    ids = torch.as_tensor(row.input_ids.astype(np.int64))[None]
    with torch.no_grad():
        logits = model(ids).logits[0].double()
    wanted = [place for place in range(1, ids.shape[1]) if row.mask[place]]
    picked = (
        torch.log_softmax(logits, -1)[[place - 1 for place in wanted], ids[0, wanted]] if wanted else torch.zeros(0)
    )
    return RowLoss(float(-picked.sum()), len(wanted))


@pytest.mark.parametrize("batch_tokens", [1, 100, 8192])
@pytest.mark.parametrize("logit_bytes", [2**10, 2**29, None])
def test_losses_equal_those_of_single_rows(
    model: PreTrainedModel, batch_tokens: int, logit_bytes: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all logits of a batch at once, of many rows or few, and tile by tile (None)."""
    if logit_bytes:
        monkeypatch.setattr(losses, "_LOGIT_BYTES", logit_bytes)
        monkeypatch.setattr(losses, "find_head", lambda base, kernels: None)
    rows = token_rows(30)
    expected = [plain_loss(model.eval(), row) for row in rows]
    found = row_losses(model, rows, pad_id=0, batch_tokens=batch_tokens)
    assert [row.tokens for row in found] == [row.tokens for row in expected]
    for mine, right in zip(found, expected, strict=True):
        assert mine.nll / max(1, mine.tokens) == pytest.approx(right.nll / max(1, right.tokens), abs=1e-6)
    assert mean_loss(found) == pytest.approx(sum(r.nll for r in expected) / sum(r.tokens for r in expected), abs=1e-6)


def test_the_token_that_pads_changes_nothing(model: PreTrainedModel) -> None:
    rows = token_rows(8)
    assert [row.nll for row in row_losses(model, rows, pad_id=0)] == pytest.approx(
        [row.nll for row in row_losses(model, rows, pad_id=77)], abs=1e-9
    )


def test_a_batch_that_is_too_large_is_halved_and_a_row_that_is_too_large_is_an_error(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = token_rows(9)
    expected = row_losses(model, rows, pad_id=0)
    forward = model.forward
    room = {"rows": 3}

    def full(*args, **kwargs):
        if len(kwargs["input_ids"]) > room["rows"]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", full)
    done: list[int] = []
    found = row_losses(model, rows, pad_id=0, progress=done.append)
    assert [row.nll for row in found] == pytest.approx([row.nll for row in expected], abs=1e-5)
    assert sum(done) == 9 and max(done) <= 3
    room["rows"] = 0
    with pytest.raises(torch.OutOfMemoryError):
        row_losses(model, rows, pad_id=0)


def test_a_row_without_answer_tokens_counts_none(model: PreTrainedModel) -> None:
    row = TokenRow(np.arange(5, dtype=np.int32), np.array([True, False, False, False, False]), 0, "a", 1, frozenset())
    assert row_losses(model, [row], pad_id=0) == [RowLoss(0.0, 0)]
    with pytest.raises(ValueError, match="no answer tokens"):
        mean_loss([RowLoss(0.0, 0)])


def test_comparing_gives_what_each_side_gives_alone(tiny_base: Path, chat: ChatTemplate) -> None:
    adapted = peft_model(tiny_base)
    rows = conversations(12)
    tokens = encoded(chat, rows)
    found = compare(adapted, chat, (rows, tokens), metrics=ALL, evaluation=Eval(samples=3), seed=1)
    assert set(found.scores) == set(ALL) and all(score.rows == 12 for score in found.scores.values())
    loss = found.scores["loss"]
    assert loss.adapter == pytest.approx(mean_loss(row_losses(adapted, tokens, pad_id=chat.pad_id)), abs=1e-9)
    base = Base(name=str(tiny_base), quantize="none", compute_dtype="float32")
    alone = load_base(find_base(base), base)
    assert loss.base == pytest.approx(mean_loss(row_losses(alone, tokens, pad_id=chat.pad_id)), abs=1e-6)
    assert loss.base != loss.adapter and loss.low < loss.adapter - loss.base < loss.high
    assert len(found.samples) == 3 and len({sample.prompt for sample in found.samples}) == 3
    for sample in found.samples:
        assert sample.prompt == "say " + sample.reference and sample.base != sample.adapter
    assert found.max_new_tokens == 16 + max(len(row.messages[-1].content) for row in rows)
    shown = sample_answers(adapted, chat=chat, conversations=rows, evaluation=Eval(samples=3), seed=1)
    assert shown == [(sample.prompt, sample.adapter) for sample in found.samples], (
        "the same rows as the last comparison"
    )
    again = compare(adapted, chat, (rows, tokens), metrics=ALL, evaluation=Eval(samples=3), seed=1)
    assert again == found
    during = adapter_scores(
        adapted, chat=chat, held_out=(rows, tokens), metrics=ALL, evaluation=Eval(samples=3), seed=1
    )
    assert during == {name: score.adapter for name, score in found.scores.items()}


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_comparing_in_mid_training_changes_no_gradient_and_no_random_number(
    tiny_base: Path, chat: ChatTemplate, quantize: str
) -> None:
    rows = conversations(4)
    tokens = encoded(chat, rows)

    def gradients(*, evaluate: bool) -> tuple[list[torch.Tensor], torch.Tensor]:
        adapted = peft_model(tiny_base, quantize=quantize, dtype="bfloat16" if quantize == "nf4" else "float32")
        adapted.train()
        torch.manual_seed(11)
        ids = torch.as_tensor(tokens[0].input_ids.astype(np.int64))[None]
        for turn in range(2):
            if evaluate and turn == 1:
                compare(adapted, chat, (rows, tokens), metrics=ALL, evaluation=Eval(samples=1), seed=1)
                adapter_scores(
                    adapted, chat=chat, held_out=(rows, tokens), metrics=ALL, evaluation=Eval(samples=1), seed=1
                )
                assert all(module.training for module in adapted.modules())
            adapted(input_ids=ids, labels=ids).loss.backward()
        return [p.grad for p in adapted.parameters() if p.requires_grad], torch.rand(3)

    plain, evaluated = gradients(evaluate=False), gradients(evaluate=True)
    assert all(torch.equal(one, two) for one, two in zip(plain[0], evaluated[0], strict=True))
    assert torch.equal(plain[1], evaluated[1])


def test_a_cap_on_rows_takes_the_same_rows_whatever_their_order() -> None:
    rows = conversations(40)
    chosen = choose(rows, 10, seed=5)
    assert len(chosen) == 10 and chosen == sorted(chosen)
    order = random.Random(1).sample(range(40), 40)
    assert {order[place] for place in choose([rows[place] for place in order], 10, seed=5)} == set(chosen)
    assert set(choose(rows, 10, seed=6)) != set(chosen)
    assert choose(rows, None, seed=5) == list(range(40)) == choose(rows, 99, seed=5)


def test_a_cap_on_rows_holds_for_all_metrics(model: PreTrainedModel, tiny_base: Path, chat: ChatTemplate) -> None:
    rows = conversations(9)
    found = compare(
        peft_model(tiny_base),
        chat,
        (rows, encoded(chat, rows)),
        metrics=ALL,
        evaluation=Eval(max_rows=4, samples=9),
        seed=1,
    )
    assert {score.rows for score in found.scores.values()} == {4} and len(found.samples) == 4


def test_without_metrics_of_answers_only_the_samples_are_answered(tiny_base: Path, chat: ChatTemplate) -> None:
    rows = conversations(5)
    adapted = peft_model(tiny_base)
    found = compare(adapted, chat, (rows, encoded(chat, rows)), metrics=("loss",), evaluation=Eval(samples=0), seed=1)
    assert found.samples == () and found.max_new_tokens is None and set(found.scores) == {"loss"}
    found = compare(adapted, chat, (rows, []), metrics=(), evaluation=Eval(samples=2), seed=1)
    assert len(found.samples) == 2 and found.scores == {}


def test_questions_end_before_the_last_answer() -> None:
    system, user = Message("system", "be short"), Message("user", "hi")
    turns = (system, user, Message("assistant", "one"), Message("user", "more"), Message("assistant", "two"))
    question = as_question(Conversation(turns), seed=0)
    assert question and question.messages == turns[:4] and question.reference == "two"
    assert readable(question.messages) == "system: be short\nuser: hi\nassistant: one\nuser: more"
    after = (user, Message("assistant", "yes"), Message("user", "thanks"))
    question = as_question(Conversation(after), seed=0)
    assert question and question.messages == (user,) and question.reference == "yes"
    call = ({"type": "function", "function": {"name": "f", "arguments": {}}},)
    question = as_question(Conversation((user, Message("assistant", "", tool_calls=call))), seed=0)
    assert question and not question.reference and question.shown_reference == '{"name": "f", "arguments": {}}'
    assert as_question(Conversation((user, Message("assistant", " "))), seed=0) is None
    assert as_question(Conversation(text="plain"), seed=0) is None
    assert as_question(Conversation((Message("assistant", "first"),)), seed=0) is None


@pytest.mark.parametrize(("metrics", "named"), [(("loss",), "loss"), (("rouge_l", "exact_match"), "rouge_l")])
def test_metrics_without_rows_are_errors_and_not_zeros(
    tiny_base: Path, chat: ChatTemplate, metrics: tuple[str, ...], named: str
) -> None:
    with pytest.raises(DataError, match=f"{named} does not fit the data") as caught:
        compare(
            peft_model(tiny_base), chat, ([Conversation(text="plain")], []), metrics=metrics, evaluation=Eval(), seed=1
        )
    assert caught.value.exit_code == 3 and len(caught.value.problems) == len(metrics)


SCORES = {
    "loss": Score(base=3.0, adapter=1.0, low=-2.2, high=-1.8, p_value=0.001, rows=10, direction="lower"),
    "exact_match": Score(base=0.5, adapter=0.4, low=-0.2, high=-0.01, p_value=0.04, rows=10, direction="higher"),
    "rouge_l": Score(base=0.5, adapter=0.51, low=-0.1, high=0.12, p_value=0.8, rows=10, direction="higher"),
}


def test_a_difference_is_better_worse_or_the_same_by_its_interval() -> None:
    assert {name: report.verdict(score) for name, score in SCORES.items()} == {
        "loss": "better",
        "exact_match": "worse",
        "rouge_l": "same",
    }


def test_the_report_shows_numbers_and_samples_and_sends_no_control_characters(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from rich.console import Console

    sample = Sample("[red]why[/red]?", "because", "\x1b[2Jbase", "<b>adapter</b>\n# no heading")
    console = Console(width=100, force_terminal=False)
    console.print(report.scores_table(SCORES))
    console.print(report.samples_table((sample,)))
    shown = capsys.readouterr().out
    for words in ("loss ↓", "exact_match ↑", "3.0000", "-2.0000", "-2.2000 … -1.8000", "[red]why[/red]?", "because"):
        assert words in shown
    assert "\x1b" not in shown


def test_no_number_is_cut_off_in_a_terminal_of_80_columns() -> None:
    from rich.console import Console

    wide = Score(base=10.4387, adapter=0.0612, low=-12.04, high=-9.07, p_value=0.0001, rows=600, direction="lower")
    lift = Score(base=0.0, adapter=0.945, low=0.9267, high=0.9617, p_value=4e-171, rows=12_000, direction="higher")
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(report.scores_table({**dict.fromkeys(METRICS, lift), "loss": wide}))
    shown = console.export_text()
    assert all(f"{name} ↑" in shown for name in METRICS if name != "loss")
    assert all(words in shown for words in ("adapter", " rows", "10.44", "-12.04 … -9.07", "600"))
    for words in ("0.9450", "+0.9450", "+0.9267 … +0.9617", "<0.001", "12000"):
        assert shown.count(words) >= len(METRICS) - 1, words
    assert shown.count("…") == len(METRICS)  # of the intervals


def test_few_rows_are_called_few() -> None:
    from rich.console import Console

    console = Console(width=200, record=True, file=io.StringIO())
    console.print(report.scores_table({"loss": SCORES["loss"]}))
    assert "fewer than 30 rows" in console.export_text()
    many = Score(base=3.0, adapter=1.0, low=-2.2, high=-1.8, p_value=0.001, rows=30, direction="lower")
    console.print(report.scores_table({"loss": many}))
    assert "fewer than" not in console.export_text()
