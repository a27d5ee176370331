"""The doctor: every check on facts that are well and on facts that are amiss, and the real machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from lora_tune import doctor
from lora_tune.cli import main
from lora_tune.model import calibration, device, memory
from lora_tune.model import machine as facts
from lora_tune.model.cards import CARDS
from lora_tune.model.conditions import CHECKS, KNOWN_BAD, Finding
from lora_tune.model.machine import Gpu, Machine, Place, look
from lora_tune.recipe_file import read_recipe

VERSIONS = {"torch": "2.13.0+cpu", "transformers": "5.23.0", "trl": "1.16.0"}
RANGES = {"torch": ">=2.11", "transformers": "<6,>=5.17", "trl": "<2,>=1.16"}
CARD = Gpu("NVIDIA GeForce RTX 4090", 24.0, 23.5, (8, 9))
PLACES = tuple(Place(what, f"/{what}", 100.0) for what in ("output", "hub cache", "token cache", "temporary files"))
WELL = Machine(packages=VERSIONS, ranges=RANGES, places=PLACES, now=2e9, built=1.9e9)
WITH_CARD = replace(WELL, gpus=(CARD,), driver="580.65.06", torch_cuda="13.0", bnb_cuda=("128", "130"))
Printed = pytest.CaptureFixture[str]


def without(what: str, free_gib: float, access: Any = "writable") -> tuple[Place, ...]:
    """The places, one of them with less room."""
    return tuple(replace(one, free_gib=free_gib, access=access) if one.what == what else one for one in PLACES)


def old(card: Gpu, major: int, minor: int) -> tuple[Gpu, ...]:
    """A card of another generation."""
    return (replace(card, capability=(major, minor)),)


# check, what is amiss, verdict, words of the finding or its fix
AMISS: list[tuple[str, Machine, str, str]] = [
    ("python", replace(WELL, python="3.10.4"), "error", "3.11"),
    ("python", replace(WELL, bits=32), "error", "64-bit"),
    ("versions", replace(WELL, packages=VERSIONS | {"trl": None}), "error", "pip install 'trl<2,>=1.16'"),
    ("versions", replace(WELL, packages=VERSIONS | {"transformers": "4.57.1"}), "error", "4.57.1"),
    ("versions", replace(WELL, packages=VERSIONS | {"transformers": "6.0.0"}), "error", "<6"),
    ("versions", replace(WELL, packages=VERSIONS | {"torch": "2.10.0+cu128"}), "error", ">=2.11"),
    ("versions", replace(WELL, ranges={}), "warning", "pip install ."),
    ("gpu", WELL, "note", "no NVIDIA GPU"),
    ("gpu", replace(WELL, driver="580.65.06"), "note", "CUDA_VISIBLE_DEVICES"),
    ("gpu", replace(WITH_CARD, torch_cuda=None), "error", "CPUs"),
    ("gpu", replace(WITH_CARD, gpus=(replace(CARD, free_gib=9.0),)), "warning", "nvidia-smi"),
    ("driver", replace(WITH_CARD, driver="575.57.08"), "error", "580"),
    ("driver", replace(WITH_CARD, driver="520.61", torch_cuda="12.8"), "error", "525"),
    ("driver", replace(WITH_CARD, torch_cuda="19.0"), "note", "not known"),
    ("bfloat16", replace(WITH_CARD, gpus=old(CARD, 7, 5)), "note", "float16"),
    ("memory", replace(WELL, free_gib=1.2), "warning", "1.2"),
    ("disk", replace(WELL, places=without("output", 0.1)), "error", "recipe"),
    ("disk", replace(WELL, places=without("hub cache", 8)), "warning", "HF_HOME"),
    ("disk", replace(WELL, places=without("token cache", 50, "refused")), "error", "LORA_TUNE_CACHE"),
    ("disk", replace(WELL, places=without("temporary files", 1)), "warning", "TMPDIR"),
    ("hub", replace(WELL, environment={"HF_HUB_OFFLINE": "1"}), "note", "unset HF_HUB_OFFLINE"),
    ("threads", replace(WELL, environment={"OMP_NUM_THREADS": "8"}), "warning", "unset OMP_NUM_THREADS"),
    ("threads", replace(WELL, environment={"MKL_NUM_THREADS": "lots"}), "warning", "no number"),
    ("threads", replace(WELL, environment={"OMP_NUM_THREADS": "1"}), "note", "1 of 2 cores"),
    ("threads", replace(WELL, environment={"TOKENIZERS_PARALLELISM": "false"}), "note", "one core"),
    ("terminal", replace(WELL, encoding="ascii"), "warning", "PYTHONUTF8=1"),
    ("terminal", replace(WELL, encoding="cp1252"), "warning", "cp1252"),
    ("clock", replace(WELL, now=1.8e9), "warning", "1,157 days"),
    ("known bad", replace(WITH_CARD, gpus=old(CARD, 7, 0)), "error", "before Turing"),
    ("known bad", replace(WITH_CARD, gpus=old(CARD, 12, 0), torch_cuda="12.6"), "error", "Blackwell"),
    ("known bad", replace(WITH_CARD, gpus=(replace(CARD, mode="exclusive"),)), "error", "compute-mode"),
    ("known bad", replace(WITH_CARD, gpus=(replace(CARD, mode="prohibited"),)), "error", "no process"),
    ("known bad", replace(WITH_CARD, torch_cuda="13.4"), "error", "no library"),
    ("known bad", replace(WELL, environment={"BNB_CUDA_VERSION": "121"}), "warning", "unset BNB_CUDA_VERSION"),
    ("known bad", replace(WELL, torch_hip="6.4"), "warning", "ROCm"),
    ("known bad", replace(WELL, environment={"TRANSFORMERS_CACHE": "/data"}), "warning", "HF_HUB_CACHE"),
    ("known bad", replace(WELL, environment={"HF_HUB_ENABLE_HF_TRANSFER": "1"}), "warning", "XET"),
    ("known bad", replace(WITH_CARD, environment={"CUDA_LAUNCH_BLOCKING": "1"}), "warning", "wait"),
]


@pytest.mark.parametrize(("check", "machine", "verdict", "word"), AMISS)
def test_what_is_amiss_is_found_with_its_fix(check: str, machine: Machine, verdict: str, word: str) -> None:
    found = [finding for finding in CHECKS[check](machine) if finding.verdict == verdict]
    assert any(word in f"{one.said} {one.fix}" for one in found), list(CHECKS[check](machine))
    if verdict in ("warning", "error"):
        assert all(one.fix for one in found)


@pytest.mark.parametrize("machine", [WELL, WITH_CARD, replace(WITH_CARD, torch_cuda="12.8", driver="550.54")])
def test_a_machine_that_is_well(machine: Machine) -> None:
    findings = [finding for check in CHECKS.values() for finding in check(machine)]
    assert {finding.verdict for finding in findings} <= {"ok", "note"}


def test_every_line_of_the_tables_is_tried() -> None:
    assert {check for check, *_ in AMISS} == set(CHECKS)
    met = {one.said for _, machine, *_ in AMISS for one in KNOWN_BAD if one.applies(machine)}
    assert met == {one.said for one in KNOWN_BAD}
    assert all(one.source and one.fix for one in KNOWN_BAD)


def test_the_facts_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    found = look(tmp_path / "not" / "there")
    assert found.python == sys.version.split()[0] and found.bits == 64
    assert {"torch", "transformers", "bitsandbytes", "pydantic"} <= set(found.packages)
    assert found.ranges["torch"].startswith(">=") and "pytest" not in found.ranges
    assert 1 <= found.cores <= (os.cpu_count() or 1) and 0 < found.free_gib <= found.memory_gib
    assert {place.what for place in found.places} == {place.what for place in PLACES}
    assert all(place.free_gib > 0 for place in found.places)
    assert next(place.path for place in found.places if place.what == "hub cache") == str(tmp_path / "hf" / "hub")
    import torch

    assert found.torch_cuda == torch.version.cuda and found.bnb_cuda
    assert found.token == "none"
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "token").write_text("hf_secret")
    assert look(tmp_path).token == "file"
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert look(tmp_path).token == "variable" and "secret" not in repr(look(tmp_path))


@pytest.mark.parametrize(
    ("visible", "expected"),
    [("0", ["a"]), ("1,0", ["b", "a"]), ("", []), ("-1", []), ("0,7,1", ["a"]), ("GPU-x", ["x"])],
)
def test_the_gpus_that_are_visible(visible: str, expected: list[str]) -> None:
    class Nvml:
        @staticmethod
        def nvmlDeviceGetHandleByUUID(name: str) -> str:
            return name.removeprefix("GPU-")

    assert facts._visible(Nvml, ["a", "b"], visible) == expected


def test_four_bit_is_really_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_tune.model import base, four_bit

    (finding,) = four_bit.four_bit_works(WELL)
    assert finding.verdict == "ok" and "backward" in finding.said
    (finding,) = four_bit.torch_works(WELL)
    assert finding.verdict == "ok" and "CPU" in finding.said
    real = base.full_weight
    monkeypatch.setattr(base, "full_weight", lambda layer: real(layer) * 1.01)
    (finding,) = four_bit.four_bit_works(WELL)
    assert finding.verdict == "error" and "train wrongly" in finding.fix

    def broken(*_: object) -> None:
        raise RuntimeError("CUDA error: no kernel image is available")

    monkeypatch.setattr(base, "load_base", broken)
    (finding,) = four_bit.four_bit_works(WELL)
    assert finding.verdict == "error" and "no kernel image" in finding.said


def test_the_first_line_comes_at_once_and_no_connection_is_made(tmp_path: Path) -> None:
    code = (
        "import socket, sys\n"
        "def refuse(*_): raise SystemExit('a connection')\n"
        "socket.socket.connect = refuse\n"
        "from lora_tune.cli import main\n"
        "sys.exit(main(['doctor']))"
    )
    secret = "hf_" + "s" * 30
    environment = {**os.environ, "HF_TOKEN": secret, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
    environment = {name: value for name, value in environment.items() if name != "HF_HUB_OFFLINE"}
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, encoding="utf-8",
    )  # fmt: skip
    assert process.stdout is not None
    first = process.stdout.readline()
    seconds = time.monotonic() - start
    lines = [first]
    while lines[-1] and not lines[-1].startswith("✓ clock"):
        lines.append(process.stdout.readline())
    process.kill()  # what follows imports torch, and is tried above
    process.wait()
    assert first.startswith("✓ python") and seconds < 3, "0.35 s where nothing else runs"
    printed = "".join(lines)
    assert "✓ clock" in printed and "a token is set" in printed and secret not in printed
    assert not list(tmp_path.iterdir())


@pytest.fixture
def light(monkeypatch: pytest.MonkeyPatch) -> None:
    """The doctor without the two checks that import torch, which have tests of their own."""
    from lora_tune.model import four_bit

    monkeypatch.setattr(four_bit, "torch_works", lambda machine: iter([Finding("ok", "left out")]))
    monkeypatch.setattr(four_bit, "four_bit_works", lambda machine: iter([Finding("ok", "left out")]))


def asked(capsys: Printed, *arguments: str) -> tuple[int, dict[str, Any]]:
    """Exit code of the command with --json, and what it printed."""
    capsys.readouterr()
    code = main(["doctor", *arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.usefixtures("light")
def test_exit_code_and_json(monkeypatch: pytest.MonkeyPatch, capsys: Printed) -> None:
    code, answer = asked(capsys)
    assert (code, answer["exit_code"]) == (0, 0)
    assert {check["check"] for check in answer["checks"]} >= {*CHECKS, "torch", "4 bit"} - {"driver", "bfloat16"}
    assert not any(problem["severity"] == "error" for problem in answer["problems"])
    monkeypatch.setattr(doctor, "look", lambda output: replace(WELL, python="3.9.1", encoding="ascii"))
    code, answer = asked(capsys)
    assert code == 1 and {"error", "warning"} <= {problem["severity"] for problem in answer["problems"]}
    assert main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert "✗ python" in printed and "! terminal" in printed and "not ready: 1 errors, 1 warnings" in printed


@pytest.mark.usefixtures("light")
@pytest.mark.parametrize(
    ("overrides", "verdict", "word"),
    [
        ({}, "ok", "micro-batch"),
        ({"base": "nobody/no-such-base"}, "error", "not in the cache"),
        ({"batch": "4096", "length": "1000000", "micro": "4096"}, "error", "GiB"),
        ({"attention": "flash_attention_2"}, "error", "flash_attn"),
    ],
)
def test_what_a_recipe_asks_of_the_machine(
    overrides: dict[str, str], verdict: str, word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Printed
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    Path("rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    given = {
        "base": "builtin:quickstart",
        "attention": "auto",
        "batch": "4",
        "length": "64",
        "micro": "auto",
    } | overrides
    Path("recipe.yaml").write_text(
        "base: {{name: '{base}', attention: {attention}}}\ndata: [{{source: rows.jsonl}}]\noutput: adapters/new\n"
        "train: {{batch_size: {batch}, max_length: {length}, micro_batch_size: {micro}}}\n".format_map(given)
    )
    code, answer = asked(capsys, "--recipe", "recipe.yaml")
    found = [check for check in answer["checks"] if check["check"] == "recipe" and check["verdict"] == verdict]
    assert any(word in f"{check['said']} {check['fix']}" for check in found), answer["checks"]
    assert code == (1 if verdict == "error" else 0)


def test_a_cached_base_is_found_without_asking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_base: Path
) -> None:
    snapshot = tmp_path / "hub" / "models--owner--base" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_bytes((tiny_base / "config.json").read_bytes())
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "recipe.yaml").write_text("base: {name: owner/base}\ndata: [{source: rows.jsonl}]\noutput: out\n")
    findings = list(doctor.recipe_fits(read_recipe(tmp_path / "recipe.yaml"), WELL))
    assert [finding.verdict for finding in findings] == ["ok", "note"] and "weights" in findings[1].said
    tight = replace(WELL, places=without("output", 1e-9))
    assert any(one.verdict == "error" for one in doctor.recipe_fits(read_recipe(tmp_path / "recipe.yaml"), tight))


def test_a_recipe_is_planned_for_the_card_as_the_run_will_plan_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the preflight has measured on this card counts here too."""
    here = device.Machine("cuda", "NVIDIA GeForce RTX 4090", 14.0, 24.0, CARDS["rtx4090"])
    for module in (device, memory):
        monkeypatch.setattr(module, "this_machine", lambda: here)
    monkeypatch.setenv("LORA_TUNE_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    snapshot = tmp_path / "hub" / "models--owner--base" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    config = sizes | {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256}
    (snapshot / "config.json").write_text(json.dumps(config))
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "recipe.yaml").write_text("base: {name: owner/base}\ndata: [{source: rows.jsonl}]\noutput: out\n")
    file = read_recipe(tmp_path / "recipe.yaml")
    before = next(iter(doctor.recipe_fits(file, WELL)))
    calibration.remember("rtx4090", predicted={"peak": 1.0}, measured={"peak": 1.2})
    after = next(iter(doctor.recipe_fits(file, WELL)))
    plan = memory.plan_here(config, base=file.recipe.base, lora=file.recipe.lora, train=file.recipe.train)
    assert plan.calibrated == 1 and after.said.endswith(plan.reason)
    assert after.verdict == "ok" and after.said != before.said


@pytest.fixture
def endpoint() -> Iterator[tuple[str, list[str]]]:
    """A hub on this machine that knows Qwen/Qwen2.5-7B, and the paths it was asked for."""
    paths: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            paths.append(self.path)
            known = self.path.startswith("/api/models/Qwen/Qwen2.5-7B")
            body = json.dumps({"id": "Qwen/Qwen2.5-7B", "sha": "0" * 40} if known else {"error": "none"}).encode()
            self.send_response(200 if known else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", paths
    server.shutdown()


def test_the_hub_is_asked_only_when_told_to(endpoint: tuple[str, list[str]], tmp_path: Path) -> None:
    address, paths = endpoint
    code = (
        "from dataclasses import asdict\nfrom lora_tune.doctor import hub_answers\n"
        "from lora_tune.model.machine import Machine\nprint([asdict(f) for f in hub_answers(None, Machine())])"
    )
    quiet = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    for environment, word in (
        ({"HF_ENDPOINT": address}, "'verdict': 'ok'"),
        ({"HF_ENDPOINT": f"{address}/nowhere"}, "'verdict': 'error'"),
        ({"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "1"}, "unset HF_HUB_OFFLINE"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", code], env={**quiet, **environment}, cwd=tmp_path, capture_output=True, text=True
        )
        assert word in done.stdout, done.stderr
    assert sum(path.endswith("/api/models/Qwen/Qwen2.5-7B") for path in paths) == 2, "offline it was not asked"
