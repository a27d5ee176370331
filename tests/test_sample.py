"""The sample of a rehearsal: rows as they stand, the longest of them, some of every source, the same ones held out."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from training_kit import chat_of

from lora_tune.data.checking import Conversations, read_conversations
from lora_tune.data.conversation import Conversation
from lora_tune.data.pipeline import Prepared, encode
from lora_tune.data.sample import MOST_ROWS, Place, _write_tasks, held_out_places, training_places, write_rows
from lora_tune.errors import DataError
from lora_tune.recipe import DataSource, Eval, Limits, Train
from lora_tune.training.small_recipe import small_source

LOOSE = Limits(dropped_rows="100%", lost_tokens="100%", lost_end_tokens="100%")


def prepared(
    data: list[DataSource], base: Path, *, evaluation: Eval, length: int = 200
) -> tuple[Conversations, Prepared]:
    """The rows of some sources, as `run` reads and encodes them."""
    rows = read_conversations(data, hold_out=evaluation, seed=7)
    train = Train(max_length=length)
    return rows, encode(rows, chat_of(base), loss_on="assistant", train=train, limits=LOOSE, seed=7)


def said(conversation: Conversation) -> tuple[str, ...]:
    """The words of a conversation."""
    return tuple(message.content for message in conversation.messages)


def questions(count: int, *, name: str) -> list[dict[str, Any]]:
    """Rows whose lengths go up and down; the 11th is by far the longest."""
    rows = [{"prompt": f"{name} {i} " + "x" * (i * 37 % 60), "completion": f"{i}"} for i in range(count)]
    if count > 10:
        rows[10]["prompt"] += "y" * 120
    return rows


def write(rows: list[dict[str, Any]], path: Path) -> Path:
    """The rows in the format that the name of the file says."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist([row | {"score": float("nan")} for row in rows]), path)
    else:
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([list(row.values()) for row in rows])
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".csv"])
def test_sampled_rows_are_read_as_the_real_ones(suffix: str, tmp_path: Path, tiny_base: Path) -> None:
    columns = {"prompt": "1", "completion": "2"} if suffix == ".csv" else None
    kind = "table" if suffix == ".csv" else "auto"
    path = write(questions(60, name="a"), tmp_path / f"rows{suffix}")
    data = [DataSource(source=str(path), format=kind, columns=columns)]  # type: ignore[arg-type]
    rows, real = prepared(data, tiny_base, evaluation=Eval(hold_out="10%"))
    trained = training_places(real.documents, sources=1, most_tokens=600, row_tokens=200)
    apart = held_out_places(real.held_out, rows=3)
    assert len(apart) == 3 and 3 < len(trained) <= MOST_ROWS
    small = [small_source(data[0], write_rows(data[0], [*trained, *apart], tmp_path / "sample.jsonl"))]
    again, few = prepared(small, tiny_base, evaluation=Eval(hold_out=3))
    assert {said(one) for one in again.train} < {said(one) for one in rows.train}
    assert {said(one) for one in again.held_out} < {said(one) for one in rows.held_out}
    assert few.documents.lengths.max() == real.documents.lengths.max()


def test_every_source_is_there_and_the_longest_row_of_all(tmp_path: Path, tiny_base: Path) -> None:
    paths = [write(questions(count, name="abc"[n]), tmp_path / f"{n}.jsonl") for n, count in enumerate((9, 400, 1))]
    data = [DataSource(source=str(path)) for path in paths]
    _, real = prepared(data, tiny_base, evaluation=Eval(hold_out=0))
    places = training_places(real.documents, sources=3, most_tokens=10_000, row_tokens=200)
    assert places == training_places(real.documents, sources=3, most_tokens=10_000, row_tokens=200)
    assert {place.source for place in places} == {0, 1, 2} and len(places) == MOST_ROWS
    assert any((place.source, place.line) == (1, 11) for place in places)
    few = training_places(real.documents, sources=3, most_tokens=1, row_tokens=200)
    assert len(few) == 4, "the longest row and one of every source, whatever they cost"


def test_held_out_rows_are_taken_from_every_source_in_turn(tmp_path: Path, tiny_base: Path) -> None:
    paths = [write(questions(30, name="ab"[n]), tmp_path / f"{n}.jsonl") for n in range(2)]
    data = [DataSource(source=str(path), task=f"task {n}") for n, path in enumerate(paths)]
    _, real = prepared(data, tiny_base, evaluation=Eval(hold_out="20%", hold_out_tasks=("task 1",)))
    places = held_out_places(real.held_out, rows=4)
    assert [place.source for place in places].count(0) == [place.source for place in places].count(1) == 2
    assert held_out_places((), rows=4) == []


def test_task_files_stay_task_files(corpus: Path, tmp_path: Path, tiny_base: Path) -> None:
    folder = corpus / "data" / "datasets" / "natural_instructions"
    files = [next(path for path in [one, *one.rglob("*.json")] if path.is_file()) for one in sorted(folder.iterdir())]
    (tmp_path / "tasks").mkdir()
    for file in files[:3]:
        (tmp_path / "tasks" / file.name).write_bytes(file.read_bytes())
    data = [DataSource(source=str(tmp_path / "tasks"), format="sni", shots=1)]
    rows, real = prepared(data, tiny_base, evaluation=Eval(hold_out=3), length=2000)
    trained = training_places(real.documents, sources=1, most_tokens=6000, row_tokens=2000)
    apart = held_out_places(real.held_out, rows=3)
    small = [small_source(data[0], write_rows(data[0], [*trained, *apart], tmp_path / "sample.jsonl"))]
    again, _ = prepared(small, tiny_base, evaluation=Eval(hold_out=3), length=2000)
    assert {said(one) for one in (*again.train, *again.held_out)} <= {
        said(one) for one in (*rows.train, *rows.held_out)
    }
    assert len(again.train) == len(trained)


def test_rows_of_tasks_from_a_table_become_task_files(tmp_path: Path) -> None:
    rows = [
        {"task_name": f"task{n}_a/b", "definition": "Do it.", "inputs": f"in {n}", "targets": "out"} for n in (1, 2)
    ]
    fields = {"task": "task_name", "definition": "definition", "input": "inputs", "output": "targets"}
    folder = _write_tasks(rows, {**fields, "examples": "examples", "category": "category"}, tmp_path / "tasks")
    source = DataSource(source=str(folder), format="sni")
    found = read_conversations([source], hold_out=0, seed=1)
    assert [said(one)[1] for one in found.train] == ["out", "out"]
    from_hub = DataSource(source="owner/rows", format="sni", columns={"input": "inputs"}, shots=2)
    assert small_source(from_hub, folder).shots == 0 and small_source(from_hub, folder).columns is None


def test_data_that_changed_meanwhile_is_refused(tmp_path: Path) -> None:
    path = write(questions(5, name="a"), tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match="not there any more"):
        write_rows(DataSource(source=str(path)), [Place(0, str(path), 99)], tmp_path / "sample.jsonl")
