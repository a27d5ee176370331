"""Other engines: what is exported and refused for them, their commands, their start and end, their words over HTTP.

llama.cpp's servers are really run where they are (`make nightly`; LORA_TUNE_LLAMA_PYTHON names a Python that has
llama-cpp-python's, LORA_TUNE_LLAMA_SERVER the program llama-server). vLLM and SGLang need a GPU and environments of
their own: here their part is the protocol that they speak.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import tiny
from finished import write_finished
from safetensors.torch import load_file

from lora_tune.adapter.canonical import canonical
from lora_tune.adapter.folder import CONFIG, WEIGHTS
from lora_tune.adapter.load import read_adapter
from lora_tune.adapter.parity import check_parity
from lora_tune.adapter.transformers_words import transformers_words
from lora_tune.cli import main
from lora_tune.data.conversation import Conversation, Message
from lora_tune.errors import CheckFailed, ResourceError, UsageError
from lora_tune.serving.engine_process import running
from lora_tune.serving.engines import EngineCommand, EngineName, Wanted, plan_engine
from lora_tune.serving.served_base import served_base
from lora_tune.serving.served_words import served_render

ENGINES: tuple[EngineName, ...] = ("vllm", "sglang", "llama.cpp")
TOKEN = "engine-token-0123456789"
LLAMA = os.environ.get("LORA_TUNE_LLAMA_PYTHON") or (
    sys.executable if importlib.util.find_spec("llama_cpp") and importlib.util.find_spec("starlette_context") else ""
)
SERVER = os.environ.get("LORA_TUNE_LLAMA_SERVER", "")  # llama.cpp's own, which no package brings


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> dict[str, Path]:
    """Adapters over the tiny base: two plain ones, rsLoRA with a pattern, DoRA, and one with a template of its own."""
    folder = tmp_path_factory.mktemp("engines")
    other = folder / "other.jinja"
    other.write_text(tiny.CHATML.replace("\\n' + (message", "\\n\\n' + (message"))
    for name, keys in {
        "one": {"lora": {"rank": 4, "alpha": 8}},
        "two": {"lora": {"rank": 2, "alpha": 8, "alpha_pattern": {"q_proj": 3}}},
        "rs": {"lora": {"rank": 16, "alpha": 16, "method": "rslora"}},
        "dora": {"lora": {"method": "dora"}},
    }.items():
        write_finished(folder / name, tiny_base, **keys)  # type: ignore[arg-type]
    own = tiny.write_base(folder / "own-base" / tiny_base.name, chat_template=other.read_text())
    write_finished(folder / "own", own)
    return {path.name: path for path in folder.iterdir() if (path / CONFIG).is_file()}


@pytest.fixture(scope="module")
def planned(adapters: dict[str, Path], tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Plans an engine for some of these adapters; the same plan is made once, but for `fresh`."""
    place = tmp_path_factory.mktemp("plans") / "served"
    known: dict[str, EngineCommand] = {}

    def plan(engine: EngineName, *names: str, fresh: str = "", **wanted: Any) -> EngineCommand:
        key = f"{engine} {names} {fresh} {wanted}"
        if key not in known:
            folders = {name: adapters[name] for name in names}
            base, _ = served_base(folders, name=str(tiny_base))
            known[key] = plan_engine(engine, folders, base=base, wanted=Wanted(place, **wanted))
        return known[key]

    return plan


def value(command: EngineCommand, flag: str) -> str:
    """What stands behind a flag."""
    return command.arguments[command.arguments.index(flag) + 1]


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_gets_the_canonical_adapter_under_its_name(
    planned: Any, adapters: dict[str, Path], engine: EngineName
) -> None:
    command = planned(engine, "one", "rs")
    text = command.text()
    assert shlex.split(text)[-len(command.arguments) :] == list(command.arguments)
    assert any(("tested with" if engine == "llama.cpp" else "untested") in note for note in command.notes)
    if engine == "llama.cpp":
        files = [Path(word) for word in command.arguments if word.endswith("adapter.gguf")]
        assert len(files) == 2 and all(file.is_file() for file in files) and Path(value(command, "--model")).is_file()
        assert "--lora-init-without-apply" in command.arguments
        return
    for name in ("one", "rs"):
        (word,) = [word for word in command.arguments if word.startswith(f"{name}=")]
        folder = Path(word.partition("=")[2])
        expected = canonical(read_adapter(adapters[name]))
        written = load_file(folder / WEIGHTS)
        assert written.keys() == expected.adapter.tensors.keys()
        assert all((written[key] == tensor).all() for key, tensor in expected.adapter.tensors.items())
        assert json.loads((folder / CONFIG).read_text())["use_rslora"] is False
    assert int(value(command, "--max-lora-rank")) >= 16
    assert command.names["one"] == ("one" if engine == "vllm" else "base:one")


@pytest.mark.parametrize("engine", ENGINES)
def test_what_an_engine_would_run_wrong_is_refused_before_anything_is_started(planned: Any, engine: EngineName) -> None:
    with pytest.raises(CheckFailed, match="merge"):
        planned(engine, "dora")
    with pytest.raises(UsageError, match="--adapter"):
        planned(engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_one_engine_has_one_template(planned: Any, engine: EngineName, adapters: dict[str, Path]) -> None:
    with pytest.raises(CheckFailed, match="different chat templates"):
        planned(engine, "one", "own")
    command = planned(engine, "own")
    flag = {"vllm": "--tokenizer", "sglang": "--tokenizer-path", "llama.cpp": "--chat-template-file"}[engine]
    place = Path(value(command, flag))
    file = place if engine == "llama.cpp" else place / "chat_template.jinja"
    assert file.read_text() == (adapters["own"] / "chat_template.jinja").read_text()


def test_an_export_that_is_there_is_used_again_and_a_changed_adapter_is_not(planned: Any) -> None:
    first, second = planned("vllm", "one"), planned("vllm", "one", fresh="again")
    assert first.arguments == second.arguments
    assert planned("vllm", "two").arguments[-1] != first.arguments[-1]


def test_the_token_is_in_no_command(planned: Any, tmp_path: Path) -> None:
    for engine, names in (("vllm", ("one",)), ("llama.cpp", ("one",))):
        command = planned(engine, *names, token=TOKEN)
        assert TOKEN not in command.text() + repr(command) and "$LORA_TUNE_TOKEN" in command.text()
        assert TOKEN in command.environment.values()
    command = planned("llama.cpp", "one", token=TOKEN, program=Path("/opt/python3"))
    settings = Path(command.arguments[-1])
    assert json.loads(settings.read_text())["api_key"] == TOKEN and settings.stat().st_mode & 0o077 == 0
    with pytest.raises(UsageError, match="command line"):
        planned("sglang", "one", token=TOKEN)


def test_the_verb_prints_the_command(
    adapters: dict[str, Path], tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["serve", "--adapter", f"one={adapters['one']}", "--base", str(tiny_base)]
    words += ["--engine-folder", str(tmp_path / "served")]
    assert main([*words, "--engine", "vllm"]) == 0
    assert "\nVLLM_NO_USAGE_STATS=1 vllm serve " in capsys.readouterr().out
    assert main([*words, "--engine", "sglang", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert "sglang.launch_server" in facts["command"] and facts["models"] == ["base", "base:one"]
    assert main([*words, "--engine", "vllm", "--start", "check", "--engine-python", "/nowhere/vllm"]) == 2
    assert "cannot be started" in capsys.readouterr().err


# a process

ENGINE = """
import http.server, os, subprocess, sys, time
print("starting up")
if sys.argv[1] == "ends": sys.exit("no GPU is here")
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open(sys.argv[3], "w").write(f"{os.getpid()} {child.pid}")
if sys.argv[1] == "mute": time.sleep(600)
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404); self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[2])), Answer).serve_forever()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="process groups")
@pytest.mark.parametrize("kind", ["answers", "ends", "mute"])
def test_an_engine_is_waited_for_and_ended_with_its_children(kind: str, planned: Any, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = replace(
        planned("vllm", "one"),
        url=f"http://127.0.0.1:{port}",
        arguments=(sys.executable, "-c", ENGINE, kind, str(port), str(pids)),
    )
    log = tmp_path / "engine.log"
    if kind == "answers":
        with running(command, log=log, wait_s=60) as process:
            assert process.poll() is None
    else:
        with (
            pytest.raises(UsageError if kind == "ends" else ResourceError) as caught,
            running(command, log=log, wait_s=2),
        ):
            pytest.fail("it did not answer")
        said = "\n".join(map(str, caught.value.problems))
        assert ("exit code 1" in said and "no GPU is here" in said) if kind == "ends" else "does not answer" in said
    for pid in pids.read_text().split() if pids.exists() else ():
        with pytest.raises(ProcessLookupError):
            while True:  # its parent has been waited for; init takes the child a moment later
                os.kill(int(pid), 0)
                if Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] == "Z":
                    raise ProcessLookupError


# words over HTTP


@contextmanager
def speaker(tokenizer: Path, *, slip: str = "") -> Iterator[str]:
    """A server of vLLM's and llama-server's token endpoints by transformers' own rendering, with a slip or without."""
    render, _ = transformers_words(tokenizer)

    class Answer(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            turns = [Message(turn["role"], turn["content"]) for turn in body.get("messages", ())]
            if self.path == "/apply-template":
                said: Any = {"prompt": json.dumps(body["messages"])}
            else:
                turns = turns or [Message(one["role"], one["content"]) for one in json.loads(body["content"])]
                ids = list(render(Conversation(messages=tuple(turns))))
                said = {"tokens": [tiny.DOCUMENT, *ids] if slip == "bos" else ids[:-1] if slip == "end" else ids}
            data = json.dumps(said).encode()
            self.send_response(500 if slip == "fails" else 200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.parametrize("engine", ["vllm", "llama.cpp"])
@pytest.mark.parametrize(
    ("slip", "said"), [("", ""), ("bos", "from token 0"), ("end", "other words"), ("fails", "500")]
)
def test_words_of_a_running_engine_are_compared_token_by_token(
    planned: Any, engine: EngineName, slip: str, said: str
) -> None:
    command = planned(engine, "one")
    words = command.words["one"]
    with speaker(Path(command_tokenizer(planned)), slip=slip) as url:
        render, proof = served_render(replace(command, url=url), model="one", chat=words.chat)
        assert "gave the ids" in proof
        if not slip:
            found = check_parity(words.chat, render, words.conversations, stop_ids=words.stop_ids, target=engine)
            assert found.prompts >= 3
            return
        with pytest.raises(CheckFailed, match=said):
            check_parity(words.chat, render, words.conversations, stop_ids=words.stop_ids, target=engine)


def command_tokenizer(planned: Any) -> str:
    """The exported folder of `one`, which has its tokenizer."""
    return str(planned("vllm", "one").arguments[-1].partition("=")[2])


@pytest.mark.nightly
@pytest.mark.parametrize(("program", "least", "proof"), [(LLAMA, 14, "same first words"), (SERVER, 20, "gave the ids")])
def test_llama_cpps_servers_speak_openais_api_and_the_words_of_training(
    program: str, least: int, proof: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not program and (program == SERVER or "LORA_TUNE_ENGINES_REQUIRED" not in os.environ):
        pytest.skip("LORA_TUNE_LLAMA_PYTHON and LORA_TUNE_LLAMA_SERVER name them")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = ["serve", "--adapter", str(root / "adapters" / "example")]
    words += ["--engine", "llama.cpp", "--engine-python", program, "--start", "check"]
    words += ["--port", str(port), "--engine-folder", str(tmp_path / "served"), "--json"]
    code = main(words)
    facts = json.loads(capsys.readouterr().out)
    assert code == 0, facts
    assert all(found["prompts"] >= 3 for found in facts["parity"].values()) and proof in facts["proof"]
    for checks in facts["conformance"].values():
        assert list(checks.values()).count("passed") >= least and "failed" not in checks.values()
