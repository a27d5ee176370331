"""Prompt files and their renders: what is read, what is refused and how it is said, and what a template cannot do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_tune.data.prompt_file import Prompt, PromptFile, read_prompts
from lora_tune.data.rendering import Job, Render, check_variables, render, variables
from lora_tune.errors import LoraTuneError

FILE = """\
dataset: small
templates:
  one: !Template
    answer_choices: no ||| yes
    id: one
    jinja: 'Is {{a}} like {{b}}?

      |||

      {{ answer_choices[label] }}'
    metadata: !TemplateMetadata
      choices_in_prompt: true
      metrics: [Accuracy]
      original_task: true
    name: alike
    reference: ''
  two: !Template
    answer_choices: null
    jinja: "{% if label %}{{a}} |||{{b}}{% endif %}"
    name: other
"""
ROW = {"a": "fish", "b": "bird", "label": 1, "words": ["x", "y", "y"]}


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Writes a text to prompts.yaml in the working folder."""
    monkeypatch.chdir(tmp_path)

    def write(text: str) -> Path:
        Path("prompts.yaml").write_text(text, encoding="utf-8")
        return Path("prompts.yaml")

    return write


def file_of(*texts: tuple[str, str | None]) -> PromptFile:
    """A prompt file with these (jinja, choices), the n-th at line n."""
    prompts = tuple(Prompt(f"t{n}", jinja, choices, False, n) for n, (jinja, choices) in enumerate(texts, 1))
    return PromptFile("prompts.yaml", "prompts.yaml", "0" * 64, prompts)


def renders(jinja: str, *rows: dict[str, object], choices: str | None = None, seed: int = 1) -> list[Render]:
    """One template over rows."""
    jobs = [Job(0, seed + n, json.dumps(row), f"rows.jsonl:{n}") for n, row in enumerate(rows or (ROW,), 1)]
    return [made for _, made in render(file_of((jinja, choices)), jobs)]


def refusal(of: Callable[[], object]) -> str:
    """The one line that refuses."""
    with pytest.raises(LoraTuneError) as caught:
        of()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- the file ----------


def test_promptsource_yaml_is_read_as_it_is(written: Callable[[str], Path]) -> None:
    one, two = read_prompts(written(FILE)).prompts
    assert (one.name, one.choices, one.lists_choices, one.line) == ("alike", "no ||| yes", True, 6)
    assert (two.name, two.choices, two.lists_choices) == ("other", None, False)
    assert one.jinja == "Is {{a}} like {{b}}?\n|||\n{{ answer_choices[label] }}"


def test_templates_are_chosen_by_name(written: Callable[[str], Path]) -> None:
    assert [prompt.name for prompt in read_prompts(written(FILE), templates=("other",)).prompts] == ["other"]
    said = refusal(lambda: read_prompts(Path("prompts.yaml"), templates=("alik",), key="data.0.templates"))
    assert said == "data.0.templates: no such template in prompts.yaml, got 'alik'; did you mean `alike`?"


TEMPLATE = "templates:\n  1:\n    name: n\n    jinja: 'a ||| b'\n"
BROKEN = [
    (TEMPLATE.replace("  1:", "  1: !!python/object/apply:os.system"), "prompts.yaml:2:6: templates.1: tags are not"),
    (TEMPLATE.replace("'a |", "&x 'a |"), "prompts.yaml:4:12: templates.1.jinja: anchors are not allowed"),
    (TEMPLATE.replace("'a ||| b'", "'a b'"), "prompts.yaml:4:12: template 'n' has no |||"),
    (TEMPLATE.replace("jinja", "jina"), "unknown key `jina` of a template; did you mean `jinja`?"),
    (TEMPLATE.replace("    name: n\n", ""), "a template needs a name"),
    (TEMPLATE + "  2: {name: n, jinja: 'a ||| b'}\n", "prompts.yaml:5: template name 'n' stands twice"),
    (TEMPLATE + "    answer_choices: [no, yes]\n", "answer_choices of 'n' must be text; write them as 'no ||| yes'"),
    (TEMPLATE + "    metadata: {choices_in_prompt: maybe}\n", "choices_in_prompt must be true or false, got 'maybe'"),
    (TEMPLATE + "    metadata: {choises: 1}\n", "unknown key `choises` of metadata"),
    ("templates:\n  1: text\n", "a template must be a mapping, got text"),
    ("rows: []\n", "prompts.yaml:1: holds no templates"),
    ("", "prompts.yaml: holds no templates"),
    ("templates: {", "prompts.yaml:1:13: the bracket { is never closed"),
]


@pytest.mark.parametrize(("text", "expected"), BROKEN, ids=[expected[-30:] for _, expected in BROKEN])
def test_what_a_file_cannot_be(written: Callable[[str], Path], text: str, expected: str) -> None:
    with pytest.raises(LoraTuneError) as caught:
        read_prompts(written(text))
    assert caught.value.exit_code == 2
    assert expected in str(caught.value) and all(p.file == "prompts.yaml" for p in caught.value.problems)


def test_the_real_files_of_promptsource_load_and_compile(corpus: Path) -> None:
    files = sorted((corpus / "data" / "datasets" / "promptsource").glob("*.yaml"))
    assert len(files) == 13
    read = {path.stem: read_prompts(path) for path in files}
    assert {name: len(file.prompts) for name, file in read.items()} == {
        "ag_news": 7, "common_gen": 9, "cosmos_qa": 13, "glue__mrpc": 7, "hellaswag": 11, "imdb": 11,
        "paws__labeled_final": 12, "samsum": 7, "super_glue__boolq": 10, "super_glue__cb": 15, "trec": 18,
        "wiki_qa": 11, "xsum": 10,
    }  # fmt: skip
    assert set().union(*variables(read["glue__mrpc"])) == {"sentence1", "sentence2", "label"}
    assert set().union(*variables(read["hellaswag"])) == {"ctx", "endings", "label", "activity_label", "ctx_a", "ctx_b"}


REAL_ROWS = {
    "ag_news": {"text": "Rain in Rome", "label": 1},
    "common_gen": {"concepts": ["dog", "run"], "target": "A dog runs."},
    "cosmos_qa": {
        "context": "c",
        "question": "q?",
        "answer0": "a",
        "answer1": "b",
        "answer2": "c c",
        "answer3": "d",
        "label": 2,
    },
    "hellaswag": {
        "ctx": "He runs",
        "ctx_a": "He",
        "ctx_b": "runs",
        "endings": ["w", "x", "y", "z"],
        "label": "3",
        "activity_label": "running",
    },
    "super_glue__cb": {"premise": "It rains.", "hypothesis": "it is wet", "label": 0},
    "trec": {"text": "Who?", "coarse_label": 3, "fine_label": 29},
}


@pytest.mark.parametrize("name", REAL_ROWS)
def test_real_templates_render_real_rows(name: str, corpus: Path) -> None:
    """Every template gives an input and a target that is one of the choices, or does not apply to this row."""
    file = read_prompts(corpus / "data" / "datasets" / "promptsource" / f"{name}.yaml")
    row = json.dumps(REAL_ROWS[name])
    made = [one for _, one in render(file, [Job(n, 5, row, "r:1") for n in range(len(file.prompts))])]
    assert not any(one.error for one in made)
    assert sum(one.applies for one in made) >= {"trec": 6}.get(name, len(made))
    for prompt, one in zip(file.prompts, made, strict=True):
        if prompt.choices and one.applies and prompt.name != "context_answer_to_question":
            assert one.parts[1] in one.choices, prompt.name


# --- what a template can do ----------


def test_input_target_and_choices() -> None:
    jinja = " {{a}}?\n||| {{answer_choices[label]}}  "
    (made,) = renders(jinja, choices="no {{a}} ||| yes {{b}}")
    assert made == Render(("fish?", "yes bird"), ("no fish", "yes bird"))


def test_a_separator_inside_the_data_is_text() -> None:
    row = {"a": "x ||| y", "b": ["p|||q"], "label": 0}
    (made,) = renders("{{a}} ||| {{b[0]}} {{answer_choices[0]}}", row, choices="{{a}} ||| z")
    assert made == Render(("x ||| y", "p|||q x ||| y"), ("x ||| y", "z"))


def test_what_does_not_apply() -> None:
    rows: list[dict[str, object]] = [{"a": "x", "label": 1}, {"a": "x", "label": 0}, {"a": None, "label": 1}]
    found = renders("{% if label %}{{a}} ||| y{% endif %}", *rows)
    assert [made.applies for made in found] == [True, False, False]
    assert not renders("{{a}} ||| {{answer_choices[label]}}", {"a": "x", "label": 5}, choices="no ||| yes")[0].applies


def test_further_parts_are_further_right_answers() -> None:
    assert renders("q ||| a ||| b")[0].parts == ("q", "a", "b")


def test_filters_of_promptsource_draw_by_the_seed() -> None:
    jinja = (
        "{{ words | choice }}{{ [1, 2, 3, 4, 5, 6] | choice }}{{ range(99) | random }} ||| {{ words | most_frequent }}"
    )
    again = [renders(jinja, seed=seed)[0].parts[0] for seed in (1, 1, 2, 3)]
    assert again[0] == again[1] and len(set(again)) > 1
    assert renders(jinja)[0].parts[1] == "['y']"
    assert renders("{% for p, q in zip(words, [1, 2]) %}{{p}}{{q}}{% endfor %} ||| b")[0].parts[0] == "x1y2"


# --- what it cannot ----------

STOPPED = [
    ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "does not end within 1 s"),
    ("{% for i in range(99999) %}{{ 'aaaaaaaaaaaaaaaaaaaaaa' }}{% endfor %}", "writes more than 1,048,576 characters"),
    ("{{ 'a' | center(2000000000) }}", "too much memory"),
    ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "nested too deeply"),
    ("{{ words.append(1) }}", "unsafe"),
    ("{{ nothing.x }}", "'nothing' is undefined"),
    ("{% include 'x' %}", "no loader"),
]


@pytest.mark.parametrize(("jinja", "expected"), STOPPED, ids=[expected for _, expected in STOPPED])
def test_a_template_cannot_run_grow_or_reach_out(jinja: str, expected: str) -> None:
    try:
        (made,) = renders(f"{jinja} ||| b")
        said = made.error
    except LoraTuneError as error:
        said = str(error)
        assert said.startswith("prompts.yaml:1: template 't1' is stopped at row rows.jsonl:1: it ")
    assert expected in said and "\n" not in said


REFUSED = [
    ("{{ a.__class__ }}", "reaches for Python's internals ('__class__')"),
    ("{{ a | attr('__init__') }}", "reaches for Python's internals ('__init__')"),
    ("{% if %}", "does not compile: line 1"),
    ("{{ 'a' | nothing }}", "No filter named 'nothing'"),
    ("{{ 'a' * 9999999999 }}" + "{{ x | join('b' * 999999999) }}", "it "),
]


@pytest.mark.parametrize(("jinja", "expected"), REFUSED, ids=[jinja[:20] for jinja, _ in REFUSED])
def test_a_template_that_is_refused_before_a_row_is_read(jinja: str, expected: str) -> None:
    said = refusal(lambda: variables(file_of(("{{a}} ||| b", None), (f"{jinja} ||| b", None))))
    assert said.startswith("prompts.yaml:2: template 't2' is refused: it ") and expected in said


def test_the_row_after_one_that_fails_is_rendered() -> None:
    found = renders("{{ 1 // n }} ||| b", {"n": 1}, {"n": 0}, {"n": 1})
    assert [made.applies for made in found] == [True, False, True]
    assert "division" in found[1].error


def test_columns_are_checked_against_the_data() -> None:
    file = file_of(("{{questin}} ||| {{a}}", "{{b}}"), ("{{a}} ||| {{c}}", None))
    problems = check_variables(file, variables(file), ["question", "a", "b"])
    assert [str(problem) for problem in problems] == [
        "prompts.yaml:1: template 't1' reads `questin`, which the data does not have; did you mean `question`?",
        "prompts.yaml:2: template 't2' reads `c`, which the data does not have; "
        "it has `question`, `a`, `b`; other names go into data[].columns",
    ]
