"""Mixtures of tasks: which template a row gets, solved examples, options, held-out tasks, leaks, shares of an epoch."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_tune.data.checking import Conversations, read_conversations
from lora_tune.data.conversation import Conversation
from lora_tune.data.split import mixing_weights
from lora_tune.errors import LoraTuneError
from lora_tune.recipe import DataSource, Eval, Mixing

PROMPTS = """\
templates:
  1: {name: plain, jinja: "Q: {{q}} ||| {{answer_choices[label]}}", answer_choices: "no ||| yes"}
  2: {name: listed, jinja: "{{q}} no or yes? ||| {{answer_choices[label]}}", answer_choices: "no ||| yes",
      metadata: {choices_in_prompt: true}}
  3: {name: only yes, jinja: "{% if label == 1 %}Make me say yes. ||| {{q}}{% endif %}"}
"""


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prompts.yaml").write_text(PROMPTS)


def rows(count: int, *, about: str = "the thing with the number", **more: Any) -> list[dict[str, Any]]:
    """Rows with a question of their own and a label."""
    return [{"q": f"Is {about} {n} such a thing?", "label": n % 2, "n": n, **more} for n in range(count)]


def write(name: str, content: Iterable[dict[str, Any]]) -> str:
    """A JSONL file in the working folder."""
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in content))
    return name


def source(name: str = "a.jsonl", count: int = 40, **keys: Any) -> DataSource:
    """A source of rows with prompts."""
    if not Path(name).exists():
        write(name, rows(count, about=f"{name} of number"))
    return DataSource(source=name, prompts="prompts.yaml", **keys)


def read(*data: DataSource, hold_out: int | str = 0, seed: int = 1, **evaluation: Any) -> Conversations:
    """The conversations of some sources, with a ledger that balances."""
    found = read_conversations(data, hold_out=Eval(hold_out=hold_out, **evaluation), seed=seed)
    assert found.ledger.balances()
    assert found.ledger.total("kept") == len(found.train) and found.ledger.total("held_out") == len(found.held_out)
    return found


def said(*data: DataSource, **keys: Any) -> str:
    """The refusal, one line a problem."""
    with pytest.raises(LoraTuneError) as caught:
        read(*data, **keys)
    assert len(str(caught.value).splitlines()) == len(caught.value.problems)
    return str(caught.value)


def question(conversation: Conversation) -> str:
    return conversation.messages[0].content


def answer(conversation: Conversation) -> str:
    return conversation.messages[1].content


def own_number(text: str) -> int:
    """The number in the last question of a text."""
    return int(text.rpartition("number ")[2].split()[0])


# --- which template ----------


def test_each_row_has_one_template_that_applies_chosen_by_the_seed() -> None:
    found = {seed: {row.line: row.template for row in read(source(), seed=seed).train} for seed in (1, 2)}
    assert found[1] == {row.line: row.template for row in read(source(), seed=1).train} != found[2]
    assert set(Counter(found[1].values())) == {"plain", "listed", "only yes"}
    assert all(line % 2 == 0 for line, template in found[1].items() if template == "only yes")


def test_a_template_less_moves_only_its_own_rows() -> None:
    every = {row.line: row.template for row in read(source()).train}
    two = {row.line: row.template for row in read(source(templates=("plain", "only yes"))).train}
    assert all(two[line] == template for line, template in every.items() if template != "listed")


def test_the_order_of_the_rows_changes_no_conversation() -> None:
    write("b.jsonl", rows(40, about="a.jsonl of number")[::-1])
    forward, backward = read(source(shots=1)), read(source("b.jsonl", shots=1))
    templates = [
        {own_number(question(r) + answer(r)): r.template for r in found.train} for found in (forward, backward)
    ]
    assert templates[0] == templates[1]


def test_rows_without_a_template_are_skipped_and_counted() -> None:
    write("a.jsonl", [*rows(9), {"q": "Is nothing said of this?", "label": 7, "n": 0}])
    found = read(source())
    assert len(found.train) == 9 and found.ledger.sources[0].skipped == 1
    assert ("  skipped: no template applies", "1") in found.ledger.table()


def test_more_skipped_than_kept_is_told() -> None:
    write("a.jsonl", [{"q": f"Is number {n} of any use?", "label": 7 * (n > 2), "n": n} for n in range(9)])
    found = read(source(templates=("plain",)))
    assert [str(warning) for warning in found.ledger.warnings()] == [
        "a.jsonl: 6 of 9 rows skipped: no template applies; check whether that is meant"
    ]


def test_choices_are_kept_only_with_the_answer_among_them() -> None:
    write("p.yaml", [])
    Path("p.yaml").write_text('templates: [{name: n, jinja: "{{q}} ||| maybe", answer_choices: "no ||| yes"}]')
    found = read(source().model_copy(update={"prompts": "p.yaml"}))
    assert {row.choices for row in found.train} == {()}
    assert found.ledger.sources[0].notes["the answer is none of the choices"].rows == 40
    assert {row.choices for row in read(source(templates=("plain",))).train} == {("no", "yes")}


# --- options, inversion, examples ----------


def test_options_stand_where_the_template_does_not_list_them() -> None:
    for row in read(source(options=True)).train:
        assert question(row).endswith("\n\nOPTIONS:\n- no\n- yes") == (row.template == "plain")


def test_a_share_is_turned_round() -> None:
    turned = [row for row in read(source(count=200, invert="25%")).train if row.template.endswith("(inverted)")]
    assert 25 <= len(turned) <= 75
    straight = {row.line: row for row in read(source(count=200)).train}
    for row in turned:
        before = straight[row.line]
        assert answer(row) == question(before) and question(row).startswith(answer(before) + "\n\n")
        assert not row.choices
    held_out = read(source(count=200, invert="100%"), hold_out=20).held_out
    assert not any(row.template.endswith("(inverted)") for row in held_out)


@pytest.mark.parametrize("shots", [1, 3])
def test_examples_come_from_training_rows_and_never_from_the_row(shots: int) -> None:
    found = read(source(shots=shots), hold_out=8)
    trained = {own_number(question(row) + answer(row)) for row in found.train}
    assert len(trained) == 32
    for row in (*found.train, *found.held_out):
        parts = question(row).split("\n\n")
        assert len(parts) == shots + 1
        asked = own_number(parts[-1] + answer(row))
        shown = [own_number(part) for part in parts[:-1]]
        assert asked not in shown and len(set(shown)) == shots and set(shown) <= trained


def test_copies_of_a_row_are_no_examples_for_it() -> None:
    write("a.jsonl", rows(2) * 5)
    found = read(source(shots=3, templates=("plain",)))
    assert all(question(row).count("number 0") < 2 or question(row).count("number 1") < 2 for row in found.train)
    for row in found.train:
        shown, asked = question(row).split("\n\n")[:-1], question(row).split("\n\n")[-1]
        assert asked not in "".join(shown)
    assert "fewer solved examples" not in found.ledger.sources[0].notes or len(found.train) == 10


def test_fewer_examples_than_wanted_are_noted() -> None:
    found = read(source(count=3, shots=5, templates=("plain",)))
    assert found.ledger.sources[0].notes["fewer solved examples than shots"].rows == 3


# --- held-out tasks ----------


def test_a_task_is_held_out_whole_and_asked_with_every_template() -> None:
    found = read(source(task="one"), source("b.jsonl", 10, task="two"), hold_out=4, hold_out_tasks=("two",))
    assert {row.task for row in found.train} == {"one"} and len(found.train) == 36
    asked = [row for row in found.held_out if row.task == "two"]
    assert len(asked) == 10 + 10 + 5 and len(found.held_out) == 4 + 25
    assert Counter(row.template for row in asked) == {"plain": 10, "listed": 10, "only yes": 5}
    account = found.ledger.sources[1]
    assert (account.read, account.kept, account.held_out, account.more) == (10, 0, 25, 15)


def test_at_most_max_rows_of_a_task_are_asked() -> None:
    found = read(source(task="one"), source("b.jsonl", 30, task="two"), max_rows=6, hold_out_tasks=("two",))
    assert len({row.line for row in found.held_out}) == 6 and found.ledger.sources[1].left_by_max_rows == 24


def test_the_template_of_plain_rows_is_their_file() -> None:
    write("ready.jsonl", [{"prompt": f"Say the number {n} to me", "completion": str(n)} for n in range(4)])
    ready = DataSource(source="ready.jsonl", task="numbers")
    found = read(source(task="one"), ready, hold_out_tasks=("numbers",))
    assert {(row.task, row.template) for row in found.held_out} == {("numbers", "ready")}


def test_templates_of_two_files_in_one_task_are_told_apart() -> None:
    Path("more.yaml").write_text(PROMPTS)
    other = source("b.jsonl", task="one").model_copy(update={"prompts": "more.yaml"})
    assert {row.template.partition(": ")[0] for row in read(source(task="one"), other).train} == {"prompts", "more"}


def test_a_row_of_a_held_out_task_that_is_trained_elsewhere_is_refused() -> None:
    text = "Is the thing with the number 3 such a thing?"
    write("b.jsonl", [{"Question": f"  {text.upper()} ", "id": 9, "label": 0}, *rows(3, about="another one, number")])
    columns = {"q": "Question"}
    write("b.jsonl", [{"Question": f" {text.upper()}", "id": 9, "label": 0}])
    write("a.jsonl", rows(20))
    apart = source("b.jsonl", task="two", columns=columns, templates=("plain",))
    assert said(source(task="one"), apart, hold_out_tasks=("two",)) == (
        "b.jsonl:1: 1 row of the held-out task in b.jsonl is trained in a.jsonl as well (first a.jsonl:4); "
        "hold that task out too, or remove the rows on one side"
    )
    write("b.jsonl", [{"Question": text.replace("3", "77"), "label": 0}])
    assert len(read(source(task="one"), apart, hold_out_tasks=("two",)).held_out) == 1


def test_both_sides_of_a_split_share_no_row_though_two_sources_read_it() -> None:
    found = read(source(), source(templates=("listed",)), hold_out="30%")
    numbers = [{own_number(question(row) + answer(row)) for row in side} for side in (found.train, found.held_out)]
    assert numbers[1] and not numbers[0] & numbers[1]


# --- bad input ----------


def test_a_template_that_fails_names_file_line_and_row() -> None:
    Path("prompts.yaml").write_text('templates:\n  1:\n    name: bad\n    jinja: "{{ 1 // label }} {{q}} ||| x"\n')
    assert said(source(count=6)) == (
        "prompts.yaml:4: template 'bad' fails on row a.jsonl:1 and 2 more rows: integer division or modulo by zero; "
        "repair the template or the row, or set on_bad_row: drop"
    )
    found = read(source(on_bad_row="drop"))
    assert len(found.train) == 3 and found.ledger.sources[0].dropped["template 'bad' fails"].rows == 3


def test_a_template_without_end_names_file_line_and_row() -> None:
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    Path("prompts.yaml").write_text(f'templates:\n  1: {{name: loop, jinja: "{{{{q}}}} {loop} ||| x"}}\n')
    assert said(source(count=6)).startswith(
        "prompts.yaml:2: template 'loop' is stopped at row a.jsonl:1: it does not end within 1 s of CPU time; "
    )


def test_other_refusals() -> None:
    write("empty.jsonl", [{"q": "Is it?", "label": 9}])
    write("half.jsonl", [{"q": "Is it?", "label": 1}, {"q": "Or not?"}])
    expected = {
        "reads `q`, which the data does not have; it has `text`": source(write("t.jsonl", [{"text": "x", "label": 1}])),
        "half.jsonl:2: `label` is missing, got `q`": source("half.jsonl"),
        "data.0.templates: no such template in prompts.yaml, got 'plan'; did you mean `plain`?": source(
            templates=("plan",)
        ),
        "data.0.options: no template of prompts.yaml has answer_choices that it does not list": source(
            templates=("listed",), options=True
        ),
        "no template applies to any row": source("empty.jsonl"),
    }
    for text, bad in expected.items():
        assert text in said(bad), text


# --- shares of an epoch ----------


@given(
    st.lists(st.integers(1, 10_000), min_size=1, max_size=6),
    st.integers(1, 5_000) | st.none(),
    st.floats(1, 50),
)
def test_shares_are_those_of_the_definition(counts: Sequence[int], cap: int | None, temperature: float) -> None:
    weights = mixing_weights(counts, Mixing(cap=cap, temperature=temperature))
    drawn = [weight * count for weight, count in zip(weights, counts, strict=True)]
    rates = [min(count, cap or math.inf) ** (1 / temperature) for count in counts]
    assert np.allclose(np.array(drawn) / sum(drawn), np.array(rates) / sum(rates))
    assert sum(drawn) == pytest.approx(sum(min(count, cap or math.inf) for count in counts))


def test_natural_shares_change_nothing() -> None:
    assert mixing_weights([7, 0, 93], Mixing()) == [1.0, 0.0, 1.0]
