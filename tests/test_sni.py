"""Tasks of Super-NaturalInstructions: the published files, several right answers, examples, and what is refused."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from lora_tune.data.checking import Conversations, read_conversations
from lora_tune.errors import LoraTuneError
from lora_tune.evaluation.metrics import METRICS
from lora_tune.recipe import DataSource

TASK: dict[str, Any] = {
    "Categories": ["Sentiment Analysis"],
    "Definition": ["Say whether it is good."],
    "Positive Examples": [
        {"input": "Great.", "output": "yes", "explanation": "x"},
        {"input": "Awful.", "output": ["no", "bad"], "explanation": "x"},
        {"input": "Fine.", "output": "yes", "explanation": "x"},
    ],
    "Negative Examples": [],
    "Instances": [
        {"id": "1", "input": "Nice.", "output": ["yes", "good"]},
        {"id": "2", "input": "Great.", "output": "yes"},
    ],
}


def read(path: Path, **keys: Any) -> Conversations:
    """The conversations of one source of task files."""
    found = read_conversations([DataSource(source=str(path), format="sni", **keys)], hold_out=0, seed=1)
    assert found.ledger.balances()
    return found


def write(folder: Path, task: Any, name: str = "task7_x.json", *, indent: int | None = 1) -> Path:
    path = folder / name
    path.write_text(task if isinstance(task, str) else json.dumps(task, indent=indent), encoding="utf-8")
    return path


def test_definition_examples_and_all_right_answers(tmp_path: Path) -> None:
    first, second = read(write(tmp_path, TASK), shots=2).train
    assert first.messages[0].content == (
        "Definition: Say whether it is good.\n\n"
        "Positive Example 1\nInput: Great.\nOutput: yes\n\n"
        "Positive Example 2\nInput: Awful.\nOutput: no\n\n"
        "Now complete the following example.\nInput: Nice.\nOutput:"
    )
    assert (first.messages[1].content, first.references) == ("yes", ("good",))
    assert (first.task, first.template) == ("Sentiment Analysis", "task7_x")
    assert "Great.\nOutput: yes" not in second.messages[0].content  # an example that is the row itself is left out
    assert second.messages[0].content.count("Positive Example") == 2


@pytest.mark.parametrize("indent", [None, 1, 4])
def test_lines_are_those_of_the_instances(tmp_path: Path, indent: int | None) -> None:
    path = write(tmp_path, {"Instances": TASK["Instances"], **TASK}, indent=indent)
    lines = path.read_text().splitlines()
    for row in read(path).train:
        near = "".join(lines[row.line - 1 : row.line + 3])
        assert row.messages[0].content.rpartition("Input: ")[2].partition("\n")[0] in near


def test_without_examples_and_with_a_task_of_ones_own(tmp_path: Path) -> None:
    (row, _) = read(write(tmp_path, TASK), task="mine").train
    assert row.messages[0].content.startswith("Definition: ") and "Example 1" not in row.messages[0].content
    assert (row.task, row.template) == ("mine", "task7_x")


def test_packed_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "t.json.gz").write_bytes(gzip.compress(json.dumps(TASK).encode()))
    assert len(read(tmp_path / "t.json.gz").train) == 2


BAD = [
    ({**TASK, "Definition": []}, 0, "t.json:1: `Definition` must be text or a list of texts, got a list"),
    ({k: v for k, v in TASK.items() if k != "Instances"}, 0, "`Instances` is missing, got `Categories`"),
    (TASK, 4, "the task has 3 positive examples, but shots is 4; lower data[].shots"),
    ({**TASK, "Instances": [{"input": "x", "output": []}]}, 0, "`output` must be text or a list of texts"),
    ({**TASK, "Instances": [{"input": "x", "output": [" "]}]}, 0, "`output` is empty"),
    ({**TASK, "Instances": [{"output": "x"}]}, 0, "`input` is missing"),
    ({**TASK, "Instances": ["x"]}, 0, "an instance must be an object, got text"),
    (json.dumps(TASK, indent=1).replace('"id": "2",', '"id": "2"'), 0, "not JSON at line"),
    (json.dumps(TASK)[:-20], 0, "not JSON at line 1"),
    ("[1]", 0, "not JSON at line 1"),
    ({**TASK, "Instances": []}, 0, "no rows"),
]


@pytest.mark.parametrize(("task", "shots", "expected"), BAD, ids=[expected[:40] for _, _, expected in BAD])
def test_what_a_task_file_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: Any, shots: int, expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, task, "t.json")
    with pytest.raises(LoraTuneError) as caught:
        read(Path("t.json"), shots=shots)
    assert caught.value.exit_code == 3 and len(caught.value.problems) == 1
    assert expected in str(caught.value)


def test_auto_says_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(LoraTuneError, match="Super-NaturalInstructions task file; say `format: sni`"):
        read_conversations([DataSource(source=str(write(tmp_path, TASK)))], hold_out=0, seed=1)


def test_other_formats_do_not_know_its_columns(tmp_path: Path) -> None:
    row = {"instruction": "a", "output": "b", "category": "c", "task": "d", "examples": []}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    found = read_conversations([DataSource(source=str(tmp_path / "rows.jsonl"))], hold_out=0, seed=1)
    assert found.ledger.sources[0].format == "alpaca" and not found.ledger.warnings()


def test_the_published_files_are_read_whole(corpus: Path) -> None:
    files = sorted((corpus / "data" / "datasets" / "natural_instructions").rglob("*.json"))
    assert len(files) >= 20
    several = 0
    for path in files:
        task = json.loads(path.read_text())
        found = read(path, shots=2)
        assert found.ledger.sources[0].read == len(task["Instances"]) == len(found.train)
        assert {row.template for row in found.train} == {path.parent.name}
        for row, instance in zip(found.train, task["Instances"], strict=True):
            given = instance["output"] if isinstance(instance["output"], list) else [instance["output"]]
            right = (row.messages[1].content, *row.references)
            assert right == tuple(dict.fromkeys(answer.strip() for answer in given))
            several += len(right) > 1
    assert several > 20


def test_rouge_l_counts_the_best_reference() -> None:
    from lora_tune.evaluation.metrics import Answered
    from lora_tune.evaluation.questions import Question

    question = Question((), (), "a cat sat", "0", others=("the dog ran home",))
    scored = METRICS["rouge_l"].over_answers([Answered(question, "the dog ran home", True)])
    assert scored.score() == pytest.approx(1.0)
