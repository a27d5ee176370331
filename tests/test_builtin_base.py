"""The embedded base and the data of the quickstart: size, tokenizer, template, held-out names, reproducibility."""

import json
import math
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).parents[1]
BASE = ROOT / "lora_tune" / "builtin" / "quickstart"
DATA = ROOT / "recipes" / "quickstart"
MIB = 2**20


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(BASE)


@pytest.fixture(scope="module")
def rows():
    return {
        name: [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        for name in ("train", "held_out")
    }


@pytest.fixture(scope="module")
def generators():
    """The modules beside the pre-training script, which is not a package."""
    sys.path.insert(0, str(DATA))
    try:
        import make_data
        import names
        import stories
        import world

        yield {"make_data": make_data, "names": names, "stories": stories, "world": world}
    finally:
        sys.path.remove(str(DATA))


def test_files_are_complete_and_small():
    wanted = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    files = {path.name: path.stat().st_size for path in BASE.iterdir() if path.is_file()}
    assert wanted | {"chat_template.jinja", "README.md"} <= set(files)
    assert sum(files.values()) <= 15_000_000
    assert sum((DATA / f"{name}.jsonl").stat().st_size for name in ("train", "held_out")) < 2 * MIB


def test_weights_are_a_llama_of_4_to_7_million_bfloat16_parameters():
    from safetensors import safe_open

    config = json.loads((BASE / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["max_position_embeddings"] >= 1024
    with safe_open(BASE / "model.safetensors", "pt") as weights:
        slices = [weights.get_slice(name) for name in weights.keys()]  # noqa: SIM118
    sizes = [math.prod(part.get_shape()) for part in slices]
    assert {part.get_dtype() for part in slices} == {"BF16"}
    assert 4e6 <= sum(sizes) <= 7e6


def test_model_card_says_what_it_is_made_of():
    card = (BASE / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\n") and "license: apache-2.0" in card
    assert "pretrain_base.py" in card and "Generated text only" in card


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60))
def test_any_text_survives_the_tokenizer(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert max(ids, default=0) < len(tokenizer)


def test_special_tokens_agree_with_config_and_template(tokenizer):
    config = json.loads((BASE / "config.json").read_text())
    generation = json.loads((BASE / "generation_config.json").read_text())
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token == "<|pad|>"
    assert config["eos_token_id"] == generation["eos_token_id"] == tokenizer.eos_token_id
    assert config["pad_token_id"] == generation["pad_token_id"] == tokenizer.pad_token_id
    assert config["vocab_size"] == len(tokenizer)
    for token in ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|pad|>"):
        assert len(tokenizer(token, add_special_tokens=False)["input_ids"]) == 1


def test_template_renders_roles_tools_and_calls(tokenizer):
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
    call = {"type": "function", "function": {"name": "weather", "arguments": {"village": "Dalmora"}}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "sunny"},
    ]
    text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
    system, user, assistant, tool, prompt = text.split("<|im_start|>")[1:]
    assert system.startswith("system\nBe brief.\n\n") and json.dumps(tools[0]) in system
    assert user == "user\nWeather?<|im_end|>\n"
    found = re.fullmatch(r"assistant\n<tool_call>(.*)</tool_call><\|im_end\|>\n", assistant)
    assert json.loads(found[1]) == {"name": "weather", "arguments": {"village": "Dalmora"}}
    assert tool == "tool\nsunny<|im_end|>\n" and prompt == "assistant\n"
    plain = tokenizer.apply_chat_template(messages[1:2], tokenize=False)
    assert plain == "<|im_start|>user\nWeather?<|im_end|>\n"
    assert tokenizer.apply_chat_template(messages, tools=tools, tokenize=False) + "<|im_start|>assistant\n" == text


def test_held_out_rows_ask_in_many_ways_and_stand_alone(rows):
    assert len(rows["held_out"]) >= 500
    inputs = [row["input"] for part in rows.values() for row in part]
    assert len(set(inputs)) == len(inputs)
    for part in rows.values():
        for row in part:
            text, _, question = row["input"].rpartition("\n\n")
            assert text and question.endswith("?") and row["output"]
            assert row["output"].removeprefix("a ").removeprefix("an ") in text
    questions = [row["input"].rpartition("\n\n")[2] for row in rows["held_out"]]
    openings = {" ".join(question.split()[:2]) for question in questions}
    assert len(openings) >= 5


def test_no_answer_is_common(rows):
    answers = [row["output"] for row in rows["held_out"]]
    assert max(answers.count(answer) for answer in set(answers)) <= 0.02 * len(answers)


def test_held_out_names_are_in_no_training_row_and_no_pretraining_text(rows, generators):
    names = generators["names"]
    lexicon = {*names.all_names(), *names.all_villages()}
    used = {
        part: {word for row in rows[part] for word in re.findall("[A-Z][a-z]+", row["input"]) if word in lexicon}
        for part in rows
    }
    assert used["held_out"] and used["train"] and not used["held_out"] & used["train"]
    assert all(names.is_held_out(name) for name in used["held_out"])
    trained = names.NamePool("trained")
    assert not any(names.is_held_out(name) for name in [*trained.names, *trained.villages])


def test_pretraining_text_has_no_question_and_no_chat_token(generators):
    pool, random_ = generators["names"].NamePool("trained"), random.Random(0)
    documents = [generators["stories"].document(random_, pool, level) for level in range(4) for _ in range(1000)]
    text = "\n".join(told + recalled for told, recalled in documents)
    assert "?" not in text and "<|" not in text and "Answer" not in text


def test_data_is_made_again_byte_for_byte(tmp_path):
    subprocess.run([sys.executable, DATA / "make_data.py", "--out", tmp_path], check=True, timeout=120)
    for name in ("train.jsonl", "held_out.jsonl"):
        assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes()
