"""`lora-tune serve` itself: what it refuses before a weight is read, and how it ends under load."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import finished
import pytest
import tiny
from http_kit import Reply, read_all, reply_of
from serving_kit import write_adapter

from lora_tune import cli

TOKEN = "verb-token-0123456789"


@pytest.fixture(scope="module")
def folders(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished adapter, one of another tool, one on another base, and one that is damaged."""
    place = tmp_path_factory.mktemp("verb")
    finished.write_finished(place / "one", tiny_base)
    write_adapter(place / "plain", tiny_base, seed=5)
    other = tiny.write_base(place / "other-base" / "base", seed=9)
    finished.write_finished(place / "other", other)
    finished.write_finished(place / "damaged", tiny_base)
    weights = place / "damaged" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8] + b"\xff" * 8)
    return {path.name: path for path in place.iterdir()}


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[str]]:
    code = cli.main(["serve", "--port", "0", *arguments])
    said = capsys.readouterr()
    assert said.out == "" and "Traceback" not in said.err
    return code, said.err.strip().splitlines()


def test_what_is_wrong_is_said_before_the_base_is_loaded(
    folders: dict[str, Path], tiny_base: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_tune.serving.local import LocalBackend

    monkeypatch.delenv("LORA_TUNE_TOKEN", raising=False)
    monkeypatch.setattr(LocalBackend, "start", lambda *_, **__: pytest.fail("the base was loaded"))
    base, one = ("--base", str(tiny_base)), ("--adapter", f"one={folders['one']}")
    for arguments, code, words in (
        ((), 2, ("nothing to serve", "--adapter")),
        (("--adapter", f"p={folders['plain']}"), 2, ("which base", "--base")),
        (one, 1, ("local folder", "--base")),
        ((*one, *base, "--host", "0.0.0.0"), 2, ("--host", "LORA_TUNE_TOKEN")),
        ((*one, *base, "--token", "short"), 2, ("at least 16",)),
        ((*one, *base, "--token", "with a line\n break in it"), 2, ("printable",)),
        ((*one, *base, "--allow-loading", "nowhere"), 2, ("--allow-loading", "no such folder")),
        ((*one, *base, "--quantize", "nf5"), 2, ("--quantize", "nf4")),
        ((*base, "--adapters", "nowhere"), 2, ("--adapters", "no such folder")),
        ((*base, "--adapter", f"Bad Name={folders['one']}"), 2, ("name of an adapter",)),
        ((*one, *base, "--adapter", f"two={folders['other']}"), 1, ("belongs to the base", "one server has one base")),
        ((*base, "--adapter", f"x={folders['other']}"), 1, ("base",)),
        ((*one, *base, "--adapter", f"d={folders['damaged']}"), 1, ("adapter_model.safetensors",)),
        ((*one, "--base", "nowhere/else/at/all"), 2, ("no such folder",)),
        ((*one, *base, "--host", "192.0.2.55", "--token", TOKEN), 2, ("cannot be had",)),
    ):
        found, lines = refusal(capsys, *arguments)
        assert found == code and len(lines) == 1, (arguments, lines)
        assert all(word in lines[0] for word in words), lines


def test_an_extra_that_is_missing_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_tune.serve.find_spec", lambda name: None if name == "uvicorn" else object())
    code, lines = refusal(capsys)
    assert code == 2 and lines == ["serve needs uvicorn; pip install 'lora_tune[serve]'"]


def started(folders: dict[str, Path], base: Path, *more: str) -> tuple[subprocess.Popen[str], dict[str, Any]]:
    """The verb in a process of its own, and what it printed when it served."""
    command = [sys.executable, "-m", "lora_tune", "serve", "--base", str(base), "--adapter", f"one={folders['one']}"]
    process = subprocess.Popen(
        [*command, "--port", "0", "--json", *more],
        env={**os.environ, "LORA_TUNE_TOKEN": TOKEN},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, process.communicate()[1]
    return process, json.loads(line)


def ask(port: int, body: dict[str, Any], replies: list[Reply]) -> None:
    import socket

    data = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {TOKEN}\r\n"
    head += f"content-type: application/json\r\nconnection: close\r\ncontent-length: {len(data)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(head.encode() + data)
        replies.append(reply_of(read_all(connection)))


def test_under_load_a_signal_ends_it_without_half_answers(folders: dict[str, Path], tiny_base: Path) -> None:
    """Running answers end whole, those that wait get 503, nobody is dropped, and nothing secret was printed."""
    process, told = started(folders, tiny_base, "--max-running", "4", "--max-queue", "64")
    port = int(told["url"].rpartition(":")[2])
    assert (told["models"][1:], told["token"], told["problems"]) == (["one"], "needed", [])
    body = {"model": "one", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 150, "temperature": 1}
    replies: list[Reply] = []
    clients = [
        threading.Thread(target=ask, args=(port, {**body, "seed": n, "stream": n % 2 == 0}, replies)) for n in range(32)
    ]
    for client in clients:
        client.start()
    while len(replies) < 2 and any(client.is_alive() for client in clients):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    for client in clients:
        client.join(timeout=60)
    try:
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM
    assert len(replies) == len(clients)
    assert {reply.status for reply in replies} == {200, 503}
    for reply in replies:
        if reply.status == 503:
            assert reply.json["error"]["code"] == "stopping" and reply.headers["retry-after"]
        elif reply.headers["content-type"].startswith("text/event-stream"):
            assert reply.body.endswith(b"data: [DONE]\n\n") and b'"error"' not in reply.body
        else:
            assert reply.json["choices"][0]["finish_reason"] in ("stop", "length")
    assert TOKEN not in out + err and "Traceback" not in err
    assert "SIGTERM" in err


def test_what_is_printed_can_be_copied() -> None:
    """The two calls that the start prints are whole commands, with and without a token."""
    import shlex

    from lora_tune.serve import calls

    for needs_token in (True, False):
        curl, python = calls("http://127.0.0.1:8000", "one", token="needed" if needs_token else "none")
        words = shlex.split(curl)
        assert words[:2] == ["curl", "http://127.0.0.1:8000/v1/chat/completions"]
        assert json.loads(words[words.index("-d") + 1])["model"] == "one"
        assert ("Authorization: Bearer $LORA_TUNE_TOKEN" in words) == needs_token
        code = shlex.split(python)
        assert code[:2] == ["python", "-c"]
        compile(code[2], "call", "exec")
        assert ("LORA_TUNE_TOKEN" in code[2]) == needs_token
