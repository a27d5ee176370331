"""External benchmarks through lm-evaluation-harness (the extra `lm-eval`): base and adapter from one loaded model.

What it does by itself and what is kept from happening here: given an adapter's folder it resizes the embeddings of a
padded vocabulary and asks the adapter's repository for the base's revision (it gets the loaded model instead); it draws
few-shot examples anew for the second side (the seed is set for each, and the prompts are compared); it takes penalties
and sampling from the base's generation configuration; it seeds all global generators; a task file may name Python code
and its templates may reach Python's internals (neither does here).
"""

from __future__ import annotations

import functools
import io
import logging
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from lora_tune.errors import CheckFailed, DataError, Problem, UsageError
from lora_tune.evaluation.bootstrap import paired_interval, paired_p_value
from lora_tune.evaluation.metrics import RowScores, mean_of
from lora_tune.evaluation.scores import Score
from lora_tune.model.generation import evaluating, transformer

if TYPE_CHECKING:
    from peft import PeftModel

    from lora_tune.data.chat_template import ChatTemplate

_REFUSED = {
    "t0_eval": "needs promptsource, which no supported Python installs; hold tasks out instead (eval.hold_out_tasks)",
}
_BATCH = 16
Prompting = Literal["chat", "plain"]


@dataclass(frozen=True)
class Benchmarks:
    """Tasks that were found and whose data is at hand; groups name the tasks that they hold."""

    loaded: Any  # lm_eval's dictionary of tasks and groups
    groups: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Asked:
    """How the tasks are asked: rows of each at most, seed, and prompts in the chat template or as they are."""

    seed: int
    most_rows: int | None = None
    prompting: Prompting = "chat"


def find_tasks(names: Sequence[str]) -> Benchmarks:
    """The tasks and groups of these names, or of local YAML files, with their data.

    Raises: UsageError for an unknown name, a file that is no task or names Python code, or lm-eval not installed;
    DataError where the data of a task cannot be had.
    """
    if find_spec("lm_eval") is None:
        raise UsageError(
            "--tasks needs lm-evaluation-harness, which is not installed", "pip install 'lora_tune[lm-eval]'"
        )
    specs = [_read_task(Path(name)) if name.endswith((".yaml", ".yml")) else name for name in names]
    with _quiet():
        manager = _manager(any(isinstance(spec, str) for spec in specs))
        for name, spec in zip(names, specs, strict=True):
            if isinstance(spec, str):
                _require_known(spec, manager.all_tasks)
            else:
                _require_metrics(name, spec)
        loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
        for name, spec in zip(names, specs, strict=True):
            try:
                found = manager.load([spec])
            except Exception as error:  # whatever a task, its code or its data set raises
                raise _unusable(name, error) from None
            for part in loaded:
                loaded[part].update(found[part])
    groups = {name: tuple(task.task_name for task in group.get_all_tasks()) for name, group in loaded["groups"].items()}
    return Benchmarks(loaded, groups)


def compare_on_tasks(
    model: PeftModel, chat: ChatTemplate, tasks: Benchmarks, asked: Asked
) -> tuple[dict[str, dict[str, Score]], list[Problem]]:
    """{task: {metric: score}} of base and adapter on the same documents and prompts, and notes.

    A metric is named as lm-eval names it, with its filter behind a comma unless that is "none". A group's score is the
    mean over all documents of its tasks. Metrics that are no mean over documents are left out with a note. Modes,
    random states and the generation configuration of the model stay as they were.

    Raises: CheckFailed where both sides were not asked the same, UsageError where a task cannot be run.
    """
    sides: dict[str, Any] = {}
    for name, setting in (("adapter", nullcontext()), ("base", model.disable_adapter())):
        with setting, evaluating(model), _undisturbed(model, chat), _quiet():
            sides[name] = _evaluate(model, chat, tasks, asked)
    scores: dict[str, dict[str, Score]] = {}
    notes: list[Problem] = []
    pooled: dict[str, dict[str, tuple[list[float], list[float], str]]] = {}
    for task in tasks.loaded["tasks"]:
        values, left_out = _paired(task, sides["base"], sides["adapter"])
        if not values:
            raise UsageError(Problem(f"{task} gives no score by document", "take another task", key="--tasks"))
        if left_out:
            reason = f"{task}: {', '.join(left_out)} is no mean over documents and is left out"
            notes.append(Problem(reason, severity="note"))
        scores[task] = {metric: _score(*found, seed=asked.seed) for metric, found in values.items()}
        for group, members in tasks.groups.items():
            for metric, (base, adapter, direction) in values.items() if task in members else ():
                both = pooled.setdefault(group, {}).setdefault(metric, ([], [], direction))
                both[0].extend(base)
                both[1].extend(adapter)
    for group, metrics in pooled.items():
        scores[group] = {metric: _score(*found, seed=asked.seed) for metric, found in metrics.items()}
    return scores, notes


@functools.cache
def _manager(with_own_tasks: bool) -> Any:
    """lm-eval's index of tasks; with its own ones it reads some 14,000 files."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=with_own_tasks)


def _require_metrics(name: str, task: Mapping[str, Any]) -> None:
    """Metrics of a local task must be lm-eval's own: any other would be code from the hub. Raises: UsageError."""
    from lm_eval.api import metrics, registry

    known = set(registry.metric_registry)
    for entry in task.get("metric_list") or ():
        metric = entry.get("metric") if isinstance(entry, dict) else entry
        if metric not in known:
            near = get_close_matches(str(metric), known, n=1, cutoff=0.6)
            fix = f"did you mean {near[0]}?" if near else "take one of lm-eval's own"
            raise UsageError(Problem(f"has no metric of lm-eval, got {metric!r}", fix, file=name, key="metric_list"))
    del metrics  # its import fills the registry


def _require_known(name: str, known: Sequence[str]) -> None:
    if name in _REFUSED:
        raise UsageError(Problem(f"the task {name} {_REFUSED[name]}", key="--tasks"))
    if name not in known:
        near = get_close_matches(name, known, n=1, cutoff=0.6)
        fix = f"did you mean {near[0]}?" if near else "see `lm-eval ls tasks`; a local task is named by its .yaml file"
        raise UsageError(Problem(f"no such task, got {name!r}", fix, key="--tasks"))


def _read_task(path: Path) -> dict[str, Any]:
    """A local task file as plain data; files of its data set are found beside it. Raises: UsageError."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    def refuse(reason: str, fix: str) -> UsageError:
        return UsageError(Problem(reason, fix, file=str(path), key="--tasks"))

    try:
        text = path.read_text(encoding="utf-8")
        content = YAML(typ="safe", pure=True).load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise refuse(f"cannot be read: {getattr(error, 'strerror', error)}", "name a task or its .yaml file") from None
    except YAMLError as error:
        if "!function" in text:
            raise refuse("names Python code (!function), which no local task runs", "write it as a template") from None
        raise refuse(f"is no YAML: {' '.join(str(error).split())[:200]}", "repair the file") from None
    if not isinstance(content, dict) or not isinstance(content.get("task"), str):
        raise refuse("is no task: it has no `task: name`", "see lm-evaluation-harness, docs/new_task_guide.md")
    if "include" in content:
        raise refuse("includes another file", "write the task in one file")
    given = content.get("dataset_kwargs")
    if isinstance(given, dict) and "data_files" in given:
        content["dataset_kwargs"] = {**given, "data_files": _beside(given["data_files"], path.resolve().parent)}
    return content


def _beside(files: Any, folder: Path) -> Any:
    """Paths of data files, relative to the task's folder."""
    if isinstance(files, dict):
        return {key: _beside(value, folder) for key, value in files.items()}
    if isinstance(files, list):
        return [_beside(value, folder) for value in files]
    return str(folder / files) if isinstance(files, str) and "://" not in files else files


def _unusable(name: str, error: Exception) -> UsageError | DataError:
    """What a user is told where a task cannot be loaded."""
    said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    if isinstance(error, (ConnectionError, FileNotFoundError)) or type(error).__name__ in (
        "DatasetNotFoundError", "OfflineModeIsEnabled", "LookupError",
    ):  # fmt: skip
        return DataError(
            Problem(f"the data of task {name} cannot be had: {said}", "check path and network", key="--tasks")
        )
    if isinstance(error, ImportError):
        return UsageError(Problem(f"task {name} needs what is not installed: {said}", "install it", key="--tasks"))
    return UsageError(Problem(f"task {name} cannot be loaded: {said}", "repair the task", key="--tasks"))


def _evaluate(model: PeftModel, chat: ChatTemplate, tasks: Benchmarks, asked: Asked) -> Any:
    """lm-eval's results of the model as it is now."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    for task in tasks.loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=asked.seed)
    random.seed(asked.seed)
    np.random.seed(asked.seed)
    torch.manual_seed(asked.seed)
    wrapped = HFLM(pretrained=model, tokenizer=chat.tokenizer, batch_size=_BATCH)
    try:
        return evaluate(
            wrapped,
            task_dict=tasks.loaded,
            limit=asked.most_rows,
            bootstrap_iters=0,
            apply_chat_template=asked.prompting == "chat",
            fewshot_as_multiturn=asked.prompting == "chat",
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a task raises
        said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UsageError(Problem(f"lm-eval cannot run the tasks: {said}", "repair the task", key="--tasks")) from None


def _paired(
    task: str, base: Mapping[str, Any], adapter: Mapping[str, Any]
) -> tuple[dict[str, tuple[list[float], list[float], str]], list[str]]:
    """{metric: (base's values, adapter's values, direction)} by document, and the names of other metrics."""
    both = [{(row["filter"], row["doc_id"]): row for row in side["samples"][task]} for side in (base, adapter)]
    if [row["prompt_hash"] for row in both[0].values()] != [both[1][key]["prompt_hash"] for key in both[0]]:
        raise CheckFailed(f"{task}: base and adapter were not asked the same", "report it: the task is not repeatable")
    rises = base["higher_is_better"].get(task, {})
    values: dict[str, tuple[list[float], list[float], str]] = {}
    left_out: dict[str, None] = {}
    for key, row in both[0].items():
        for metric in row["metrics"]:
            name = metric if key[0] == "none" else f"{metric},{key[0]}"
            pair = [_number(side[key][metric]) for side in both]
            if pair[0] is None or pair[1] is None or rises.get(metric) is None:
                left_out[name] = None
                continue
            found = values.setdefault(name, ([], [], "higher" if rises[metric] else "lower"))
            found[0].append(pair[0])
            found[1].append(pair[1])
    return {name: found for name, found in values.items() if name not in left_out}, list(left_out)


def _number(value: Any) -> float | None:
    """A document's value where it is one number."""
    return float(value) if isinstance(value, (bool, int, float, np.bool_, np.integer, np.floating)) else None


def _score(base: Sequence[float], adapter: Sequence[float], direction: str, *, seed: int) -> Score:
    one, two = mean_of(base), mean_of(adapter)
    sides: tuple[RowScores, RowScores] = (one, two)
    low, high = paired_interval(*sides, seed=seed)
    p_value = paired_p_value(*sides, seed=seed)
    better: Literal["higher", "lower"] = "lower" if direction == "lower" else "higher"
    return Score(one.score(), two.score(), low, high, p_value, len(base), better)


@contextmanager
def _undisturbed(model: PeftModel, chat: ChatTemplate) -> Iterator[None]:
    """Greedy search without penalties meanwhile; afterwards generation configuration and random states as before."""
    from transformers import GenerationConfig

    base = transformer(model)
    own, states = base.generation_config, (random.getstate(), np.random.get_state())
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    base.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=sorted(chat.stop_ids), pad_token_id=chat.pad_id
    )
    side, cut = chat.tokenizer.padding_side, chat.tokenizer.truncation_side
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        base.generation_config = own
        random.setstate(states[0])
        np.random.set_state(states[1])
        chat.tokenizer.padding_side, chat.tokenizer.truncation_side = side, cut


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval's log kept to errors, its templates in a sandbox, its bars off where stderr is no terminal."""
    from jinja2.sandbox import SandboxedEnvironment

    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    from lm_eval import utils

    own = utils.env
    sandbox = SandboxedEnvironment(loader=own.loader, undefined=own.undefined, keep_trailing_newline=True)
    sandbox.filters.update(own.filters)
    utils.env = sandbox
    shown = sys.stderr is None or sys.stderr.isatty()
    try:
        with nullcontext() if shown else redirect_stderr(io.StringIO()):
            yield
    finally:
        utils.env = own
        logger.setLevel(level)
