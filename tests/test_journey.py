"""Journeys through the real commands: from a recipe to an adapter folder that others can trust and load."""

from __future__ import annotations

import getpass
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import warm
from seldom import SELDOM

from lora_tune.adapter.folder import FILES, read_manifest
from lora_tune.cli import main

RECIPE = """\
base: {name: base, quantize: nf4}
data: [{source: rows.jsonl, format: messages}]
lora: {rank: 4, alpha: 8, dropout: 0.1}
train: {max_steps: 6, batch_size: 4, micro_batch_size: 2, max_length: 128, save_every: 2, learning_rate: 1e-3}
eval: {hold_out: 4, metrics: [loss, exact_match, rouge_l], samples: 2}
output: out
"""
CANARY = "canary-5f0c2d7e41"
# Run in every process of a journey: a connection to anything but this machine is written down and refused.
GUARD = """\
import os, sys

def guard(event, arguments):
    if event == "socket.connect" and isinstance(arguments[1], tuple) and arguments[1][0] not in ("127.0.0.1", "::1"):
        open(os.environ["GUARD_LOG"], "a").write(f"connect {arguments[1]}\\n")
        raise ConnectionRefusedError("sockets are closed in this test")
    if event == "socket.getaddrinfo" and arguments[0] not in (None, "localhost", "127.0.0.1", "::1"):
        open(os.environ["GUARD_LOG"], "a").write(f"look up {arguments[0]}\\n")
        raise OSError("names are not looked up in this test")
    if event == "pickle.find_class":
        open(os.environ["GUARD_LOG"], "a").write(f"unpickle {arguments}\\n")

sys.addaudithook(guard)
"""


def write_place(folder: Path, base: Path) -> Path:
    """A folder with the recipe above, its base and its data; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "base").symlink_to(base)
    turns = [(f"What is {number} and {number + 2}?", f"It is {2 * number + 2}.") for number in range(30)]
    rows = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in turns]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return folder


def process(place: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """A command of the project in its own process, working in `place`."""
    return subprocess.Popen(
        [sys.executable, "-m", *arguments],
        cwd=place,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def journey(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> tuple[Path, str]:
    """One guarded run of the recipe with canaries in the environment; returns its place and what it printed."""
    place = write_place(tmp_path_factory.mktemp("journey") / "very-private-folder", tiny_base)
    (place / "guard").mkdir()
    (place / "guard" / "sitecustomize.py").write_text(GUARD)
    paths = os.pathsep.join([str(place / "guard"), os.environ["PYTHONPATH"]])
    secrets = {"HF_TOKEN": f"hf_{CANARY}", "WANDB_API_KEY": f"wandb-{CANARY}"}
    online = {"HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0", "GUARD_LOG": str(place / "guard.log")}
    run = process(place, "lora_tune.run", "recipe.yaml", PYTHONPATH=paths, **secrets, **online)
    out, err = run.communicate(timeout=280)
    assert run.returncode == 0, err
    return place, out + err


def test_a_run_makes_no_connection_and_unpickles_nothing(journey: tuple[Path, str]) -> None:
    place, _ = journey
    assert not (place / "guard.log").exists(), (place / "guard.log").read_text()


def test_the_folder_holds_what_is_documented_and_nothing_else(journey: tuple[Path, str]) -> None:
    folder = journey[0] / "out"
    names = {path.name for path in folder.iterdir()}
    wanted = {
        "adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "recipe.yaml", "manifest.json", "README.md", "metrics.jsonl", "loss.png", "ledger.json",
        "test_vectors.json", "report.html",
    }  # fmt: skip
    assert wanted <= names <= set(FILES) | {"checkpoints"}
    manifest = read_manifest(folder)
    assert set(manifest.files) == names - {"manifest.json", "checkpoints"}
    assert set(manifest.scores) == {"loss", "exact_match", "rouge_l"}
    assert manifest.scores["loss"].adapter < manifest.scores["loss"].base
    assert manifest.training.steps == len((folder / "metrics.jsonl").read_text().splitlines()) == 6
    assert not [path for path in folder.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl")]


def test_the_report_tells_of_this_run(journey: tuple[Path, str]) -> None:
    place, printed = journey
    folder = place / "out"
    page, manifest = (folder / "report.html").read_text(encoding="utf-8"), read_manifest(folder)
    for name, score in manifest.scores.items():
        assert f"{name} " in page
        assert f">{score.base:.4f}<" in page and f">{score.adapter:.4f}<" in page
    assert "Training rows that stay hard" in page and "26 of 26 training rows were read" in page
    assert "Answers side by side" in page and "loss (nats per token), steps 1 to 6" in page
    assert "0 of 4 held-out rows share" in page and manifest.ledger["overlap"]["trained"] == 26
    assert "lora-tune eval path/to/this/folder" in page and "lora-tune eval path/to/this/folder" in (
        folder / "README.md"
    ).read_text(encoding="utf-8")
    assert "out/report.html" in printed


def test_the_command_beside_the_scores_makes_them_again(journey: tuple[Path, str]) -> None:
    place, _ = journey
    manifest, card = read_manifest(place / "out"), (place / "out" / "README.md").read_text(encoding="utf-8")
    (command,) = {line.split("`")[1] for line in card.splitlines() if line.startswith("Made again by `lora-tune eval")}
    words = command.replace("path/to/this/folder", "out").replace("path/to/the/base", "base").split()
    again = warm.command([*words[1:], "--json", "--report", "again.html"], cwd=place)
    assert again.returncode == 0, again.stderr
    out = again.stdout
    assert json.loads(out)["rows"] == 4
    for name, score in manifest.scores.items():
        found = json.loads(out)["metrics"][name]
        assert {**score.model_dump(), "difference": found["difference"]} == found, name
    page = (place / "again.html").read_text(encoding="utf-8")
    assert command in page and "Answers side by side" in page and str(place) not in page


def test_no_secret_path_user_or_host_is_in_the_folder_or_on_the_screen(journey: tuple[Path, str]) -> None:
    place, printed = journey
    words = [CANARY, str(place), "very-private-folder", str(Path.home())]
    # shorter names, such as `root`, stand in many a word, and in random bytes
    words += [name for name in (socket.gethostname(), getpass.getuser()) if len(name) > 4]
    assert CANARY not in printed
    for path in sorted((place / "out").rglob("*")):
        content = path.read_bytes() if path.is_file() else b""
        found = [word for word in words if len(word) > 1 and word.encode() in content]
        assert not found, f"{path.name} holds {found}"


# transformers' own warning, where PEFT asks a model loaded without this project
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_plain_peft_loads_the_folder_in_three_lines(journey: tuple[Path, str], tiny_base: Path) -> None:
    import torch

    folder = str(journey[0] / "out")
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), folder)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        adapted = model(input_ids=ids).logits
        with model.disable_adapter():
            assert (model(input_ids=ids).logits - adapted).abs().max() > 1e-4


def test_verify_list_and_merge_read_the_folder(
    journey: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place, _ = journey
    base = str(place / "base")
    assert main(["adapters", "list", str(place), "--json"]) == 0
    assert [entry["name"] for entry in json.loads(capsys.readouterr().out)["adapters"]] == ["out"]
    assert main(["adapters", "verify", str(place / "out"), "--base", base, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["problems"] == []
    assert main(["merge", str(place / "out"), "--base", base, "--output", str(tmp_path / "merged"), "--json"]) == 0
    capsys.readouterr()

    damaged = shutil.copytree(place / "out", tmp_path / "damaged")
    weights = (damaged / "adapter_model.safetensors").read_bytes()
    (damaged / "adapter_model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    assert main(["adapters", "verify", str(damaged), "--base", base, "--quick", "--json"]) == 1
    assert "adapter_model.safetensors" in capsys.readouterr().out


def test_a_second_run_into_the_folder_is_refused(
    journey: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(journey[0])
    before = (journey[0] / "out" / "manifest.json").read_bytes()
    assert main(["run", "recipe.yaml"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(["run", "recipe.yaml", "--resume"]) == 0
    assert "finished before" in capsys.readouterr().out
    assert (journey[0] / "out" / "manifest.json").read_bytes() == before


@SELDOM[0]
@SELDOM[1]
def test_interrupted_and_resumed_is_the_same_run_bit_for_bit(
    journey: tuple[Path, str], tmp_path: Path, tiny_base: Path
) -> None:
    """Ctrl-C after the first checkpoint; `--resume` ends in the adapter of the run that nobody interrupted."""
    place = write_place(tmp_path / "place", tiny_base)
    run = process(place, "lora_tune.run", "recipe.yaml")
    deadline = time.monotonic() + 200
    while not list(place.glob("out/checkpoints/step-*")) and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=100)
    assert run.returncode == 130, err
    assert "--resume" in err and "Traceback" not in err
    assert not (place / "out" / "manifest.json").exists()
    again = warm.command(["run", "recipe.yaml", "--resume"], cwd=place)
    assert again.returncode == 0, again.stderr
    names = ("adapter_model.safetensors", "adapter_config.json", "test_vectors.json")
    for name in names:
        assert (place / "out" / name).read_bytes() == (journey[0] / "out" / name).read_bytes(), name
    losses = [
        [json.loads(line)["loss"] for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
        for folder in (place, journey[0])
    ]
    assert losses[0] == losses[1]


def test_mistakes_end_in_one_line_and_their_exit_code(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = write_place(tmp_path / "place", tiny_base)
    monkeypatch.chdir(place)
    (place / "bad.jsonl").write_text((place / "rows.jsonl").read_text() + '{"messages": []}\n')
    for arguments, code, words in (
        (["train.lerning_rate=1"], 2, "learning_rate"),
        (["base.name=./nowhere"], 2, "nowhere"),
        (["lora.targets=[nope_proj]"], 2, "nope_proj"),
        (["data.0.source=bad.jsonl"], 3, "bad.jsonl:31"),
        (["train.max_length=45"], 3, "limits.lost_end_tokens"),
        (["output=rows.jsonl"], 2, "rows.jsonl"),
        (["--resume", "--overwrite"], 2, "--overwrite"),
    ):
        assert main(["run", "recipe.yaml", *arguments]) == code, arguments
        shown = capsys.readouterr()
        assert words in shown.err and "Traceback" not in shown.err, shown.err
        assert not (place / "out").exists(), f"{arguments} left something behind"
        assert main(["run", "recipe.yaml", *arguments, "--json"]) == code
        answer = json.loads(capsys.readouterr().out)
        assert answer["exit_code"] == code and answer["problems"]


def test_the_example_adapter_passes_verification_here(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A committed copy of the quickstart's run: hashes, tensors, template and answers still hold."""
    assert main(["adapters", "verify", str(root / "adapters" / "example"), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["problems"] == []
    scores = read_manifest(root / "adapters" / "example").scores["exact_match"]
    assert scores.base <= 0.10 and scores.adapter >= 0.85 and scores.rows >= 500
