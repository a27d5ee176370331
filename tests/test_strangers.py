"""The edges of folders and archives in other hands: links, methods of packing, paths that are none, unknown bases."""

from __future__ import annotations

import json
import shlex
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest

from lora_tune.adapter.archive import pack, unpack
from lora_tune.adapter.checks import Subject, run_checks
from lora_tune.adapter.compat import RULES, Traits, judge
from lora_tune.adapter.folder import CONFIG, FILES, MANIFEST, WEIGHTS
from lora_tune.adapter.lora_config import check_config
from lora_tune.cli import main
from lora_tune.errors import CheckFailed, UsageError

EXAMPLE = Path(__file__).resolve().parents[1] / "adapters" / "example"


def _snapshot(place: Path, blobs: Path) -> Path:
    """A folder of the hub's cache: links to files in `blobs`, beside `snapshots` or wherever they lie."""
    folder = place / "models--ann--x" / "snapshots" / ("a" * 40)
    folder.mkdir(parents=True)
    blobs.mkdir(parents=True)
    for name in (CONFIG, WEIGHTS):
        shutil.copyfile(EXAMPLE / name, blobs / name)
        (folder / name).symlink_to(Path("../../blobs") / name)
    return folder


def _errors(folder: Path) -> list[str]:
    return [problem.reason for problem in run_checks(Subject(folder)) if problem.severity == "error"]


def test_the_hubs_own_links_are_taken_from_wherever_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _snapshot(tmp_path, tmp_path / "models--ann--x" / "blobs")
    (tmp_path / "current").symlink_to(folder)
    assert _errors(folder) == _errors(tmp_path / "current") == []
    monkeypatch.chdir(folder)
    assert _errors(Path()) == _errors(Path("../") / ("a" * 40)) == []


def test_links_that_leave_the_cache_are_refused(tmp_path: Path) -> None:
    """The folder of blobs may be a link as well."""
    folder = _snapshot(tmp_path, tmp_path / "secret")
    (tmp_path / "models--ann--x" / "blobs").symlink_to(tmp_path / "secret")
    assert (folder / CONFIG).exists()
    assert _errors(folder) == ["must be a regular file, got a link"] * 2


@pytest.mark.parametrize("method", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_archives_are_stored_or_deflated(method: int, tmp_path: Path) -> None:
    """LZMA's header says how much memory it takes, up to 4 GiB, and its errors are of another kind than ZIP's."""
    with zipfile.ZipFile(tmp_path / "x.zip", "w", method) as target:
        for name in FILES:
            if (EXAMPLE / name).is_file():
                target.write(EXAMPLE / name, name)
    with pytest.raises(CheckFailed, match="must be stored or deflated"):
        unpack(tmp_path / "x.zip", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_nothing_is_packed_over_a_file(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="is there already"):
        pack(EXAMPLE, tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "words",
    [
        ("adapters", "verify", "nowhere"),
        ("adapters", "verify", "nowhere", "--quick", "--base", "builtin:quickstart"),
        ("adapters", "inspect", "nowhere"),
        ("adapters", "diff", str(EXAMPLE), "nowhere"),
        ("adapters", "pack", "nowhere"),
        ("merge", "nowhere", "--output", "out"),
        ("merge", "nowhere", "--output", "out", "--base", "builtin:quickstart"),
        ("export", "nowhere", "--to", "canonical", "--output", "out"),
    ],
)
def test_a_folder_that_is_not_there_is_a_matter_of_usage(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(list(words)) == 2
    assert "nowhere: is no folder" in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_text_in_place_of_a_number_is_shown_as_text() -> None:
    config = {"peft_type": "LORA", "r": "8", "lora_alpha": 16, "target_modules": ["q_proj"]}
    assert [problem.reason for problem in check_config(config)] == ["must be a whole number from 1 to 1024, got '8'"]


def test_what_the_base_would_decide_is_not_promised_without_it() -> None:
    """Ollama takes adapters of two architectures: of an adapter whose base is not at hand it is not said to run."""
    unknown, llama = Traits(ranks=(16,)), Traits(ranks=(16,), architecture="llama")
    assert judge(llama, "ollama").mark == judge(llama, "mlx").mark == "ok"
    for engine in ("ollama", "mlx"):
        verdict = judge(unknown, engine)  # type: ignore[arg-type]
        assert verdict.mark == "care" and verdict.answers[0].fix == "give it with --base"
    assert judge(unknown, "vllm").mark == "ok"


def test_no_answer_names_a_step_that_leaves_the_rank_as_it_is() -> None:
    answers = [answer for rule in RULES if "rank below" in rule.trait for answer in rule.answers.values()]
    assert answers and not any("canonical" in answer.fix for answer in answers)


def test_updates_of_other_shapes_are_not_called_the_same(tmp_path: Path, capsys: Any) -> None:
    import numpy
    from safetensors.numpy import load_file, save_file

    for name in ("a", "b"):
        shutil.copytree(EXAMPLE, tmp_path / name, ignore=shutil.ignore_patterns(MANIFEST, "checkpoints"))
    tensors = load_file(EXAMPLE / WEIGHTS)
    wider = {key: numpy.pad(one, ((0, 0), (0, 8))) if ".lora_A" in key else one for key, one in tensors.items()}
    save_file(wider, tmp_path / "b" / WEIGHTS, {"format": "pt"})
    assert main(["adapters", "diff", str(tmp_path / "a"), str(tmp_path / "b"), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["weights"]["other_shapes"] == answer["weights"]["shared"] == 28
    assert "28 modules have other shapes" in answer["problems"][0]["reason"]
    assert main(["adapters", "diff", str(tmp_path / "a"), str(tmp_path / "a"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["problems"] == []


def test_an_adapter_without_a_template_has_a_canonical_form(corpus: Path, tmp_path: Path, capsys: Any) -> None:
    """A stranger's, with the tokenizer of gpt2, which has no chat template."""
    folder, output = corpus / "data" / "adapters" / "gpt2_r16_causal_trl-kto", tmp_path / "new"
    assert main(["export", str(folder), "--to", "canonical", "--output", str(output)]) == 0
    shown = capsys.readouterr()
    assert "were not compared with training: it has no tokenizer with a chat template" in shown.err
    proof = shlex.split(shown.out.splitlines()[-1].partition("lora-tune ")[2])
    assert proof == ["adapters", "verify", str(output), "--quick"] and main(proof) == 0


def test_a_strangers_adapter_is_merged_by_saying_where_its_base_is(tmp_path: Path, capsys: Any) -> None:
    shutil.copytree(EXAMPLE, tmp_path / "a", ignore=shutil.ignore_patterns(MANIFEST, "checkpoints"))
    assert main(["merge", str(tmp_path / "a"), "--output", str(tmp_path / "out")]) == 1
    assert "has no manifest, which would name its base; give it with --base" in capsys.readouterr().err
