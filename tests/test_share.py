"""Push and pull against a stand-in of the hub's HTTP API on loopback, through the real client and the real verbs."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import finished
import pytest

from lora_tune.adapter.folder import FILES, MANIFEST, read_manifest, write_manifest

ROOT = Path(__file__).resolve().parent.parent
COMMIT = "c" * 40


class _Hub(http.server.BaseHTTPRequestHandler):
    """The few endpoints of the hub that the client asks; repositories live in `repositories`."""

    repositories: dict[str, dict[str, Any]]
    token = "hf_stand_in"

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        if self.headers.get("Authorization") != f"Bearer {self.token}":
            self._answer(401, {"error": "who are you?"})
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            self.repositories.setdefault(name, {"private": asked.get("visibility") == "private", "files": {}})
            self._answer(200, {"url": f"http://{self.headers['Host']}/{name}", "id": name, "name": name})
        elif self.path.startswith("/api/models/") and "/preupload/" in self.path:
            files = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None} for f in files]
            self._answer(200, {"files": modes, "commitOid": COMMIT})
        elif self.path.startswith("/api/models/") and "/commit/" in self.path:
            name = self.path.removeprefix("/api/models/").partition("/commit/")[0]
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    data = base64.b64decode(entry["value"]["content"])
                    self.repositories[name]["files"][entry["value"]["path"]] = data
            url = f"http://{self.headers['Host']}/{name}/commit/{COMMIT}"
            self._answer(200, {"success": True, "commitUrl": url, "commitOid": COMMIT, "hookOutput": ""})
        else:
            self._answer(200, {})

    def do_GET(self) -> None:
        name = "/".join(self.path.removeprefix("/api/models").strip("/").split("?")[0].split("/")[:2])
        held = self.repositories.get(name)
        if "/whoami" in self.path:
            self._answer(200, {"name": "ann", "type": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}})
        elif held is None:
            self._answer(404, {"error": "none"}, {"X-Error-Code": "RepoNotFound"})
        elif "/tree/" in self.path:
            listed = [{"type": "file", "path": p, "size": len(d), "oid": p} for p, d in held["files"].items()]
            self._answer(200, listed)
        elif "/api/models/" in self.path:
            siblings = [{"rfilename": path, "size": len(data)} for path, data in held["files"].items()]
            self._answer(200, {"id": name, "sha": COMMIT, "siblings": siblings, "private": held["private"]})
        else:
            path = self.path.partition(f"/resolve/{COMMIT}/")[2]
            etag = hashlib.sha256(held["files"][path]).hexdigest()
            self._answer(200, held["files"][path], {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})

    do_HEAD = do_GET

    def _answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {
            "Content-Type": "application/json",
            **(headers or {}),
            "Content-Length": str(len(body)),
        }.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    _Hub.repositories = {}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def folder(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished folder whose card knows no licence."""
    place = tmp_path_factory.mktemp("share") / "mine"
    finished.write_finished(place, tiny_base)
    return place


def _run(hub: str, home: Path, *arguments: str, token: str = _Hub.token) -> tuple[int, dict[str, Any]]:
    """A verb in a fresh process that talks to the stand-in; exit code and the object that it prints."""
    keep = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    settings = {"HF_ENDPOINT": hub, "HF_HOME": str(home), "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "lora_tune", "adapters", *arguments, "--json"],
        env={**keep, **settings, "no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "Traceback" not in done.stderr
    return done.returncode, json.loads(done.stdout)


def test_a_folder_goes_to_the_hub_and_comes_back(hub: str, folder: Path, tmp_path: Path) -> None:
    code, answer = _run(hub, tmp_path / "home", "push", str(folder), "ann/mine", "--license", "apache-2.0")
    assert code == 0 and answer["license"] == "apache-2.0" and answer["commit"] == COMMIT
    held = _Hub.repositories["ann/mine"]
    assert held["private"] is True and set(held["files"]) <= set(FILES) and MANIFEST in held["files"]
    assert b"license: apache-2.0" in held["files"]["README.md"] and b"license_name" not in held["files"]["README.md"]
    assert "license: other" in (folder / "README.md").read_text()  # the user's own folder stays as it was
    code, answer = _run(hub, tmp_path / "home", "pull", "ann/mine", str(tmp_path / "back"))
    assert code == 0
    for path in folder.iterdir():
        if path.name not in ("README.md", MANIFEST) and path.is_file():
            assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes()
    assert not any(path.is_symlink() for path in (tmp_path / "back").iterdir())
    assert read_manifest(tmp_path / "back").base == read_manifest(folder).base


def test_a_public_repository_is_asked_for(hub: str, folder: Path, tmp_path: Path) -> None:
    assert _run(hub, tmp_path, "push", str(folder), "ann/open", "--license", "mit", "--public")[0] == 0
    assert _Hub.repositories["ann/open"]["private"] is False


def test_what_must_not_be_pushed_stays(hub: str, folder: Path, tmp_path: Path) -> None:
    def refused(place: Path, *more: str) -> str:
        found, answer = _run(hub, tmp_path / "home", "push", str(place), "ann/never", *more)
        assert found == 1 and "ann/never" not in _Hub.repositories
        return str(answer["problems"][0]["reason"])

    assert "names no licence" in refused(folder)
    secret = Path(shutil.copytree(folder, tmp_path / "secret"))
    (secret / "metrics.jsonl").write_text('{"token": "hf_' + "a1B2" * 9 + '"}\n')
    write_manifest(secret, read_manifest(secret))
    assert refused(secret, "--license", "mit") == "holds a Hugging Face token"
    damaged = Path(shutil.copytree(folder, tmp_path / "damaged"))
    (damaged / "ledger.json").write_text("{}")
    assert "differs from its hash" in refused(damaged, "--license", "mit")


def test_names_and_tokens_that_do_not_do(hub: str, folder: Path, tmp_path: Path) -> None:
    code, answer = _run(hub, tmp_path, "push", str(folder), "noowner", "--license", "mit")
    assert code == 2 and "must be owner/name" in answer["problems"][0]["reason"]
    code, answer = _run(hub, tmp_path, "push", str(folder), "ann/x", "--license", "mit", token="hf_wrong")
    assert code == 2 and "ann/x" in answer["problems"][0]["reason"] and "hf_wrong" not in json.dumps(answer)
    code, answer = _run(hub, tmp_path, "pull", "ann/missing", str(tmp_path / "new"))
    assert code == 2 and "no such repository" in answer["problems"][0]["reason"] and not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"ledger.json": b"{}"}, "differs from its hash"),
        ({"adapter_config.json": b"[" * 100_000}, ""),
        ({"adapter_model.safetensors": None}, "holds no adapter_model.safetensors"),
    ],
)
def test_a_hostile_repository_leaves_nothing_behind(
    change: dict[str, bytes | None], reason: str, hub: str, folder: Path, tmp_path: Path
) -> None:
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} | change
    files |= {"run_me.py": b"print(1)", "training_args.bin": b"pickle"}
    _Hub.repositories["eve/bad"] = {"private": False, "files": {k: v for k, v in files.items() if v is not None}}
    code, answer = _run(hub, tmp_path / "home", "pull", "eve/bad", str(tmp_path / "deep" / "new"))
    assert code == 1 and reason in answer["problems"][0]["reason"]
    assert not (tmp_path / "deep").exists() or list((tmp_path / "deep").iterdir()) == []


def test_a_repository_over_the_cap_is_refused_before_the_download(hub: str, folder: Path, tmp_path: Path) -> None:
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    _Hub.repositories["eve/big"] = {"private": False, "files": files | {"metrics.jsonl": b"x" * 2_000_000}}
    code, answer = _run(hub, tmp_path / "home", "pull", "eve/big", str(tmp_path / "new"), "--max-size", "0.001")
    assert code == 1 and "would be" in answer["problems"][0]["reason"]
    assert not list((tmp_path / "home").rglob("metrics.jsonl"))
