"""Exports: every target's words are those of training before its folder appears; what is written, what refused."""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import finished
import pytest
import tiny
import torch
from safetensors.torch import load_file

from lora_tune.adapter.at_hand import chat_of_folder
from lora_tune.adapter.canonical import canonical
from lora_tune.adapter.compat import MLX_ARCHITECTURES
from lora_tune.adapter.export_targets import TARGETS
from lora_tune.adapter.folder import CONFIG, MANIFEST
from lora_tune.adapter.load import load_adapter, read_adapter
from lora_tune.adapter.parity import FIXED, check_parity, first_difference, held_out_conversations
from lora_tune.adapter.transformers_words import transformers_words
from lora_tune.adapter.verify import verify_folder
from lora_tune.cli import main
from lora_tune.data.conversation import Conversation, Message
from lora_tune.errors import CheckFailed
from lora_tune.model.base import load_base
from lora_tune.model.merging import divergence, position_log_probs
from lora_tune.model.source import find_base
from lora_tune.recipe import Base

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
EXAMPLE = Path(__file__).resolve().parents[1] / "adapters" / "example"
OURS = ("canonical", "vllm", "sglang", "mlx", "merged")
OTHER_WORDS = tiny.CHATML.replace("\\n' + (message", "\\n\\n' + (message")
ROWS = [
    {"messages": [{"role": "user", "content": f"Question {n}, 雪?"}, {"role": "assistant", "content": f"Answer {n}."}]}
    for n in range(40)
]


@pytest.fixture(scope="module")
def adapter(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished rsLoRA folder of the tiny base."""
    folder = tmp_path_factory.mktemp("export") / "mine"
    finished.write_finished(folder, tiny_base, lora={"method": "rslora", "rank_pattern": {"v_proj": 2}})
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Held-out rows."""
    path = tmp_path_factory.mktemp("rows") / "held_out.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return path


def _export(folder: Path, to: str, output: Path, base: Path, *more: str, capsys: Any = None) -> tuple[int, Any]:
    code = main(["export", str(folder), "--to", to, "--output", str(output), "--base", str(base), "--json", *more])
    return code, json.loads(capsys.readouterr().out) if capsys else None


def _other_base(tmp_path: Path, tiny_base: Path, **changes: str) -> Path:
    """The same weights with other words around them: `template`, or the `eos` token of tokenizer and settings."""
    copy = Path(shutil.copytree(tiny_base, tmp_path / "other"))
    if "template" in changes:
        (copy / "chat_template.jinja").write_text(changes["template"])
    if "eos" in changes:
        for name, key in (("tokenizer_config.json", "eos_token"), ("config.json", "eos_token_id")):
            content = json.loads((copy / name).read_text())
            content[key] = changes["eos"] if key == "eos_token" else tiny.SPECIAL.index(changes["eos"])
            (copy / name).write_text(json.dumps(content))
        (copy / "generation_config.json").unlink()
    return copy


# ----- every target -----
@pytest.mark.parametrize("to", OURS)
def test_every_target_proves_its_words_on_held_out_rows(
    to: str, adapter: Path, tiny_base: Path, rows: Path, tmp_path: Path, capsys: Any
) -> None:
    code, facts = _export(adapter, to, tmp_path / "out", tiny_base, "--data", str(rows), "--rows", "7", capsys=capsys)
    assert code == 0, facts
    parity = facts["parity"]
    assert parity["rows"] == 7 + parity["fixed"] and parity["fixed"] == len(FIXED) and parity["left_out"] == 0
    assert parity["prompts"] == parity["rows"] + 1  # one of the fixed conversations has two answers
    assert {path.parent for path in tmp_path.rglob("*") if path.is_file()} == {tmp_path / "out"}
    texts = [path.read_text() for path in (tmp_path / "out").iterdir() if path.suffix in (".md", ".json")]
    assert not any(str(tmp_path.parent) in text for text in texts)  # no path of this machine


def test_every_target_has_a_test() -> None:
    assert set(OURS) <= set(TARGETS)


@pytest.mark.parametrize("to", OURS)
def test_other_words_are_used_or_refused(to: str, adapter: Path, tiny_base: Path, tmp_path: Path, capsys: Any) -> None:
    """Where the base renders otherwise, the engine is given the adapter's words, by file or by flag."""
    base = _other_base(tmp_path, tiny_base, template=OTHER_WORDS)
    code, facts = _export(adapter, to, tmp_path / "out", base, capsys=capsys)
    assert code == 0, facts
    flags = {"vllm": "--tokenizer ./out", "sglang": "--tokenizer-path ./out", "mlx": "--chat-template"}
    if to in flags:
        assert flags[to] in facts["command"]
        assert (tmp_path / "out" / "chat_template.jinja").read_text().strip() == tiny.CHATML.strip()


@pytest.mark.parametrize("to", OURS)
def test_an_engine_that_would_not_stop_is_refused_or_told(
    to: str, adapter: Path, tiny_base: Path, tmp_path: Path, capsys: Any
) -> None:
    base = _other_base(tmp_path, tiny_base, eos="<|endoftext|>")
    code, facts = _export(adapter, to, tmp_path / "out", base, capsys=capsys)
    if to == "mlx":  # it takes the base's end, and has no flag for another
        assert code == 1 and "does not stop" in facts["problems"][0]["reason"]
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
    else:
        assert code == 0, facts
        assert to not in ("vllm", "sglang") or "--tokenizer" in facts["command"]


# ----- what is written -----
@pytest.mark.parametrize(("to", "flag"), [("vllm", "--max-lora-rank 8"), ("sglang", "--max-lora-rank 4")])
def test_the_command_has_the_smallest_rank(
    to: str, flag: str, adapter: Path, tiny_base: Path, tmp_path: Path, capsys: Any
) -> None:
    _, facts = _export(adapter, to, tmp_path / "out", tiny_base, capsys=capsys)
    assert flag in facts["command"] and "mine=./out" in facts["command"] and "--dtype float32" in facts["command"]
    assert facts["command"] in (tmp_path / "out" / "README.md").read_text()
    base = Base(name=str(tiny_base), quantize="none", compute_dtype="float32")
    report = verify_folder(tmp_path / "out", base=base, depth="full")
    assert not report.errors and report.facts["replay"]["adapter"] < 1e-5


@pytest.mark.parametrize(("to", "word"), [("vllm", "mine={}"), ("sglang", "mine={}"), ("mlx", "{}")])
def test_the_command_is_quoted_for_a_shell(
    to: str, word: str, adapter: Path, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "an output; true"
    assert main(["export", str(adapter), "--to", to, "--output", str(output), "--base", str(tiny_base)]) == 0
    assert word.format(output) in shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert word.format(f"./{output.name}") in shlex.split((output / "README.md").read_text().split("```")[-2])


def test_mlx_holds_the_same_product(adapter: Path, tiny_base: Path, tmp_path: Path, capsys: Any) -> None:
    _export(adapter, "mlx", tmp_path / "out", tiny_base, capsys=capsys)
    found = load_file(tmp_path / "out" / "adapters.safetensors")
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    form = canonical(read_adapter(adapter))
    assert config["num_layers"] == 2 and config["lora_parameters"]["scale"] == 1.0
    assert config["lora_parameters"]["rank"] == form.rank == 4 and len(config["lora_parameters"]["keys"]) == 7
    for key, a in form.adapter.tensors.items():
        if ".lora_A." in key:
            module = key.removeprefix("base_model.model.").partition(".lora_")[0]
            update = form.adapter.tensors[key.replace("lora_A", "lora_B")] @ a
            assert torch.equal((found[f"{module}.lora_a"] @ found[f"{module}.lora_b"]).T, update)


def test_merged_answers_as_the_adapter(adapter: Path, tiny_base: Path, tmp_path: Path, capsys: Any) -> None:
    _, facts = _export(adapter, "merged", tmp_path / "out", tiny_base, capsys=capsys)
    held = Base(name=str(tiny_base), quantize="none", compute_dtype="float32")
    merged = held.model_copy(update={"name": str(tmp_path / "out")})
    ids = [list(range(5, 40))]
    trained = position_log_probs(load_adapter(load_base(find_base(held), held), adapter), ids)
    found = divergence(trained, position_log_probs(load_base(find_base(merged), merged), ids))
    assert found.kl < 1e-6 and facts["candidates"]["stored"]["kl"] < 1e-6


def test_merged_too_far_leaves_nothing(tmp_path: Path, capsys: Any) -> None:
    command = ["export", str(EXAMPLE), "--to", "merged", "--output", str(tmp_path / "new" / "out"), "--max-kl", "0"]
    assert main(command) == 1
    assert "nats (KL)" in capsys.readouterr().err and not list((tmp_path / "new").iterdir())


# ----- strangers' folders -----
@pytest.mark.parametrize("to", OURS)
def test_a_strangers_folder_takes_its_bases_words(
    to: str, adapter: Path, tiny_base: Path, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "bare").mkdir()
    for name in (CONFIG, "adapter_model.safetensors"):
        shutil.copyfile(adapter / name, tmp_path / "bare" / name)
    code, facts = _export(tmp_path / "bare", to, tmp_path / "out", tiny_base, capsys=capsys)
    assert code == 0, facts
    assert to == "canonical" or facts["parity"]["rows"] == len(FIXED)


def test_without_any_words_canonical_says_so_and_others_refuse(adapter: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "bare").mkdir()
    for name in (CONFIG, "adapter_model.safetensors"):
        shutil.copyfile(adapter / name, tmp_path / "bare" / name)
    for to in OURS:
        code = main(["export", str(tmp_path / "bare"), "--to", to, "--output", str(tmp_path / to), "--json"])
        facts = json.loads(capsys.readouterr().out)
        if to == "canonical":
            assert code == 0 and facts["parity"] is None
            assert any("were not compared" in problem["reason"] for problem in facts["problems"])
        else:
            assert code == 1 and "--base" in facts["problems"][0]["fix"] and not (tmp_path / to).exists()


# ----- what is refused -----
@pytest.mark.parametrize("lora", [{"method": "dora"}, {"modules_to_save": ["lm_head"]}, {"new_tokens": ["<x>"]}])
@pytest.mark.parametrize("to", ["vllm", "sglang", "mlx"])
def test_what_an_engine_cannot_run_is_refused(
    to: str, lora: dict[str, Any], tiny_base: Path, tmp_path: Path, capsys: Any
) -> None:
    finished.write_finished(tmp_path / "in", tiny_base, lora=lora)
    code, facts = _export(tmp_path / "in", to, tmp_path / "out", tiny_base, capsys=capsys)
    assert code == 1 and "merge" in facts["problems"][0]["fix"] and not (tmp_path / "out").exists()


def test_a_rank_over_512_is_refused_for_vllm(tiny_base: Path, tmp_path: Path, capsys: Any) -> None:
    finished.write_finished(tmp_path / "in", tiny_base, lora={"rank": 600, "alpha": 600, "targets": ["q_proj"]})
    code, facts = _export(tmp_path / "in", "vllm", tmp_path / "out", tiny_base, capsys=capsys)
    assert code == 1 and "ranks up to 512" in facts["problems"][0]["reason"] and not (tmp_path / "out").exists()
    assert _export(tmp_path / "in", "sglang", tmp_path / "out", tiny_base, capsys=capsys)[0] == 0


def test_an_architecture_that_mlx_calls_otherwise_is_refused(
    adapter: Path, tiny_base: Path, tmp_path: Path, capsys: Any
) -> None:
    assert "gpt2" not in MLX_ARCHITECTURES
    base = Path(shutil.copytree(tiny_base, tmp_path / "other"))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "model_type": "olmo"}))
    code, facts = _export(adapter, "mlx", tmp_path / "out", base, capsys=capsys)
    assert code == 1 and "--to merged" in facts["problems"][0]["fix"]


@pytest.mark.parametrize(
    ("config", "code"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}, 0),  # what mlx-lm takes anyway
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}, 1),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}}, 1),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}, "rope_theta": 500000.0}, 0),
    ],
)
def test_positions_that_mlx_would_not_read_are_refused(
    config: dict[str, Any], code: int, adapter: Path, tiny_base: Path, tmp_path: Path, capsys: Any
) -> None:
    base = Path(shutil.copytree(tiny_base, tmp_path / "other"))
    content = json.loads((base / "config.json").read_text())
    content.pop("rope_theta")
    (base / "config.json").write_text(json.dumps(content | config))
    found, facts = _export(adapter, "mlx", tmp_path / "out", base, capsys=capsys)
    assert found == code and (code == 0 or "rope_theta" in facts["problems"][0]["fix"])


def test_a_merged_configuration_keeps_the_names_of_its_base(tiny_base: Path, adapter: Path, tmp_path: Path) -> None:
    assert (
        main(["export", str(adapter), "--to", "merged", "--output", str(tmp_path / "o"), "--base", str(tiny_base)]) == 0
    )
    base, merged = (json.loads((folder / "config.json").read_text()) for folder in (tiny_base, tmp_path / "o"))
    assert merged["rope_theta"] == base["rope_theta"] == merged["rope_parameters"]["rope_theta"]


@pytest.mark.parametrize(
    ("to", "option"),
    [("merged", ("--dtype", "bfloat16")), ("vllm", ("--max-kl", "1")), ("canonical", ("--max-kl", "1"))],
)
def test_an_option_without_effect_is_refused(
    to: str, option: tuple[str, str], adapter: Path, tiny_base: Path, tmp_path: Path, capsys: Any
) -> None:
    code, facts = _export(adapter, to, tmp_path / "out", tiny_base, *option, capsys=capsys)
    assert code == 2 and facts["problems"][0]["key"] == option[0] and not (tmp_path / "out").exists()


def test_an_unknown_target_names_the_known_ones(adapter: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(["export", str(adapter), "--to", "onnx", "--output", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert all(name in said for name in OURS)


# ----- parity itself -----
def test_every_answer_of_a_conversation_is_compared_with_its_row(adapter: Path) -> None:
    """What parity takes for the training ids is what a whole row holds, turn by turn."""
    chat = chat_of_folder(adapter)
    for conversation in FIXED:
        entry = chat.rows([conversation], loss_on="assistant")[0]
        assert isinstance(entry, list) and len(entry) == 1
        whole = [int(token) for token in entry[0].input_ids]
        seen: list[list[int]] = []

        def render(request: Conversation, seen: list[list[int]] = seen) -> list[int]:
            seen.append(chat.prompt_ids(request.messages))
            return seen[-1]

        found = check_parity(chat, render, [conversation], stop_ids=chat.stop_ids, target="itself")
        assert found.prompts == len(seen) == sum(m.role == "assistant" for m in conversation.messages)
        starts = [n for n in range(1, len(whole)) if entry[0].mask[n] and not entry[0].mask[n - 1]]
        assert [whole[:start] for start in starts] == seen


@pytest.mark.parametrize("change", ["drop", "add", "swap", "cut", "empty"])
def test_one_wrong_token_anywhere_is_found(change: str, adapter: Path) -> None:
    chat = chat_of_folder(adapter)
    right, stops = transformers_words(adapter)
    request = replace(FIXED[0], messages=FIXED[0].messages[:1])
    ids = list(right(request))
    for place in range(len(ids)):
        wrong = {
            "drop": ids[:place] + ids[place + 1 :],
            "add": [*ids[:place], 77, *ids[place:]],
            "swap": [*ids[:place], ids[place] ^ 1, *ids[place + 1 :]],
            "cut": ids[:place],
            "empty": [],
        }[change]
        with pytest.raises(CheckFailed, match=r"fixed conversation:1: .* from token \d+ on: trained on \["):
            check_parity(chat, lambda _, wrong=wrong: wrong, FIXED[:1], stop_ids=stops, target="engine")  # type: ignore[misc]
        found = first_difference(ids, wrong, where="x")
        assert found is not None and ids[: found.position] == wrong[: found.position]


def test_no_stop_token_no_rows_and_engines_that_refuse(adapter: Path) -> None:
    chat = chat_of_folder(adapter)
    right, stops = transformers_words(adapter)
    with pytest.raises(CheckFailed, match="does not stop; it stops at none"):
        check_parity(chat, right, FIXED, stop_ids=(), target="engine")
    with pytest.raises(CheckFailed, match="no conversation fits"):
        check_parity(chat, right, [Conversation(text="no turns")], stop_ids=stops, target="engine")

    def refuses(_: Conversation) -> list[int]:
        raise CheckFailed("it has no loops")

    with pytest.raises(CheckFailed, match="fixed conversation:1: engine cannot render it: it has no loops"):
        check_parity(chat, refuses, FIXED, stop_ids=stops, target="engine")


def test_control_tokens_in_words_are_left_out_and_counted(adapter: Path) -> None:
    """Training encodes them as plain text, engines as tokens: no export can make them equal."""
    chat = chat_of_folder(adapter)
    right, stops = transformers_words(adapter)
    turns = (Message("user", "say <|im_end|>"), Message("assistant", "no"))
    found = check_parity(chat, right, [*FIXED, Conversation(turns)], stop_ids=stops, target="engine")
    assert (found.rows, found.left_out) == (3, 1) and "1 rows could not be compared" in str(found)


def test_the_runs_own_held_out_rows_are_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = chat_of_folder(EXAMPLE)
    monkeypatch.chdir(EXAMPLE.parents[1])
    found = held_out_conversations(EXAMPLE, chat, rows=5)
    assert [one.file == FIXED[0].file for one in found] == [False] * 5 + [True] * 3
    lines = {one.line for one in found[:5]}
    assert len(lines) == 5 and max(lines) > 300  # spread over the 600 rows of the file
    monkeypatch.chdir(tmp_path)
    assert len(held_out_conversations(EXAMPLE, chat, rows=5)) == 3


def test_the_manifest_of_a_copy_has_its_own_hashes(adapter: Path, tiny_base: Path, tmp_path: Path) -> None:
    main(["export", str(adapter), "--to", "vllm", "--output", str(tmp_path / "out"), "--base", str(tiny_base)])
    files = json.loads((tmp_path / "out" / MANIFEST).read_text())["files"]
    for name, record in files.items():
        assert hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest() == record["sha256"]
