"""Chat templates in Go: our interpreter against Go itself, and both against the base's own template in jinja.

Go is needed for these tests alone; without it they are skipped, unless LORA_TUNE_GO_REQUIRED=1.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import _compile_jinja_template

from lora_tune.adapter.modelfile import Modelfile, read_modelfile
from lora_tune.data.go_chat import Rendered, Turn, go_chat, ollama_text
from lora_tune.data.go_template import GoTemplate, GoTemplateError, go_quoted
from lora_tune.errors import CheckFailed

VARIABLES: dict[str, Any] = {
    "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "tools": None,
    "documents": None, "strftime_now": datetime.now().strftime,
}  # fmt: skip
CANNOT = {
    "falcon-instruct.jinja": "a chat of user: at character",  # it rewrites the words: \n\n becomes \n
    "trl_gptoss.jinja": "it writes the date of the day",
    "trl_llama3_2.jinja": "it writes the date of the day",
}
"""The templates of the corpus that Go cannot say, and why; all others are said exactly."""
Answer = dict[str, str]


@pytest.fixture(scope="session")
def go(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Sequence[Any]], list[Answer]]:
    """Renders (template, turns) by Go's text/template as Ollama fills it: {"Text"} or {"Error"} for each."""
    if shutil.which("go") is None:
        if os.environ.get("LORA_TUNE_GO_REQUIRED") == "1":
            pytest.fail("go is not installed")
        pytest.skip("go is not installed")
    folder = tmp_path_factory.mktemp("go")
    source = Path(__file__).parent / "ollama" / "render.go"
    environment = {**os.environ, "GOCACHE": str(folder / "cache"), "GOFLAGS": "-mod=mod", "GO111MODULE": "off"}
    command = ["go", "build", "-o", str(folder / "render"), str(source)]
    subprocess.run(command, check=True, capture_output=True, env=environment, timeout=200)

    def render(requests: Sequence[Any]) -> list[Answer]:
        lines = [
            json.dumps({"Template": template, "Messages": [{"Role": role, "Content": text} for role, text in turns]})
            for template, turns in requests
        ]
        done = subprocess.run(
            [folder / "render"], input="\n".join(lines) + "\n", capture_output=True, text=True, check=True, timeout=60
        )
        return [json.loads(line) for line in done.stdout.splitlines()]

    return render


def in_jinja(text: str) -> Rendered:
    """The base's own template, rendered as transformers does."""
    template = _compile_jinja_template(text)

    def render(turns: Sequence[Turn]) -> str:
        messages = [{"role": role, "content": content} for role, content in turns]
        try:
            return str(template.render(messages=messages, add_generation_prompt=True, **VARIABLES))
        except Exception as error:
            raise CheckFailed(str(error)) from error

    return render


def random_requests(draw: random.Random, count: int) -> list[list[Turn]]:
    """Requests of one to four exchanges, with and without a system message, of words that break what is careless."""
    letters = "ab \n\té雪{}\"'\\<|>%$`&"
    made = []
    for _ in range(count):
        roles = ["system"] * (draw.random() < 0.4) + ["user", "assistant"] * draw.randint(0, 3) + ["user"]
        words = ["".join(draw.choice(letters) for _ in range(draw.randint(0, 12))) + "x" for _ in roles]
        made.append(list(zip(roles, words, strict=True)))
    return made


def templates(corpus: Path) -> dict[str, str]:
    found = {}
    for path in sorted((corpus / "data" / "chat_templates").iterdir()):
        text = path.read_text(encoding="utf-8")
        found[path.name] = json.loads(text)["chat_template"] if path.suffix == ".json" else text
    return found


def test_every_real_template_is_said_exactly_or_refused(
    corpus: Path, go: Callable[[Sequence[Any]], list[Answer]]
) -> None:
    draw, requests, wanted, refused = random.Random(1), [], [], {}
    for name, text in templates(corpus).items():
        render = in_jinja(text)
        try:
            said = go_chat(render, source=text)
        except CheckFailed as error:
            refused[name] = error.problems[0].reason
            continue
        here = GoTemplate(said.text)
        for turns in random_requests(draw, 30):
            try:
                ours = ollama_text(here, turns)
            except CheckFailed:
                ours = None
            if ours is not None:  # what Go refuses, the notes name
                assert ours == render(turns), name
            else:
                assert turns[0][0] == "system" and said.notes, name
            requests.append((said.text, turns))
            wanted.append((name, ours))
    for (name, ours), answer in zip(wanted, go(requests), strict=True):
        assert answer.get("Text") == ours, name
    assert len(wanted) == 31 * 30 and set(refused) == set(CANNOT)
    for name, reason in refused.items():
        assert reason.startswith(f"the chat template cannot be said in Go's template language: {CANNOT[name]}"), reason


def random_program(draw: random.Random, depth: int = 0) -> str:
    """A template of the part of Go that we execute, which may fail."""
    values = ["$a", ".Role", ".Content", '"x"', '"user"', '""', "(slice .Content 1)", '(slice "héé" 0 2)']

    def condition() -> str:
        compared = f"eq {draw.choice(values)} {draw.choice(values)} {draw.choice(values)}"
        return draw.choice([draw.choice(values), compared, f"or ({compared}) {draw.choice(values)}"])

    parts = []
    for _ in range(draw.randint(1, 4)):
        kind = draw.random()
        if kind < 0.25:
            parts.append(draw.choice([" text\n", "é{ }", "}", "<|im_end|>", '"quoted"']))
        elif kind < 0.45:
            parts.append("{{" + draw.choice([*values, "len .Content", "slice .Role 0 1", "slice .Content 2"]) + "}}")
        elif kind < 0.6:
            parts.append("{{$a = " + draw.choice(values) + "}}")
        elif kind < 0.7:
            parts.append('{{template "t" ' + draw.choice(values) + "}}")
        elif depth < 2:
            then, other = random_program(draw, depth + 1), random_program(draw, depth + 1)
            middle = draw.choice(["", f"{{{{else}}}}{other}", f"{{{{else if {condition()}}}}}{other}"])
            parts.append(f"{{{{if {condition()}}}}}{then}{middle}{{{{end}}}}")
    return "".join(parts)


def test_our_interpreter_says_what_go_says(go: Callable[[Sequence[Any]], list[Answer]]) -> None:
    draw, requests, ours = random.Random(7), [], []
    head = '{{define "t"}}[{{.}}{{if .}}{{template "t" (slice . 1)}}{{end}}]{{end}}{{$a := "first"}}'
    for turns in random_requests(draw, 400):
        text = head + "{{range .Messages}}" + random_program(draw) + "{{end}}{{$a}}"
        requests.append((text, turns))
        try:
            ours.append(ollama_text(GoTemplate(text), turns))
        except GoTemplateError:
            ours.append("failed")
    theirs = [answer.get("Text") if "Error" not in answer else "failed" for answer in go(requests)]
    assert ours == theirs
    assert 10 <= ours.count("failed") < 100 and len(set(ours)) > 250


def test_neighbours_of_one_role_are_joined_as_in_ollama(go: Callable[[Sequence[Any]], list[Answer]]) -> None:
    template = "{{range .Messages}}<{{.Role}}>{{.Content}}{{end}}|{{.System}}"
    turns = [("system", "a"), ("system", "b"), ("user", "c"), ("user", "d"), ("tool", "e"), ("tool", "f")]
    ours = ollama_text(GoTemplate(template), turns)
    assert ours == "<system>a\n\nb<user>c\n\nd<tool>e<tool>f|a\n\nb" == go([(template, turns)])[0]["Text"]
    assert ollama_text(GoTemplate(template), [("user", "c")], system="s") == "<system>s<user>c|s"
    assert ollama_text(GoTemplate(template), [("system", "t"), ("user", "c")], system="s") == "<system>t<user>c|t"


@pytest.mark.parametrize(
    "text",
    ["{{if .A}}", "{{end}}", "{{.A | len}}", "{{- .A}}", "{{printf .A}}", "{{/* */}}", "{{nil}}", "{{(.A}}", "{{"],
)
def test_what_is_not_known_of_go_is_an_error_and_no_guess(text: str) -> None:
    with pytest.raises(GoTemplateError):
        GoTemplate(text).render({"A": "x"})


def test_a_template_that_looks_back_is_refused_with_the_place() -> None:
    counting = (
        "{% for m in messages %}<{{ m.role }}{{ loop.index }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    with pytest.raises(
        CheckFailed, match=r"a chat of user, assistant, user, assistant, user: at character \d+ it writes"
    ):
        go_chat(in_jinja(counting), source=counting)
    system_last = (
        "{% for m in messages %}{% if m.role == 'user' %}[{{ messages[0].content if loop.last and "
        "messages[0].role == 'system' else '' }}{{ m.content }}]{% elif m.role == 'assistant' %}{{ m.content }}!"
        "{% endif %}{% endfor %}"
    )
    said = go_chat(in_jinja(system_last), source=system_last)
    assert said.notes == ("Ollama refuses requests with a system message",)
    with pytest.raises(CheckFailed, match="takes no such role"):
        ollama_text(GoTemplate(said.text), [("system", "a"), ("user", "b")])


def test_a_default_system_message_becomes_the_modelfiles(corpus: Path) -> None:
    text = templates(corpus)["qwen2.5-instruct.jinja"]
    said = go_chat(in_jinja(text), source=text)
    assert said.default_system == "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    turns = [("user", "Hi")]
    here = GoTemplate(said.text)
    assert ollama_text(here, turns, system=said.default_system) == ollama_text(here, turns) == in_jinja(text)(turns)


def test_a_modelfile_is_read_back_as_it_was_written() -> None:
    file = Modelfile("./model.gguf", "./adapter.gguf", 'a\n{{"x"}} "b" \n', "Be brief.\n", ("<|im_end|>", 'a "b" c'))
    assert read_modelfile(file.text()) == file
    assert read_modelfile("# comment\n\n" + Modelfile("m", "", "t", "", ()).text()).template == "t"
    for bad in (Modelfile("m", "", 'a """ b', "", ()), Modelfile("m", "", "a", 'ends with "', ())):
        with pytest.raises(CheckFailed, match="cannot stand in a Modelfile"):
            bad.text()
    with pytest.raises(CheckFailed, match="not known in a Modelfile"):
        read_modelfile("RUN rm -rf\n")


def test_quoted_text_is_gos(go: Callable[[Sequence[Any]], list[Answer]]) -> None:
    texts = ['a "b"', "{{.X}}", "\\n\n\r\t", "é雪🙂", '"""', "\x00\x07", "`$`"]
    answers = go([("{{" + go_quoted(text) + "}}", [("user", "x")]) for text in texts])
    assert [answer["Text"] for answer in answers] == texts
    assert all('"""' not in go_quoted(text)[1:-1] for text in texts)
