"""What must not be answered is refused with a 4xx that says why and gives nothing away; who is slow is let go."""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from http_kit import Reply, Running, Scripted, read_all, reply_of, serving
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving_kit import base_section, write_adapter

from lora_tune.data.chat_template import ChatTemplate, load_chat_template
from lora_tune.model.source import find_base, load_tokenizer
from lora_tune.serving.api import build_app
from lora_tune.serving.backend import EngineFailed, Finished, Piece, Request
from lora_tune.serving.engine import Limits
from lora_tune.serving.local import LocalBackend
from lora_tune.serving.refusals import without_paths
from lora_tune.serving.settings import Caps, ServeSettings

TOKEN = "a-token-for-the-tests"
CAPS = Caps(header_s=1.0, body_s=1.0, write_s=1.0, messages=32, connections=700, adapters=2)
CHAT = "/v1/chat/completions"
ASK: dict[str, Any] = {"model": "one", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
TEXT: dict[str, Any] = {"model": "one", "prompt": "Hi", "max_tokens": 4}


class Place:
    """Servers over one engine: `free` without a token and with loading, `locked` with one, `off` without loading."""

    def __init__(self, servers: list[Running], root: Path, backend: LocalBackend) -> None:
        self.free, self.locked, self.off = servers
        self.root, self.backend = root, backend


@pytest.fixture(scope="module")
def place(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("serve")
    root = folder / "root"
    write_adapter(root / "two", tiny_base, seed=2)
    write_adapter(folder / "outside", tiny_base, seed=3)
    (root / "link").symlink_to(folder / "outside")
    hostile = write_adapter(root / "hostile", tiny_base, seed=4)
    (hostile / "training_args.bin").write_bytes(b"\x80\x04N.")
    (hostile / "adapter_model.safetensors").write_bytes(b"\xff" * 64)
    one = write_adapter(folder / "one", tiny_base, seed=1)
    backend = LocalBackend.start(base_section(tiny_base), adapters={"one": one}, limits=Limits(rows=4, queue=8))
    free = ServeSettings(caps=CAPS, loading=root)
    off = replace(free, loading=None, caps=replace(CAPS, connections=6))
    with serving(backend, free, replace(free, token=TOKEN), off) as servers:
        yield Place(servers, root, backend)


def refused(reply: Reply, status: int | tuple[int, ...], place: Place, *, says: str = "") -> None:
    """The reply is this refusal, in OpenAI's form, and gives nothing away."""
    statuses = (status,) if isinstance(status, int) else status
    assert reply.status in statuses, reply
    error = reply.json["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    assert says in error["message"]
    told = reply.body.decode()
    for secret in (str(place.root), str(place.root.parent), "Traceback", ".py", "site-packages", TOKEN):
        assert secret not in told, told


# ----- bodies -----
def deep(levels: int) -> bytes:
    return b'{"model":' + b"[" * levels + b"]" * levels + b"}"


BODIES: dict[str, tuple[bytes | str, int]] = {
    "empty": (b"", 400),
    "no JSON": (b"hello", 400),
    "a list": (b"[]", 400),
    "a number": (b"5", 400),
    "half": (b'{"model": "one"', 400),
    "two objects": (b"{}{}", 400),
    "invalid UTF-8": (b'{"model": "\xff\xfe"}', 400),
    "UTF-16": (json.dumps(ASK).encode("utf-16"), 400),
    "a lone surrogate": (b'{"model": "one", "messages": [{"role": "user", "content": "\\ud800"}]}', 400),
    "a duplicate key": (b'{"model": "one", "model": "two"}', 400),
    "100 000 duplicate keys": (b"{" + b",".join([b'"a":1'] * 100_000) + b"}", 400),
    "60 000 keys": (b"{" + b",".join(b'"k%d":1' % n for n in range(60_000)) + b"}", 400),
    "depth 10 000": (deep(10_000), 400),
    "depth 100": (deep(100), 400),
    "NaN": (json.dumps({**ASK, "temperature": float("nan")}).encode(), 400),
    "Infinity": (json.dumps({**ASK, "temperature": float("inf")}).encode(), 400),
    "a number that overflows": (b'{"model": "one", "messages": [], "temperature": 1e999}', 400),
    "5 000 digits": (b'{"model": "one", "seed": ' + b"9" * 5000 + b"}", 400),
    "200 000 values": (b'{"model": [' + b"0," * 200_000 + b"0]}", 400),
    "2 MB": (b'{"model": "' + b"x" * 2_000_000 + b'"}', 413),
}
FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "n = 1e6": ({"n": 1_000_000}, "n"),
    "n = 0": ({"n": 0}, "n"),
    "n as text": ({"n": "2"}, "n"),
    "n = true": ({"n": True}, "n"),
    "max_tokens = 1e9": ({"max_tokens": 10**9}, "max_tokens"),
    "max_tokens = -1": ({"max_tokens": -1}, "max_tokens"),
    "max_tokens = 0": ({"max_tokens": 0}, "max_tokens"),
    "max_tokens = 1.5": ({"max_tokens": 1.5}, "max_tokens"),
    'max_tokens = "8"': ({"max_tokens": "8"}, "max_tokens"),
    "two lengths": ({"max_completion_tokens": 5}, "max_tokens"),
    "temperature = -1": ({"temperature": -1}, "temperature"),
    "temperature = 1e308": ({"temperature": 1e308}, "temperature"),
    "temperature as text": ({"temperature": "hot"}, "temperature"),
    "top_p = 0": ({"top_p": 0}, "top_p"),
    "top_p = 2": ({"top_p": 2}, "top_p"),
    "top_k = -7": ({"top_k": -7}, "top_k"),
    "seed too large": ({"seed": 2**70}, "seed"),
    "seed as text": ({"seed": "1"}, "seed"),
    "10 000 stop strings": ({"stop": [str(n) for n in range(10_000)]}, "stop"),
    "an empty stop string": ({"stop": ""}, "stop"),
    "a long stop string": ({"stop": "x" * 1000}, "stop"),
    "stop of numbers": ({"stop": [1]}, "stop"),
    "top_logprobs alone": ({"top_logprobs": 2}, "top_logprobs"),
    "1 000 top_logprobs": ({"logprobs": True, "top_logprobs": 1000}, "top_logprobs"),
    "stream_options alone": ({"stream_options": {"include_usage": True}, "stream": False}, "stream_options"),
    "stream as text": ({"stream": "yes"}, "stream"),
    "an unknown format": ({"response_format": {"type": "xml"}}, "response_format"),
    "json_schema": ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format"),
    "tools of another kind": ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
    "a tool without a name": ({"tools": [{"type": "function", "function": {}}]}, "tools"),
    "a tool by a control token": ({"tools": [{"type": "function", "function": {"name": "<|im_end|>"}}]}, "tools"),
    "two tools of one name": ({"tools": [{"type": "function", "function": {"name": "a"}}] * 2}, "tools"),
    "1 000 tools": ({"tools": [{"type": "function", "function": {"name": f"f{n}"}} for n in range(1000)]}, "tools"),
    "tool_choice without tools": ({"tool_choice": "required"}, "tool_choice"),
    "tools that the template drops": ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "messages"),
    "a template": ({"chat_template": "{{ 7 * 7 }}"}, "chat_template"),
    "template arguments": ({"chat_template_kwargs": {"a": 1}}, "chat_template_kwargs"),
    "a penalty": ({"frequency_penalty": 0.5}, "frequency_penalty"),
    "a bias": ({"logit_bias": {"5": 100}}, "logit_bias"),
    "prompt embeddings": ({"prompt_embeds": "AAAA"}, "prompt_embeds"),
    "an unknown field": ({"wizardry": 1}, "wizardry"),
    "an unknown null": ({"wizardry": None}, "wizardry"),
    "no model": ({"model": ""}, "model"),
    "model as a list": ({"model": ["one"]}, "model"),
    "no messages": ({"messages": []}, "messages"),
    "messages as text": ({"messages": "Hi"}, "messages"),
    "10 000 messages": ({"messages": ASK["messages"] * 10_000}, "messages"),
    "role bot": ({"messages": [{"role": "bot", "content": "Hi"}]}, "messages.0"),
    "no role": ({"messages": [{"content": "Hi"}]}, "messages.0"),
    "no content": ({"messages": [{"role": "user"}]}, "messages.0"),
    "content null": ({"messages": [{"role": "user", "content": None}]}, "messages.0"),
    "content as a number": ({"messages": [{"role": "user", "content": 5}]}, "messages.0"),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://a.test/x"}}]}]},
        "messages.0",
    ),
    "a message with a template": (
        {"messages": [{"role": "user", "content": "Hi", "template": "x"}]},
        "messages.0.template",
    ),
    "a call that is no JSON": (
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
        "messages.0",
    ),
    "a prompt beyond the context": ({"messages": [{"role": "user", "content": "x" * 5000}]}, "messages"),
}
TEXT_FIELDS: dict[str, dict[str, Any]] = {
    "no prompt": {"prompt": None},
    "an empty prompt": {"prompt": ""},
    "a number": {"prompt": 5},
    "mixed ids": {"prompt": [1, "a"]},
    "a negative id": {"prompt": [-1]},
    "an id beyond the vocabulary": {"prompt": [10**6]},
    "100 prompts": {"prompt": ["a"] * 100},
    "echo": {"echo": True},
    "suffix": {"suffix": "end"},
    "best_of": {"best_of": 3},
    "1 000 logprobs": {"logprobs": 1000},
    "messages": {"messages": []},
}


@pytest.mark.parametrize("name", BODIES)
def test_bodies(name: str, place: Place) -> None:
    body, status = BODIES[name]
    for path in (CHAT, "/v1/completions", "/compare/tokens", "/v1/load_lora_adapter"):
        refused(place.free.ask(path, body, method="POST"), status, place)


@pytest.mark.parametrize("name", FIELDS)
def test_fields(name: str, place: Place) -> None:
    fields, param = FIELDS[name]
    for stream in (False, True):
        reply = place.free.ask(CHAT, {"stream": stream, **ASK, **fields})
        refused(reply, 400, place)
        assert reply.json["error"]["param"] == param, reply.json


@pytest.mark.parametrize("name", TEXT_FIELDS)
def test_fields_of_text_completions(name: str, place: Place) -> None:
    refused(place.free.ask("/v1/completions", {**TEXT, **TEXT_FIELDS[name]}), 400, place)


@pytest.mark.parametrize("name", ["three", "../one", "/etc", "ONE", "one\x00", "a" * 200, "__base__", "default"])
def test_unknown_models(name: str, place: Place) -> None:
    for path, body in ((CHAT, ASK), ("/v1/completions", TEXT)):
        reply = place.free.ask(path, {**body, "model": name})
        refused(reply, 404, place)
        assert reply.json["error"]["code"] == "model_not_found"


def test_what_asks_for_nothing_is_accepted(place: Place) -> None:
    none = {"frequency_penalty": 0, "logit_bias": {}, "logprobs": None, "tools": None, "user": "a", "suffix": None}
    more = {"parallel_tool_calls": True, "response_format": {"type": "text"}, "stop": None, "n": 1, "store": False}
    assert place.free.ask(CHAT, {**ASK, **none, **more}).status == 200
    echoed: dict[str, Any] = {
        "role": "assistant",
        "content": "Yes.",
        "refusal": None,
        "annotations": [],
        "tool_calls": None,
    }
    roles = [{"role": "developer", "content": "Be brief."}, *ASK["messages"], echoed, *ASK["messages"]]
    assert place.free.ask(CHAT, {**ASK, "messages": roles}).status == 200


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists, max_leaves=4))
def test_no_value_of_a_field_is_a_fault(place: Place, value: Any) -> None:
    for field in ("stop", "tool_choice", "messages", "tools", "response_format", "n", "logprobs", "stream_options"):
        body = json.dumps({**ASK, "max_tokens": 1, "tools": [], field: value}).encode()
        assert place.free.ask(CHAT, body).status in (200, 400), (field, value)


# ----- heads -----
def test_types_of_bodies(place: Place) -> None:
    body = json.dumps(ASK).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        refused(place.free.ask(CHAT, body, headers={"content-type": kind}), 415, place)
    refused(place.free.ask(CHAT, body, headers={"content-encoding": "gzip"}), 415, place)
    assert place.free.ask(CHAT, body, headers={"content-type": "application/json; charset=utf-8"}).status == 200


def test_methods_and_paths(place: Place) -> None:
    refused(place.free.ask("/v1/models", b"{}", method="GET"), 400, place)
    refused(place.free.ask("/v1/models", None, method="GET", headers={"transfer-encoding": "chunked"}), 400, place)
    for method in ("PUT", "PATCH", "TRACE", "GET"):
        refused(place.free.ask(CHAT, None, method=method), 405, place)
    for path in ("/nope", "/docs", "/redoc", "/openapi.json", "/v1", "/v1/models/", "//v1/models", "/page/../serve.py"):
        refused(place.free.ask(path), 404, place)
    refused(place.free.ask("/" + "a" * 2000), 414, place)
    refused(place.free.ask("/v1/models?" + "a" * 2000), 414, place)


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET / HTTP/1.1\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: -5\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\nx: " + b"a" * 100_000 + b"\r\n\r\n",
    ],
    ids=["TLS", "no host", "negative length", "two lengths", "100 kB of head"],
)
def test_broken_heads(data: bytes, place: Place) -> None:
    with place.free.raw(data) as connection:
        reply = read_all(connection)  # of a head that is not read to its end, the reset may come before the answer
    assert reply_of(reply).status in ((400, 431) if len(data) > 16384 else (400,)) if reply else len(data) > 16384


# ----- who asks -----
def every_request() -> list[tuple[str, str]]:
    found = [("GET", path) for path in ("/nope", "/docs", "/openapi.json", "/v1/", "/page/", "/page/none.js")]
    app = build_app(None, ServeSettings())  # type: ignore[arg-type]
    for path in app.state.paths:
        for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH"):
            found.append((method, path.replace("{name:path}", "one")))
    return found


def test_everything_needs_the_token(place: Place) -> None:
    from lora_tune.serving.web import SHELL

    tried = every_request()
    assert len(tried) > 60
    for method, path in tried:
        public = method in ("GET", "HEAD") and path in SHELL | {"/health/live"}
        tokens = (None, "Bearer wrong", f"Basic {TOKEN}", f"Bearer {TOKEN}x", TOKEN, "Bearer ", f"Bearer {TOKEN[:-1]}")
        for given_token in tokens if path == CHAT else tokens[:2]:
            headers = {} if given_token is None else {"authorization": given_token}
            reply = place.locked.ask(path, method=method, headers=headers)
            if public:
                assert reply.status in (200, 405), (method, path)
            else:
                assert reply.status == 401 and reply.headers["www-authenticate"] == "Bearer", (method, path)
                assert method == "HEAD" or reply.json["error"]["code"] == "invalid_api_key"
    right = {"authorization": f"Bearer {TOKEN}"}
    assert place.locked.ask("/v1/models", headers=right).status == 200
    assert place.locked.ask(CHAT, ASK, headers=right).status == 200
    assert place.locked.ask("/health/live").json == {"status": "ok"}


def test_other_names_and_pages_may_not_ask(place: Place) -> None:
    port = place.free.port
    for host in ("evil.test", f"evil.test:{port}", "127.0.0.1.evil.test", "localhost@evil.test", "0.0.0.0", "[", ""):
        refused(place.free.ask("/v1/models", headers={"host": host}), (400, 421), place)
    for host in ("localhost", f"localhost:{port}", f"[::1]:{port}", "127.0.0.1"):
        assert place.free.ask("/v1/models", headers={"host": host}).status == 200
    for origin in (
        "http://evil.test",
        "null",
        f"http://localhost:{port + 1}",
        "file://",
        f"http://127.0.0.1.evil:{port}",
    ):
        for method, path, body in (("GET", "/metrics", None), ("POST", CHAT, ASK), ("OPTIONS", CHAT, None)):
            refused(place.free.ask(path, body, method=method, headers={"origin": origin}), 403, place)
    refused(place.free.ask("/v1/models", headers={"sec-fetch-site": "cross-site"}), 403, place)
    own = place.free.ask(CHAT, ASK, headers={"origin": place.free.url, "sec-fetch-site": "same-origin"})
    assert own.status == 200
    assert not [name for name in own.headers if name.startswith("access-control")]


# ----- adapters on request -----
def test_loading_stays_below_its_folder(place: Place) -> None:
    path = "/v1/load_lora_adapter"
    outside = str(place.root.parent / "outside")
    for where in ("../outside", outside, "link", ".", "", "two/../../outside", "/", "none", "a\0b", "x" * 3000, "~"):
        refused(place.free.ask(path, {"lora_name": "new", "lora_path": where}), 400, place)
    for name in ("", "../x", "UPPER", "a" * 65, "-a", "a/b", "a b", "one", "__base__", "a\n"):
        refused(place.free.ask(path, {"lora_name": name, "lora_path": "two"}), 400, place)
    refused(place.free.ask(path, {"lora_name": "new", "lora_path": "hostile"}), 400, place)
    refused(place.free.ask(path, {"lora_name": "new", "lora_path": "two", "load_inplace": True}), 400, place)
    refused(place.free.ask(path, {"lora_name": "new"}), 400, place)
    refused(place.off.ask(path, {"lora_name": "new", "lora_path": "two"}), 403, place, says="--allow-loading")
    refused(place.off.ask("/v1/unload_lora_adapter", {"lora_name": "one"}), 403, place)
    assert [model["id"] for model in place.free.ask("/v1/models").json["data"]][1:] == ["one"]


def test_an_adapter_is_loaded_asked_and_unloaded(place: Place) -> None:
    for where in ("two", str(place.root / "two")):
        loaded = place.free.ask("/v1/load_lora_adapter", {"lora_name": "new", "lora_path": where})
        assert (loaded.status, loaded.body) == (200, b"Success: LoRA adapter 'new' added successfully.")
        listed = place.free.ask("/v1/models").json["data"]
        assert [model["id"] for model in listed][1:] == ["new", "one"]
        assert str(place.root) not in json.dumps(listed)
        assert place.free.ask(CHAT, {**ASK, "model": "new"}).status == 200
        one_more = place.free.ask("/v1/load_lora_adapter", {"lora_name": "more", "lora_path": "two"})
        refused(one_more, 400, place, says="at most 2 adapters")
        assert b'model="new"' in place.free.ask("/metrics").body
        assert place.free.ask("/v1/unload_lora_adapter", {"lora_name": "new"}).status == 200
        refused(place.free.ask(CHAT, {**ASK, "model": "new"}), 404, place)
        refused(place.free.ask("/v1/unload_lora_adapter", {"lora_name": "new"}), 404, place)
    base = place.free.ask("/v1/models").json["data"][0]["id"]
    refused(place.free.ask("/v1/unload_lora_adapter", {"lora_name": base}), 404, place)


# ----- slow, endless, gone -----
def closed(connection: socket.socket) -> bytes:
    """What came before the server closed; it must close within the test's time limit."""
    connection.settimeout(60)
    with connection:
        return read_all(connection)


def test_200_slow_heads_are_closed_while_others_are_answered(place: Place) -> None:
    begun = [place.free.raw(b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nx-") for _ in range(180)]
    begun += [place.free.raw() for _ in range(10)]  # and who says nothing at all
    done = [place.free.raw(b"GET /health/live HTTP/1.1\r\nhost: localhost\r\n\r\nGET /hea") for _ in range(10)]
    assert place.free.ask(CHAT, ASK).status == 200
    for connection in begun:
        assert closed(connection) == b""
    for connection in done:
        assert closed(connection).count(b"HTTP/1.1 200") == 1


def dripping(connection: socket.socket, drop: bytes) -> threading.Thread:
    """Send a drop every 50 ms until the other side closes."""

    def drip() -> None:
        try:
            for _ in range(1200):
                connection.sendall(drop)
                time.sleep(0.05)
        except OSError:
            return

    thread = threading.Thread(target=drip, daemon=True)
    thread.start()
    return thread


HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"


@pytest.mark.parametrize(
    ("head", "drop", "status"),
    [
        (HEAD + b"transfer-encoding: chunked\r\n\r\n", b"1\r\n \r\n", 408),
        (HEAD + b"transfer-encoding: chunked\r\n\r\n", b"8000\r\n" + b" " * 0x8000 + b"\r\n", (408, 413)),
        (HEAD + b"content-length: 100000\r\n\r\n", b" ", 408),
        (HEAD + b"content-length: 99999999999\r\n\r\n", b" " * 1000, 413),
        (HEAD + b"x-a: ", b"a", 0),
    ],
    ids=["slow chunks", "chunks without end", "a slow body", "a body without end", "a slow head"],
)
def test_what_does_not_end_is_ended(head: bytes, drop: bytes, status: Any, place: Place) -> None:
    connection = place.free.raw(head)
    thread = dripping(connection, drop)
    reply = closed(connection)
    thread.join(timeout=60)
    assert not thread.is_alive(), "the server went on reading"
    found = reply_of(reply).status if reply else 0
    assert found in ((status,) if isinstance(status, int) else status), reply


def test_answers_that_nobody_reads_end(place: Place) -> None:
    connection = place.free.raw()
    connection.settimeout(60)
    ask = b"GET /page/style.css HTTP/1.1\r\nhost: localhost\r\n\r\n"
    with connection, pytest.raises(OSError):  # its buffers are full, then the server closes
        for _ in range(200_000):
            connection.sendall(ask * 10)


def test_connections_beyond_the_cap_are_closed_and_the_others_answered(place: Place) -> None:
    first = [place.off.raw() for _ in range(6)]
    wait_until(lambda: len(place.off.server.server_state.connections) == 6)
    ask = b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
    said = b""
    with contextlib.suppress(OSError):  # closed, or reset while it asks
        said = closed(place.off.raw(ask))
    assert said == b""
    for connection in first:
        connection.sendall(ask)
    assert [reply_of(closed(connection)).status for connection in first] == [200] * 6


def wait_until(holds: Callable[[], bool]) -> None:
    for _ in range(600):
        if holds():
            return
        time.sleep(0.05)
    raise AssertionError("it did not come to that")


def test_a_client_that_leaves_frees_its_place(place: Place) -> None:
    for stream in (True, False):
        body = json.dumps({**ASK, "max_tokens": 400, "stream": stream, "n": 2}).encode()
        head = HEAD + b"content-length: %d\r\n\r\n" % len(body)
        cancelled = sum(one.cancelled for one in place.backend.statistics().models.values())
        connection = place.free.raw(head + body)
        wait_until(lambda: place.backend.statistics().running > 0)
        connection.close()
        wait_until(lambda: place.backend.statistics().running == 0)
        assert sum(one.cancelled for one in place.backend.statistics().models.values()) > cancelled


def test_more_than_the_queue_holds_gets_429_and_nobody_is_dropped(place: Place) -> None:
    with ThreadPoolExecutor(60) as pool:
        replies = list(pool.map(lambda n: place.free.ask(CHAT, {**ASK, "max_tokens": 60, "seed": n}), range(120)))
    statuses = [reply.status for reply in replies]
    assert set(statuses) == {200, 429}
    for reply in replies:
        if reply.status == 429:
            refused(reply, 429, place)
            assert int(reply.headers["retry-after"]) >= 1
    assert place.free.ask(CHAT, ASK).status == 200


class Failing(Scripted):
    """An engine that fails after so many pieces."""

    def __init__(self, chat: ChatTemplate, error: Exception, *, after: int) -> None:
        super().__init__(chat, "a few words")
        self._error, self._after = error, after

    async def stream(self, request: Request) -> AsyncGenerator[Piece | Finished, None]:
        count = 0
        async for item in super().stream(request):
            if count == self._after:
                raise self._error
            count += 1
            yield item


def half(reply: Reply, code: str) -> None:
    """A stream that began, and says at its end that it is not whole."""
    last = json.loads(reply.body.decode().strip().rpartition("data: ")[2])
    assert reply.status == 200 and b"[DONE]" not in reply.body
    assert last["error"]["code"] == code


@pytest.fixture(scope="module")
def chat(tiny_base: Path) -> ChatTemplate:
    return load_chat_template(load_tokenizer(find_base(base_section(tiny_base))))


def test_an_answer_that_takes_too_long_is_ended(chat: ChatTemplate) -> None:
    slow = Scripted(chat, "word " * 400, pause_s=0.02)
    with serving(slow, ServeSettings(caps=replace(CAPS, request_s=0.3))) as (running,):
        asked = {**ASK, "model": "scripted"}
        whole = running.ask(CHAT, asked)
        assert whole.status == 504 and whole.headers["x-should-retry"] == "false"
        half(running.ask(CHAT, {**asked, "stream": True}), "timeout")


@pytest.mark.parametrize("after", [0, 2])
@pytest.mark.parametrize(
    "error", [EngineFailed("failed at /srv/secret/x.py"), RuntimeError("/srv/secret/x.py")], ids=str
)
def test_a_fault_gives_nothing_away(error: Exception, after: int, chat: ChatTemplate) -> None:
    with serving(Failing(chat, error, after=after), ServeSettings()) as (running,):
        whole = running.ask(CHAT, {**ASK, "model": "scripted"})
        streamed = running.ask(CHAT, {**ASK, "model": "scripted", "stream": True})
        assert running.ask("/health").status == 200
    assert whole.status == 500 and whole.json["error"]["type"] == "server_error"
    assert b"[DONE]" not in streamed.body
    if after == 0:
        assert streamed.status == 500
    elif isinstance(error, EngineFailed):
        half(streamed, "engine_failed")
    assert b"secret" not in whole.body + streamed.body


def test_small_answers_are_sent_at_once(place: Place) -> None:
    """No waiting for the acknowledgement of the packet before (44 ms an answer on a connection that is kept)."""
    with place.free.raw():
        wait_until(lambda: bool(place.free.server.server_state.connections))
        (connection, *_) = place.free.server.server_state.connections
        accepted = connection.transport.get_extra_info("socket")
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


# ----- what it tells, and whom it asks -----
def test_metrics_have_bounded_labels(place: Place) -> None:
    for number in range(20):
        place.free.ask(f"/nope/{number}")
        place.free.ask(CHAT, {**ASK, "model": f"nobody-{number}"})
    page = place.free.ask("/metrics").body.decode()
    assert "nope" not in page and "nobody" not in page
    assert f'lora_tune_requests_total{{method="POST",route="{CHAT}",status="404"}}' in page
    for name in ("completion_tokens_total", "time_to_first_token_seconds_count", "answers_total"):
        assert f'lora_tune_{name}{{model="one"' in page
    for name in ("lora_tune_engine_waiting", "lora_tune_engine_running", "process_resident_memory_bytes"):
        assert name in page
    assert str(place.root) not in page


def test_no_connection_leaves_this_machine(place: Place) -> None:
    reached: list[Any] = []
    watching = [True]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if watching[0] and event in ("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "pickle.find_class"):
            reached.append((event, arguments[1] if event == "socket.connect" else arguments[0]))

    sys.addaudithook(hook)
    try:
        image = [{"type": "image_url", "image_url": {"url": "http://192.0.2.1/x.png"}}]
        place.free.ask(CHAT, {**ASK, "messages": [{"role": "user", "content": image}]})
        place.free.ask(CHAT, {**ASK, "messages": [{"role": "user", "content": "http://192.0.2.1/"}]})
        place.free.ask("/v1/load_lora_adapter", {"lora_name": "hub", "lora_path": "org/repository"})
        place.free.ask("/v1/load_lora_adapter", {"lora_name": "new", "lora_path": "two"})
        place.free.ask("/v1/unload_lora_adapter", {"lora_name": "new"})
    finally:
        watching[0] = False
    own = (("socket.connect", ("127.0.0.1", place.free.port)), ("socket.getaddrinfo", "127.0.0.1"))  # the test's calls
    assert [one for one in reached if one not in own] == []


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("/srv/models/a b/x: no such file", "a b/x: no such file"),
        ("cannot read '/data/me/adapters/one'", "cannot read 'one'"),
        ("C:\\Users\\me\\one is damaged", "one is damaged"),
        ("~/adapters/two, got 5", "two, got 5"),
        ("POST JSON to https://a.test/b and 1/2", "POST JSON to https://a.test/b and 1/2"),
    ],
)
def test_messages_lose_their_paths(said: str, told: str) -> None:
    assert without_paths(said).endswith(told)
