"""`preview`: the rows as trained, in the terminal, as JSON and as a page; without weights; refused data ends with 3."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import pytest

from lora_tune.terminal import run_app

ROWS = [
    {"messages": [{"role": "user", "content": f"Frage {i}?"}, {"role": "assistant", "content": f"Größe {i} 🌍 «ja»"}]}
    for i in range(12)
]


@pytest.fixture(scope="module")
def base(tiny_base, tmp_path_factory):
    """The tiny base without its weights."""
    folder = tmp_path_factory.mktemp("base") / "tiny"
    shutil.copytree(tiny_base, folder)
    (folder / "model.safetensors").unlink(missing_ok=True)
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("LORA_TUNE_CACHE", str(tmp_path_factory.getbasetemp() / "preview_cache"))


@pytest.fixture
def recipe(base, tmp_path, monkeypatch):
    def write(rows, **keys):
        lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
        (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        settings = {"train": {"max_length": 128}, "eval": {"hold_out": 2}, **keys}
        text = {"base": {"name": str(base)}, "data": [{"source": "rows.jsonl"}], "output": "adapters/x", **settings}
        path = tmp_path / "recipe.yaml"
        path.write_text(json.dumps(text))  # JSON is YAML
        return path

    monkeypatch.chdir(tmp_path)
    return write


def preview(capsys, *arguments):
    from lora_tune.preview import app

    code = run_app(app, name="lora-tune preview", arguments=[str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_the_terminal_shows_trained_words_between_marks(recipe, capsys):
    code, out, err = preview(capsys, recipe(ROWS, eval={"hold_out": 0}), "--row", 3)
    assert code == 0, err
    assert "<|im_start|>assistant\n⟦Größe 2 🌍 «ja»<|im_end|>⟧" in out and "Frage 2?" in out and "Frage 3?" not in out
    for words in (
        "rows read  12",
        "answers end with <|im_end|>",
        "messages (column messages",
        "% full",
        "█",
    ):
        assert words in re.sub(r" {2,}", "  ", out), words


def test_json_holds_the_tokens_that_are_trained(recipe, capsys):
    path = recipe(ROWS)
    code, out, _ = preview(capsys, path, "--json", "--rows", 100, "--near-duplicates")
    facts = json.loads(out)
    assert code == 0 and facts["problems"] == [] and len(facts["rows"]) == 10
    assert facts["ledger"]["total"]["held_out"] == 2 and facts["near_duplicates"]["seconds"] > 0
    assert sum(bar["count"] for bar in facts["histogram"]) == 10 and facts["histogram"][0]["count"]
    from lora_tune.data.chat_template import load_chat_template
    from lora_tune.data.pipeline import encode, read_conversations
    from lora_tune.model.source import find_base, load_tokenizer
    from lora_tune.recipe_file import read_recipe

    given = read_recipe(path).recipe
    conversations = read_conversations(given.data, hold_out=given.eval.hold_out, seed=given.seed)
    chat = load_chat_template(load_tokenizer(find_base(given.base)))
    found = encode(conversations, chat, loss_on="assistant", train=given.train, limits=given.limits, seed=given.seed)
    packed = [document for row in found.train for document in _documents(row)]
    assert sorted(row["input_ids"] for row in facts["rows"]) == sorted(packed)
    for row in facts["rows"]:
        assert "".join(run["text"] for run in row["runs"]) == chat.tokenizer.decode(row["input_ids"])


def _documents(row):
    start = 0
    for length in row["seq_lengths"]:
        yield row["input_ids"][start : start + length]
        start += length


def test_the_page_stands_alone_and_escapes_what_it_shows(recipe, capsys, tmp_path):
    answer = {"role": "assistant", "content": "<script>alert(1)</script>"}
    rows = [*ROWS, {"messages": [{"role": "user", "content": "<img src=http://x/y.png>"}, answer]}]
    code, out, err = preview(capsys, recipe(rows, eval={"hold_out": 0}), "--html", "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert code == 0 and "page: page.html" in out, err
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page and "<img" not in page
    assert not re.search(r"<(link|script|img|iframe|object|embed|base|form|a)\b|@import|url\(", page)
    assert "default-src 'none'" in page and 'name="viewport"' in page and "prefers-color-scheme: dark" in page
    assert '<span class="trained">Größe 0 🌍 «ja»</span>' in page
    assert str(tmp_path) not in page
    assert page.count("<summary>") == 14  # all rows, and the template
    code, _, err = preview(capsys, recipe(rows), "--html", "nowhere/page.html")
    assert code == 2 and "cannot be written" in err


def test_refused_data_ends_with_3_and_every_problem(recipe, capsys):
    broken = [*ROWS, "{", {"messages": []}, {"messages": [{"role": "user", "content": "a"}]}]
    code, out, err = preview(capsys, recipe(broken))
    assert code == 3 and [f"rows.jsonl:{line}" in err for line in (13, 14, 15)] == [True] * 3 and "Traceback" not in err
    code, out, _ = preview(capsys, recipe(broken), "--json")
    assert code == 3 and [problem["line"] for problem in json.loads(out)["problems"]] == [13, 14, 15]


def test_above_a_limit_the_ledger_is_shown_before_it_ends_with_3(recipe, capsys):
    long = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b" * 500}]}
    code, out, err = preview(capsys, recipe([*ROWS, long], eval={"hold_out": 0}))
    assert code == 3 and "lost (cut off)" in out and "limits.lost_tokens" in err and "rows.jsonl:13" in err
    code, out, _ = preview(capsys, recipe([*ROWS, long], eval={"hold_out": 0}), "--json")
    assert code == 3 and {p["key"] for p in json.loads(out)["problems"]} >= {"limits.lost_tokens"}


def test_warnings_and_a_row_that_is_not_there(recipe, capsys):
    code, _, err = preview(capsys, recipe([*ROWS, ROWS[0]]))
    assert code == 0 and "1 of 13 rows repeat an earlier row" in err
    code, _, err = preview(capsys, recipe(ROWS), "--row", 11)
    assert code == 2 and "the data has 10 rows" in err


def test_long_rows_are_cut_in_the_terminal_unless_asked_for(recipe, capsys):
    long = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "word " * 800}]}
    settings = {"eval": {"hold_out": 0}, "train": {"max_length": 8192}}
    assert "characters…]" in preview(capsys, recipe([long], **settings))[1]
    assert "word " * 800 in preview(capsys, recipe([long], **settings), "--row", 1)[1]


def test_control_characters_of_the_data_are_shown_not_sent(recipe, capsys):
    rows = [{"messages": [{"role": "user", "content": "\x1b[31mred"}, {"role": "assistant", "content": "b"}]}]
    _, out, _ = preview(capsys, recipe(rows, eval={"hold_out": 0}))
    assert "\x1b" not in out and "\\x1b[31mred" in out


def test_nothing_but_tokenizer_and_config_is_needed(recipe):
    """In a process of its own: no training library is imported, and a helper text comes up."""
    script = (
        "import sys; from lora_tune.cli import main; code = main(['preview', sys.argv[1], '--rows', '0']);"
        "print(code, [name for name in ('trl', 'peft', 'bitsandbytes') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script, recipe(ROWS)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []", done.stderr
