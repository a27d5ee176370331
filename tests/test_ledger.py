"""The ledger: every row and token read is accounted for; limits stop, warnings are said once."""

from __future__ import annotations

import json

import pytest

from lora_tune.data.ledger import DUPLICATE, LOST_END, NO_LABEL, TRUNCATED, Ledger, Packing, SourceLedger
from lora_tune.errors import DataError
from lora_tune.recipe import Limits


def ledger(**numbers):
    account = SourceLedger("data.jsonl", read=100, kept=100, tokens_read=1000, tokens_kept=1000, longest=300)
    for name, value in numbers.items():
        setattr(account, name, value)
    return Ledger([account])


def test_a_ledger_within_its_limits_passes():
    found = ledger(kept=99)
    found.sources[0].drop(NO_LABEL, "data.jsonl:5")
    assert found.balances()
    found.check(Limits())


def problems_of(found, **limits):
    with pytest.raises(DataError) as caught:
        found.check(Limits(**limits))
    return caught.value.problems


def test_dropped_rows_above_the_limit_stop_with_count_place_and_fix():
    found = ledger(kept=98)
    found.sources[0].drop(NO_LABEL, "data.jsonl:5", 2)
    (problem,) = problems_of(found)
    assert str(problem).startswith("data.jsonl:5: limits.dropped_rows: no label is left in 2 of 100 rows")
    assert "more than the limit of 1%" in problem.reason and "300 tokens" in problem.fix
    found.check(Limits(dropped_rows=2))
    found.check(Limits(dropped_rows="2%"))
    assert problems_of(found, dropped_rows=1) and problems_of(found, dropped_rows="1.99%")


def test_several_causes_are_named_together():
    found = ledger(kept=97)
    found.sources[0].drop("empty answer", "data.jsonl:5", 2)
    found.sources[0].drop("not JSON", "data.jsonl:9")
    (problem,) = problems_of(found)
    assert "empty answer in 2, not JSON in 1 of 100 rows" in problem.reason and "repair" in problem.fix


def test_lost_tokens_and_end_tokens_have_limits_of_their_own():
    found = ledger(tokens_kept=980, tokens_lost=20)
    found.sources[0].note(TRUNCATED, "data.jsonl:7")
    found.sources[0].note(LOST_END, "data.jsonl:7", 2)
    keys = [problem.key for problem in problems_of(found)]
    assert keys == ["limits.lost_tokens", "limits.lost_end_tokens"]
    found.check(Limits(lost_tokens="2%", lost_end_tokens=2))


def test_duplicates_are_warned_of_and_limited_only_if_asked():
    found = ledger()
    found.sources[0].note(DUPLICATE, "data.jsonl:2", 30)
    found.check(Limits())
    assert [str(warning) for warning in found.warnings()] == [
        "data.jsonl:2: 30 of 100 rows repeat an earlier row; remove repeated rows, or limit them: limits.duplicates"
    ]
    assert problems_of(found, duplicates="10%")[0].key == "limits.duplicates"


def test_nothing_left_to_train_on_stops_whatever_the_limits():
    assert "no row is left" in problems_of(ledger(kept=0, held_out=100), dropped_rows="100%")[0].reason


def test_an_account_that_does_not_add_up_is_seen():
    assert not ledger(kept=99).balances()
    assert not ledger(tokens_kept=999).balances()


def test_json_and_table_hold_the_account_without_paths():
    found = ledger(kept=98, held_out=1, epoch_rows=196, token_rows=98)
    found.sources[0].drop("empty answer", "data.jsonl:5")
    found.sources.append(SourceLedger("more.csv", read=10, kept=10, tokens_read=50, tokens_kept=50))
    found.packing = Packing(sequences=4, documents=10, tokens=300, max_length=100)
    facts = json.loads(json.dumps(found.as_json()))
    assert facts["total"]["read"] == 110 and facts["packing"]["efficiency"] == 0.75
    assert facts["sources"][0]["rows"]["dropped"] == {"empty answer": {"rows": 1, "first": "data.jsonl:5"}}
    table = {row[0].strip(): row[1:] for row in found.table()}
    assert table["rows read"] == ("100", "10", "110") and table["dropped: empty answer"] == ("1", "0", "1")
    assert "lost (cut off)" not in table
