"""All 74 odd data files of the corpus: each gets its verdict, with the line that is to blame."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lora_tune.data.conversation import Message
from lora_tune.errors import DataError
from lora_tune.recipe import DataSource, Limits, Train

CORPUS = os.environ.get("LORA_TUNE_CORPUS", "")
KIT = Path(CORPUS, "cases", "datasets.py")
NAMES = re.findall(r'^case\("([^"]+)"', KIT.read_text(encoding="utf-8"), re.MULTILINE) if KIT.is_file() else []

pytestmark = pytest.mark.skipif(not NAMES, reason="LORA_TUNE_CORPUS does not name the corpus folder")


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cases")
    subprocess.run([sys.executable, KIT, folder], check=True, capture_output=True)
    expected = json.loads((folder / "expected.json").read_text())
    assert expected["settings"]["max_length"] == 512
    return folder, expected["cases"]


@pytest.fixture(scope="module")
def chat(tiny_base, tmp_path_factory):
    from transformers import AutoTokenizer

    from lora_tune.data.chat_template import load_chat_template

    os.environ["LORA_TUNE_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield load_chat_template(AutoTokenizer.from_pretrained(tiny_base))
    del os.environ["LORA_TUNE_CACHE"]


def prepared(path, case, chat):
    from lora_tune.data.pipeline import encode, read_conversations

    source = DataSource(source=str(path), format=case["format"])
    conversations = read_conversations([source], hold_out=0, seed=1)
    return encode(
        conversations,
        chat,
        loss_on=case.get("loss_on", "assistant"),
        train=Train(max_length=512),
        limits=Limits(),
        seed=1,
    )


@pytest.mark.parametrize("number", range(len(NAMES)), ids=[name.replace(" ", "_") for name in NAMES])
def test_case_gets_its_verdict(cases, chat, number):
    folder, expected = cases
    case = expected[number]
    started = time.perf_counter()
    try:
        found = prepared(folder / case["file"], case, chat)
        lines = [str(warning) for warning in found.ledger.warnings()]
        verdict = "warn" if lines else "accept"
        assert found.ledger.balances()
        assert found.ledger.total("kept") == case.get("rows", found.ledger.total("kept"))
    except DataError as error:
        verdict, lines = "refuse", [str(problem) for problem in error.problems]
    assert time.perf_counter() - started < 10
    assert verdict in (case["verdict"], case.get("or")), lines
    if case["line"] is not None and verdict != "accept":
        assert any(f"{case['file']}:{case['line']}:" in line for line in lines), lines


def test_control_tokens_stand_only_where_the_template_put_them(cases, chat):
    folder, expected = cases
    checked = [case for case in expected if "check" in case]
    assert len(checked) == 2
    for case in checked:
        found = prepared(folder / case["file"], case, chat)
        row = next(row for row in found.documents if row.line == 37)
        plain = chat.prompt_ids((Message("user", "a"),))
        control = set(chat.tokenizer.added_tokens_decoder)
        assert sum(token in control for token in row.input_ids.tolist()) == 4  # two turns, each opened and closed
        assert sum(token in control for token in plain) == 3


def test_all_bad_lines_are_named_in_one_pass(tmp_path, cases, chat):
    folder, expected = cases
    broken = [case for case in expected if case["verdict"] == "refuse" and case["line"] == 37]
    lines = [(folder / case["file"]).read_bytes().split(b"\n")[36] for case in broken if case["format"] == "messages"]
    path = tmp_path / "all.jsonl"
    path.write_bytes(b"\n".join(line for line in lines if len(line) < 2_000_000))
    with pytest.raises(DataError) as caught:
        prepared(path, {"format": "messages"}, chat)
    named = {problem.line for problem in caught.value.problems}
    count = path.read_bytes().count(b"\n") + 1
    fine_until_encoded = 3  # text parts are joined, a prompt over max_length is found later, a policy case is a warning
    assert len(named) >= count - fine_until_encoded and count > 25
    assert str(caught.value).count("\n") <= 20
