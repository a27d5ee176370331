"""Every code block of the README is run, in the order in which it stands there; a comment above each says how.

    make                          each line by `make -n`: the target exists, and its recipe is printed
    run [with WORDS]              each line is run, with the words added
    install                       the environment is the Makefile's, the package installs the command `lora-tune`
    background [with WORDS]       each line is started, with the words added, and goes on until the last test here
    python [with OLD=NEW …]       run by Python, with names replaced
    the file PATH                 the block is that file
    shown by COMMAND              output of a command that stands below: the real one has the same parts

`{tiny}`, `{rows}` and `{adapter}` stand for a base, a data file and an adapter on it made for the test.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import runpy
import shlex
import shutil
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny
import warm

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
FENCE = re.compile(
    r"(?:<!-- test: (?P<how>[^\n]*) -->\n)?^```(?P<language>\w*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True)
class Block:
    """One fenced block and the comment above it."""

    how: str | None
    language: str
    body: str
    line: int

    @property
    def kind(self) -> str:
        """The first word of the comment; "the" and "shown" are followed by more."""
        return (self.how or "").split(" ", 1)[0]

    @property
    def extra(self) -> str:
        """What stands behind `with`."""
        return (self.how or "").partition(" with ")[2]

    @property
    def commands(self) -> list[str]:
        """The lines of a shell block, without comments."""
        return [line.split("#")[0].strip() for line in self.body.splitlines() if line.split("#")[0].strip()]


BLOCKS = [
    Block(found["how"], found["language"], found["body"], TEXT[: found.start("body")].count("\n"))
    for found in FENCE.finditer(TEXT)
]


def blocks(kind: str) -> list[pytest.ParameterSet]:
    """The blocks of one kind, named by their line."""
    return [pytest.param(block, id=f"line-{block.line}") for block in BLOCKS if block.kind == kind]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with the recipes, a base and rows; adapters and merged models are written there."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    shutil.copytree(ROOT / "adapters" / "example", folder / "adapters" / "example")
    tiny.write_base(folder / "tiny")
    rows = [{"instruction": f"Add {number} and 1.", "input": "", "output": f"{number + 1}"} for number in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def printed() -> dict[str, str]:
    """Command line as the README has it -> what it printed when it was run."""
    return {}


def free_port(known: list[int] = []) -> int:  # noqa: B006  (one for the whole file)
    """A port that nobody has."""
    if not known:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            known.append(taken.getsockname()[1])
    return known[0]


def filled(text: str, place: Path) -> str:
    text = text.replace("{port}", str(free_port()))
    names = {"{tiny}": place / "tiny", "{rows}": place / "rows.jsonl", "{adapter}": place / "adapters" / "alpaca"}
    for name, path in names.items():
        text = text.replace(name, str(path))
    return text


@pytest.fixture(scope="module")
def servers() -> Iterator[list[subprocess.Popen[str]]]:
    """What blocks have started in the background; ended behind the last test."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.terminate()
        process.communicate(timeout=60)


def execute(arguments: list[str], place: Path) -> str:
    """Run a command of the project in the working folder, offline; its output. Fails with everything it printed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
    done = warm.command(arguments, cwd=place, env=environment)
    assert done.returncode == 0, f"{shlex.join(arguments)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def as_arguments(command: str) -> list[str]:
    """The words of a command line behind `lora-tune`: the verb and its arguments."""
    words = shlex.split(command)
    if words[:3] == ["python", "-m", "lora_tune.run"]:
        return ["run", *words[3:]]
    assert words[0] == "lora-tune", f"a command that this test cannot run: {command}"
    return words[1:]


def test_the_first_lines_are_the_two_commands() -> None:
    first = TEXT.split("```")[1].splitlines()
    assert [line.split("#")[0].strip() for line in first[1:] if line] == ["make quickstart", "make test"]
    assert TEXT.index("```") < 200


def test_every_block_says_how_it_is_tested() -> None:
    kinds = {"make", "install", "run", "background", "python", "the", "shown"}
    assert len(BLOCKS) == TEXT.count("\n```") / 2
    for block in BLOCKS:
        assert block.kind in kinds, f"README.md:{block.line}: a code block without a test"
        assert (block.kind == "shown") == (block.language == "text"), f"README.md:{block.line}"
        is_shell = block.kind in ("run", "make", "install", "background")
        assert is_shell == (block.language == "sh"), f"README.md:{block.line}"


def test_no_placeholder_is_left_and_links_lead_somewhere() -> None:
    assert "PASTE" not in TEXT
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_the_table_of_all_keys_is_up_to_date() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "recipe_keys.py"))["keys_table"]()
    assert (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8") == made, "run: python docs/recipe_keys.py"


RESULTS = "benchmarks/results"


@pytest.mark.parametrize("source", ["docs/which_card.md", f"{RESULTS}/plan_accuracy.md", f"{RESULTS}/side_by_side.md"])
def test_tables_are_those_that_were_made(source: str) -> None:
    """The first table of each file stands in the README, line by line."""
    lines = (ROOT / source).read_text(encoding="utf-8").splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("|"))
    last = next(number for number, line in enumerate([*lines, ""][first:], start=first) if not line.startswith("|"))
    assert last - first > 5 and "\n".join(lines[first:last]) in TEXT


@pytest.mark.parametrize("block", blocks("make"))
def test_make_knows_the_target(block: Block) -> None:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    for command in block.commands:
        words = shlex.split(command)
        done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0 and done.stdout.strip(), done.stderr
    quickstart = subprocess.run(
        ["make", "-n", "quickstart"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert "-m lora_tune.run recipes/quickstart.yaml" in quickstart


@pytest.mark.parametrize("block", blocks("install"))
def test_what_is_installed_has_the_command(block: Block) -> None:
    """Building the wheel needs the network for its backend, so that the parts of an installation are looked at."""
    assert block.commands == [". .venv/bin/activate", "pip install ."]
    assert re.search(r"^VENV \?= \.venv$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, name = project["scripts"]["lora-tune"].partition(":")
    assert callable(vars(importlib.import_module(module))[name])


@pytest.mark.parametrize("block", blocks("the"))
def test_a_file_is_shown_as_it_is(block: Block) -> None:
    assert block.how is not None
    path = ROOT / block.how.removeprefix("the file ")
    assert block.body == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("block", blocks("run"))
def test_commands_run(block: Block, place: Path, printed: dict[str, str]) -> None:
    for command in block.commands:
        printed[command] = execute([*as_arguments(command), *shlex.split(filled(block.extra, place))], place)


@pytest.mark.parametrize("block", blocks("background"))
def test_servers_start(block: Block, place: Path, servers: list[subprocess.Popen[str]]) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    for command in block.commands:
        words = [*as_arguments(command), *shlex.split(filled(block.extra, place))]
        process = subprocess.Popen(
            [sys.executable, "-m", "lora_tune", *words],
            cwd=place,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        servers.append(process)
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line)
            if line.startswith("serving "):
                break
        else:
            pytest.fail("".join(said))


@pytest.mark.parametrize("block", blocks("python"))
def test_python_runs(block: Block, place: Path, servers: list[subprocess.Popen[str]]) -> None:
    code = block.body
    for change in shlex.split(filled(block.extra, place)):
        old, _, new = change.partition("=")
        assert old in code
        code = code.replace(old, new)
    execute(["-c", code], place)


@pytest.mark.parametrize("block", blocks("shown"))
def test_what_is_shown_has_the_form_of_real_output(block: Block, printed: dict[str, str]) -> None:
    assert block.how is not None
    command = block.how.removeprefix("shown by ")
    assert command in printed, f"run all tests of this file: {command} has not been run"
    for words in (
        "base against adapter",
        "loss ↓",
        "exact_match ↑",
        "rouge_l ↑",
        "95 % interval",
        "sample 1 of",
        "verified",
    ):
        assert words in printed[command]
        assert words in block.body
