"""Tasks of lm-evaluation-harness on a real adapter: a local YAML task, offline, base and adapter from one model."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import finished
import numpy as np
import pytest
import torch

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::PendingDeprecationWarning"
)

from lora_tune.adapter.at_hand import chat_of_folder  # noqa: E402
from lora_tune.cli import main  # noqa: E402
from lora_tune.errors import DataError, UsageError  # noqa: E402
from lora_tune.evaluation.harness import Asked, compare_on_tasks, find_tasks  # noqa: E402
from lora_tune.evaluation.losses import row_losses  # noqa: E402

CHOICE = """\
task: colours
dataset_path: json
dataset_kwargs: {data_files: {test: colours.jsonl, train: colours.jsonl}}
test_split: test
fewshot_split: train
num_fewshot: 1
output_type: multiple_choice
doc_to_text: "{{ question }}"
doc_to_target: "{{ answer }}"
doc_to_choice: "{{ choices }}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
WRITE = """\
task: echo
dataset_path: json
dataset_kwargs: {data_files: {test: colours.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{ question }}"
doc_to_target: "{{ choices[answer] }}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> tuple[Path, Any]:
    """A folder with an adapter, its base and two tasks; and the model."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "base").symlink_to(tiny_base)
    model = finished.write_finished(folder / "adapter", folder / "base")
    (folder / "choice.yaml").write_text(CHOICE)
    (folder / "write.yaml").write_text(WRITE)
    rows = [{"question": f"Colour {n}?", "choices": ["red", "green", "blue"], "answer": n % 3} for n in range(7)]
    (folder / "colours.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder, model


def test_local_tasks_score_base_and_adapter_and_leave_no_trace(place: tuple[Path, Any]) -> None:
    folder, model = place
    chat = chat_of_folder(folder / "adapter")
    tasks = find_tasks([str(folder / "choice.yaml"), str(folder / "write.yaml")])
    own, before = model.get_base_model().generation_config, model.get_input_embeddings().weight.shape
    states = (torch.get_rng_state(), random.getstate(), str(np.random.get_state()))
    model.train()
    found, notes = compare_on_tasks(model, chat, tasks, Asked(seed=3))
    assert all(module.training for module in model.modules())
    model.eval()
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), str(np.random.get_state()))
    assert model.get_base_model().generation_config is own and model.get_input_embeddings().weight.shape == before
    assert set(found) == {"colours", "echo"} and notes == []
    score = found["colours"]["acc"]
    assert score.rows == 7 and score.direction == "higher" and score.low <= score.difference <= score.high
    assert compare_on_tasks(model, chat, tasks, Asked(seed=3))[0] == found, "the same seed, the same numbers"
    few, _ = compare_on_tasks(model, chat, tasks, Asked(seed=3, most_rows=4, prompting="plain"))
    assert few["colours"]["acc"].rows == 4


def test_a_choice_has_the_log_probability_that_we_compute(place: tuple[Path, Any], monkeypatch: Any) -> None:
    """The adapter's side is really the adapter: lm-eval's log-probabilities equal ours on the same tokens."""
    from lm_eval.models.huggingface import HFLM

    from lora_tune.data.chat_template import TokenRow

    folder, model = place
    chat = chat_of_folder(folder / "adapter")
    seen: list[tuple[list[Any], list[tuple[float, bool]]]] = []
    ask = HFLM._loglikelihood_tokens

    def watched(self: Any, requests: Any, *more: Any, **named: Any) -> Any:
        found = ask(self, requests, *more, **named)
        seen.append((list(requests), found))
        return found

    monkeypatch.setattr(HFLM, "_loglikelihood_tokens", watched)
    compare_on_tasks(model, chat, find_tasks([str(folder / "choice.yaml")]), Asked(seed=3, most_rows=2))
    assert len(seen) == 2, "the adapter, then the base"
    for (requests, found), on in zip(seen, (True, False), strict=True):
        for (_, context, continuation), (log_prob, _greedy) in zip(requests, found, strict=True):
            ids = np.array([*context, *continuation])
            row = TokenRow(ids, np.arange(len(ids)) >= len(context), 0, "", 1, frozenset())
            if on:
                (mine,) = row_losses(model, [row], pad_id=chat.pad_id)
            else:
                with model.disable_adapter():
                    (mine,) = row_losses(model, [row], pad_id=chat.pad_id)
            assert log_prob == pytest.approx(-mine.nll, abs=1e-4)


def test_the_command_asks_tasks_alone(place: tuple[Path, Any], capsys: pytest.CaptureFixture[str]) -> None:
    folder = place[0]
    command = ["eval", str(folder / "adapter"), "--base", str(folder / "base"), "--tasks", str(folder / "choice.yaml")]
    assert main([*command, "--at-least", "colours:acc=0", "--json", "eval.max_rows=3"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["metrics"] == {} and found["tasks"]["colours"]["acc"]["rows"] == 3
    assert main([*command, "--at-least", "colours:acc=1.5"]) == 1
    said = capsys.readouterr()
    assert "acc ↑" in said.out and "colours: acc: the adapter's score must be at least 1.5" in said.err
    assert "it/s" not in said.err and len(said.err.splitlines()) == 1, "no bars where stderr is no terminal"


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("code.yaml", "task: t\ndoc_to_text: !function utils.run\n", "names Python code"),
        ("include.yaml", "task: t\ninclude: other.yaml\n", "includes another file"),
        ("group.yaml", "group: g\n", "is no task"),
        ("broken.yaml", "task: [\n", "is no YAML"),
        (
            "reach.yaml",
            CHOICE.replace("{{ question }}", "{{ ''.__class__.__mro__[1].__subclasses__() }}"),
            "SecurityError",
        ),
        ("data.yaml", CHOICE.replace("colours.jsonl", "gone.jsonl"), "cannot be had"),
        ("metric.yaml", CHOICE.replace("metric: acc", "metric: no_such_metric"), "has no metric of lm-eval"),
    ],
)
def test_tasks_that_cannot_be_are_refused(place: tuple[Path, Any], name: str, text: str, line: str) -> None:
    folder, model = place
    path = folder / name
    path.write_text(text)
    with pytest.raises((UsageError, DataError)) as caught:
        tasks = find_tasks([str(path)])
        compare_on_tasks(model, chat_of_folder(folder / "adapter"), tasks, Asked(seed=1, most_rows=1))
    assert line in str(caught.value) and len(caught.value.problems) == 1


def test_names_are_looked_up_without_a_network() -> None:
    with pytest.raises(UsageError, match="did you mean gsm8k"):
        find_tasks(["gsm8kk"])
    with pytest.raises(UsageError, match="needs promptsource"):
        find_tasks(["t0_eval"])
    with pytest.raises(DataError, match="the data of task gsm8k cannot be had"):
        find_tasks(["gsm8k"])
