"""Every key of the recipe changes something: one row a key, looked at before and after the change.

A key without a row fails `test_no_key_is_left_out`; a key that nothing reads fails its own row. What is looked at are
the real parts: tokens that are trained, the loaded base, weights after three steps, evaluations, files.
"""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_tune.data.chat_template import load_chat_template
from lora_tune.data.pipeline import Prepared, encode, read_conversations
from lora_tune.data.sources import _hub_rows
from lora_tune.errors import CheckFailed, LoraTuneError
from lora_tune.model.base import linear4bit_modules, load_base
from lora_tune.model.memory import plan_memory
from lora_tune.model.methods import saved_adapter
from lora_tune.model.source import find_base, load_tokenizer
from lora_tune.model.strategy import Layout, layout_of
from lora_tune.recipe import DataSource, Recipe
from lora_tune.recipe_file import read_recipe
from lora_tune.run import _compare, _load, _prepare, _resolve, _train
from lora_tune.training.planned import Planned
from lora_tune.training.progress import read_metrics
from lora_tune.training.start import Start
from lora_tune.training.trainer import build

RECIPE = """\
base: {name: base, quantize: none, compute_dtype: float32}
data: [{source: rows.jsonl, format: messages}]
lora: {rank: 4, alpha: 8}
train: {max_steps: 3, batch_size: 4, micro_batch_size: 2, max_length: 96, learning_rate: 1e-3, warmup: 0,
        packing: false}
eval: {hold_out: 4}
limits: {dropped_rows: 100%, lost_tokens: 100%, lost_end_tokens: 100%}
output: out
"""
PROMPT_FILE = """\
templates:
  1: {name: say, jinja: "{{q}} please. ||| {{a}}", answer_choices: "No ||| {{a}}"}
  2: {name: do, jinja: "Do what I ask: {{q}} ||| {{a}}", answer_choices: "No ||| {{a}}"}
"""
COMMITS = {"main": "a" * 40, "v2": "b" * 40}
Looks = Callable[[Recipe], Any]


def rows() -> list[dict[str, Any]]:
    """Twenty-four conversations; one is too long, one repeats another."""
    made = [(f"Question {number}: what is {number * 7}?", f"Answer {number}. It is fine.") for number in range(22)]
    made += [made[3], ("Tell me more.", "word " * 60)]
    turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in made]
    turns[1] = [*turns[0], *turns[1]]
    return [{"messages": turn} for turn in turns]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """A folder with a base, data, templates, an adapter to continue, and the recipe."""
    folder = tmp_path_factory.mktemp("keys")
    shutil.copytree(tiny_base, folder / "base")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    (folder / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()[:8]))
    (folder / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows()[:8], {"messages": []}]))
    (folder / "table.jsonl").write_text("".join(f'{{"q": "Say {n}", "a": "It is {n}", "b": "No"}}\n' for n in range(9)))
    template = (folder / "base" / "chat_template.jinja").read_text().replace("<|im_end|>", "<|endoftext|>")
    (folder / "other.jinja").write_text(template)
    (folder / "prompts.yaml").write_text(PROMPT_FILE)
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


@pytest.fixture(autouse=True)
def _inside(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)


def recipe_with(*overrides: str) -> Recipe:
    """The recipe above, its overrides applied as on the command line."""
    return read_recipe(Path("recipe.yaml"), overrides=overrides).recipe


# --- what is looked at ----------


def prepared(recipe: Recipe) -> Prepared:
    """The rows of a recipe, tokenized; through the verb's own step."""
    return _prepare(recipe, find_base(recipe.base))[1]


def tokens(recipe: Recipe) -> str:
    """Hash of everything that is trained and held out, or the refusal."""
    try:
        found = prepared(recipe)
    except LoraTuneError as error:
        return f"refused: {error}"
    content = [found.train.to_dict(), [row.input_ids.tolist() for row in found.held_out_rows]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def task_names(recipe: Recipe) -> list[str]:
    """The task of every held-out conversation."""
    return [conversation.task for conversation in prepared(recipe).held_out]


def loaded(recipe: Recipe) -> tuple[Any, ...]:
    """How the base lies in memory."""
    model = load_base(find_base(recipe.base), recipe.base)
    four_bit = [module.weight for _, module in linear4bit_modules(model)]
    kind = (four_bit[0].quant_type, four_bit[0].quant_state.nested) if four_bit else "full"
    layer = type(model.model.layers[0].self_attn.q_proj).__name__
    return find_base(recipe.base).name, kind, layer, model.dtype, model.config._attn_implementation


def embedding(recipe: Recipe) -> str:
    """What the input embedding is."""
    return type(load_base(find_base(recipe.base), recipe.base).get_input_embeddings()).__name__


def gib_of_a_card(recipe: Recipe) -> float:
    """What the plan says that the run needs of a GPU; test_offload.py trains so."""
    config = {**find_base(recipe.base).config, "num_hidden_layers": 8}
    held = {"base": recipe.base, "lora": recipe.lora, "train": recipe.train}
    return plan_memory(config, **held, budget_gib=1000, device="cuda").peak_gib


def started(recipe: Recipe) -> str:
    """The adapter before the first step: config and hash of the tensors."""
    recipe, source = recipe, find_base(recipe.base)
    _, rows_ = _prepare(recipe, source)
    model = _load(recipe, source, rows_, trust_remote_code=None)
    saved = saved_adapter(model, lora=recipe.lora, source=source)
    return json.dumps([saved.config, _hash(saved.tensors)], sort_keys=True)


def _hash(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].float().numpy().tobytes())
    return digest.hexdigest()


_runs: dict[str, dict[str, Any]] = {}  # most keys are compared with the same recipe


def trained(recipe: Recipe) -> dict[str, Any]:
    """Three steps of training: hash of the adapter, its rows in metrics.jsonl, checkpoints, checkpointed layers."""
    key = recipe.model_dump_json()
    if key not in _runs:
        _runs[key] = _train_anew(recipe)
    return _runs[key]


def _train_anew(recipe: Recipe) -> dict[str, Any]:
    for old in ("out", "out2"):
        shutil.rmtree(old, ignore_errors=True)
    source, folder = find_base(recipe.base), Path(recipe.output)
    chat, rows_ = _prepare(recipe, source)
    folder.mkdir(parents=True)
    recipe, _ = _resolve(recipe, source, start=Start())
    model = _load(recipe, source, rows_, trust_remote_code=None)
    chat.align(model)
    planned = Planned(source.config, recipe.base, recipe.lora, recipe.train, "off")
    _train(model, recipe, rows_, chat=chat, start=Start(), planned=planned)
    lines = read_metrics(folder / "metrics.jsonl")
    layers = [layer.gradient_checkpointing for layer in model.base_model.model.model.layers]
    comparison = _compare(model, recipe, rows_, chat=chat)
    return {
        "weights": _hash(saved_adapter(model, lora=recipe.lora, source=source).tensors),
        "checkpoints": sorted(path.name for path in (folder / "checkpoints").glob("step-*")),
        "micro": recipe.train.micro_batch_size,
        "layers": layers,
        "evaluations": [line["step"] for line in lines if "eval" in line],
        "steps": sum("loss" in line for line in lines),
        "folders": sorted(path.name for path in Path().glob("out*") if (path / "metrics.jsonl").exists()),
        "scores": {name: score.rows for name, score in comparison.scores.items()},
        "samples": len(comparison.samples),
        "trackers": sorted(
            path.name for path in (folder / "checkpoints").glob("*/") if not path.name.startswith("step")
        ),
    }


def weights(recipe: Recipe) -> str:
    """Hash of the adapter after three steps."""
    return trained(recipe)["weights"]


def compiled(recipe: Recipe) -> bool:
    """Whether the decoder layers would compute compiled; nothing is compiled before the first step."""
    source = find_base(recipe.base)
    chat, rows_ = _prepare(recipe, source)
    recipe, _ = _resolve(recipe, source, start=Start())
    model = _load(recipe, source, rows_, trust_remote_code=None)
    build(model, rows_.train, train=recipe.train, evaluation=None, seed=1, folder=Path(recipe.output), chat=chat)
    return "forward" in vars(model.base_model.model.model.layers[0])


def part(name: str) -> Looks:
    """One of the things that `trained` looks at."""
    return lambda recipe: trained(recipe)[name]


def ending(recipe: Recipe) -> str:
    """How three steps end whose weights become so large that the loss is not finite."""
    try:
        trained(recipe)
    except CheckFailed as error:
        return str(error)
    return "all steps are done"


def refusal(recipe: Recipe) -> str:
    """What `encode` says of limits: the message or nothing."""
    try:
        prepared(recipe)
    except LoraTuneError as error:
        return str(error)
    return ""


def layout(recipe: Recipe) -> Layout:
    """How many processes share the run in which way; test_processes.py runs them."""
    return layout_of(recipe.hardware, cards=0, batch_size=recipe.train.batch_size, fits_one_card="yes")


# --- the table ----------

# the first step has learning rate 0, the others ruin the adapter: the best evaluation is the first
WORSE = ("eval.every=1", "train.learning_rate=3.0", "train.max_grad_norm=100", "train.warmup=2")
BAD = ("data.0.source=bad.jsonl",)
TABLE = ("data.0.source=table.jsonl", "data.0.format=table", "eval.hold_out=0")
PROMPTS = ("data=[{source: table.jsonl, prompts: prompts.yaml}]", "eval.hold_out=0")
TASKS = ("data=[{source: rows.jsonl}, {source: other.jsonl, task: apart}]", "eval.hold_out=0")
KEYS: dict[
    str, tuple[Looks, str, tuple[str, ...]]
] = {  # key: (what is looked at, changed value, setting of both sides)
    "base.quantize": (loaded, "nf4", ()),
    "base.double_quant": (loaded, "false", ("base.quantize=nf4",)),
    "base.compute_dtype": (loaded, "bfloat16", ()),
    "base.attention": (loaded, "eager", ()),
    "base.embeddings": (embedding, "cpu", ()),
    "base.chat_template": (tokens, "other.jinja", ()),
    "base.name": (lambda recipe: find_base(recipe.base).name, "builtin:quickstart", ()),
    "data.0.source": (tokens, "other.jsonl", ()),
    "data.0.format": (refusal, "alpaca", ()),
    "data.0.columns": (tokens, "{prompt: q, completion: b}", (*TABLE, "data.0.columns={prompt: q, completion: a}")),
    "data.0.weight": (tokens, "2.0", ()),
    "data.0.max_rows": (tokens, "10", ()),
    "data.0.on_bad_row": (refusal, "drop", BAD),
    "data.0.pack": (tokens, "false", ("train.packing=true",)),
    "data.0.task": (task_names, "other", ()),
    "data.0.prompts": (tokens, "prompts.yaml", ("data=[{source: table.jsonl}]", "eval.hold_out=0")),
    "data.0.templates": (tokens, "[say]", PROMPTS),
    "data.0.shots": (tokens, "2", PROMPTS),
    "data.0.options": (tokens, "true", PROMPTS),
    "data.0.invert": (tokens, "50%", PROMPTS),
    "mixing.cap": (tokens, "10", ()),
    "mixing.temperature": (tokens, "3.0", ("data=[{source: rows.jsonl}, {source: other.jsonl}]",)),
    "loss_on": (tokens, "all", ()),
    "lora.method": (started, "dora", ()),
    "lora.rank": (started, "2", ()),
    "lora.alpha": (started, "16", ()),
    "lora.dropout": (weights, "0.3", ()),
    "lora.targets": (started, "[q_proj]", ()),
    "lora.modules_to_save": (started, "[lm_head]", ()),
    "lora.rank_pattern": (started, "{q_proj: 2}", ()),
    "lora.alpha_pattern": (started, "{q_proj: 2}", ()),
    "lora.new_tokens": (started, "['<|think|>']", ()),
    "lora.plus_ratio": (weights, "16", ()),
    "train.epochs": (part("steps"), "2", ("train.max_steps=null",)),
    "train.max_steps": (part("steps"), "2", ()),
    "train.learning_rate": (weights, "2e-3", ()),
    "train.schedule": (weights, "constant", ()),
    "train.warmup": (weights, "2", ()),
    "train.weight_decay": (weights, "0.5", ()),
    "train.max_grad_norm": (weights, "1e-3", ()),
    "train.optimizer": (weights, "sgd", ()),
    "train.batch_size": (weights, "2", ()),
    "train.micro_batch_size": (part("micro"), "auto", ()),
    "train.max_length": (tokens, "64", ()),
    "train.too_long": (tokens, "drop", ()),
    "train.packing": (tokens, "true", ()),
    "train.gradient_checkpointing": (part("layers"), "1", ()),
    "train.offload": (gib_of_a_card, "checkpoints", ("train.gradient_checkpointing=all", "train.max_length=100000")),
    "train.kernels": (weights, "off", ()),
    "train.compile": (compiled, "layers", ()),
    "train.neftune_alpha": (weights, "5", ()),
    "train.save_every": (part("checkpoints"), "1", ()),
    "train.keep_checkpoints": (part("checkpoints"), "1", ("train.save_every=1",)),
    "train.max_skipped_steps": (ending, "9", ("train.learning_rate=1e37", "eval.metrics=[]", "eval.samples=0")),
    "eval.hold_out": (tokens, "6", ()),
    "eval.hold_out_tasks": (tokens, "[apart]", TASKS),
    "eval.metrics": (part("scores"), "[loss, exact_match]", ()),
    "eval.every": (part("evaluations"), "2", ()),
    "eval.max_rows": (part("scores"), "2", ()),
    "eval.samples": (part("samples"), "1", ()),
    "eval.keep_best": (weights, "true", WORSE),
    "eval.stop_after": (part("steps"), "1", WORSE),
    "limits.dropped_rows": (refusal, "0", ("train.too_long=drop",)),
    "limits.lost_tokens": (refusal, "0", ()),
    "limits.lost_end_tokens": (refusal, "0", ()),
    "limits.duplicates": (refusal, "0", ()),
    "hardware.processes": (layout, "2", ()),
    "hardware.nodes": (layout, "2", ()),
    "hardware.strategy": (layout, "fsdp2", ("hardware.processes=2",)),
    "hardware.timeout": (layout, "5s", ()),
    "output": (lambda recipe: trained(recipe)["folders"], "out2", ()),
    "seed": (weights, "7", ()),
}
ELSEWHERE = {  # key: the test below that shows it
    "base.revision": "test_the_revision_of_a_base_chooses_the_snapshot",
    "data.0.config": "test_config_and_split_choose_the_rows_of_a_data_set",
    "data.0.split": "test_config_and_split_choose_the_rows_of_a_data_set",
    "data.0.revision": "test_the_revision_of_a_data_set_is_asked_of_the_hub",
    "lora.start_from": "test_an_adapter_is_continued",
    "track": "test_a_tracker_is_used_or_missed",
    "train.budget": "test_a_budget_takes_the_place_of_epochs",
}


@pytest.mark.parametrize("key", KEYS)
def test_the_key_changes_something(key: str) -> None:
    looks, value, setting = KEYS[key]
    others = [override for override in setting if not override.startswith(f"{key}=")]
    before, after = looks(recipe_with(*setting)), looks(recipe_with(*others, f"{key}={value}"))
    assert before != after, f"{key}={value} changed nothing: {before}"


def keys_of(schema: dict[str, Any], part_: dict[str, Any], path: str = "") -> list[str]:
    """All keys of the recipe's JSON Schema, `data.0.source` for an entry of a list."""
    found = []
    for name, value in part_["properties"].items():
        key = f"{path}{name}"
        reference = value.get("$ref") or (value.get("items") or {}).get("$ref")
        if reference:
            inner = schema["$defs"][reference.rsplit("/", 1)[1]]
            found += keys_of(schema, inner, f"{key}.0." if "items" in value else f"{key}.")
        else:
            found.append(key)
    return found


def test_no_key_is_left_out() -> None:
    schema = Recipe.model_json_schema()
    assert sorted(keys_of(schema, schema)) == sorted([*KEYS, *ELSEWHERE])
    assert all(name in globals() for name in ELSEWHERE.values())


def test_the_revision_of_a_base_chooses_the_snapshot(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    repository = tmp_path / "models--owner--model"
    (repository / "refs").mkdir(parents=True)
    for name, commit in COMMITS.items():
        shutil.copytree(tiny_base, repository / "snapshots" / commit)
        (repository / "refs" / name).write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    default, second = recipe_with("base.name=owner/model"), recipe_with("base.name=owner/model", "base.revision=v2")
    assert [find_base(recipe.base).revision for recipe in (default, second)] == [COMMITS["main"], COMMITS["v2"]]


def test_config_and_split_choose_the_rows_of_a_data_set(tmp_path: Path) -> None:
    for name in ("a-train", "a-test", "b-train"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": name, "completion": "x"}) + "\n")
    configs = [
        {"config_name": "a", "data_files": [{"split": s, "path": f"a-{s}.jsonl"} for s in ("train", "test")]},
        {"config_name": "b", "data_files": [{"split": "train", "path": "b-train.jsonl"}]},
    ]
    (tmp_path / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    found = [
        next(_hub_rows(DataSource(source=str(tmp_path), config=config, split=split), None))["prompt"]
        for config, split in (("a", "train"), ("a", "test"), ("b", "train"))
    ]
    assert found == ["a-train", "a-test", "b-train"]


def test_the_revision_of_a_data_set_is_asked_of_the_hub() -> None:
    asked = []

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            body = json.dumps({"id": "owner/rows", "sha": COMMITS["v2"]}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Quiet."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = (
        "from lora_tune.data.sources import open_source; from lora_tune.recipe import DataSource;"
        "print(open_source(DataSource(source='owner/rows', revision='v2')).revision)"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    server.shutdown()
    assert done.stdout.strip() == COMMITS["v2"]
    assert asked == ["/api/datasets/owner/rows/revision/v2"]


def test_an_adapter_is_continued(tmp_path: Path) -> None:
    from finished import write_finished

    write_finished(tmp_path / "first", Path("base").resolve())
    fresh, continued = (started(recipe_with(*more)) for more in ((), (f"lora.start_from={tmp_path / 'first'}",)))
    assert fresh != continued


def test_a_tracker_is_used_or_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the package the run writes its files; without it the run ends before training and names the package."""
    try:
        found = trained(recipe_with("track=[tensorboard]"))["trackers"]
    except LoraTuneError as error:
        assert "pip install tensorboard" in str(error)
    else:
        assert "tensorboard" in found
    assert trained(recipe_with())["trackers"] == []


def test_a_budget_takes_the_place_of_epochs() -> None:
    """The steps that fit into a second, and none counted by epochs."""
    trained(recipe_with("train.max_steps=null", "train.budget=1s"))
    (last, *_) = sorted(Path("out/checkpoints").glob("step-*"), reverse=True)
    run = json.loads((last / "run.json").read_text())
    assert run["budget"]["points"][-1] == 1.0 and run["resolved"]["steps"] == len(run["budget"]["points"]) - 1


def test_the_pieces_are_those_of_the_verb() -> None:
    """`_prepare` is what the run verb calls: the same rows come from the public functions."""
    recipe = recipe_with()
    conversations = read_conversations(recipe.data, hold_out=recipe.eval.hold_out, seed=recipe.seed)
    chat = load_chat_template(load_tokenizer(find_base(recipe.base)))
    again = encode(
        conversations, chat, loss_on=recipe.loss_on, train=recipe.train, limits=recipe.limits, seed=recipe.seed
    )
    assert again.train.to_dict() == prepared(recipe).train.to_dict()
