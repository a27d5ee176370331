"""Verification of adapter folders: our own, damaged ones, hostile ones; the replay of test vectors."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import finished
import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lora_tune.adapter.checks import Subject, run_checks
from lora_tune.adapter.expected_keys import module_shapes
from lora_tune.adapter.folder import MANIFEST, read_manifest
from lora_tune.adapter.load import load_adapter
from lora_tune.adapter.lora_config import FIELDS, check_config
from lora_tune.adapter.tensor_file import read_header, worst_value
from lora_tune.adapter.vectors import TOLERANCE, make_test_vectors, precision, replay
from lora_tune.adapter.verify import base_of, recorded_base, verify_folder
from lora_tune.adapter.write import write_adapter
from lora_tune.cli import main
from lora_tune.data.chat_template import load_chat_template
from lora_tune.errors import CheckFailed, UsageError
from lora_tune.model.base import load_base
from lora_tune.model.methods import attach, saved_adapter
from lora_tune.model.source import find_base, load_tokenizer
from lora_tune.model.weights import tensor_infos
from lora_tune.recipe import Base, Lora


@pytest.fixture(scope="module")
def written(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "adapter"
    finished.write_finished(folder, tiny_base)
    return folder


@pytest.fixture
def copy(written: Path, tmp_path: Path) -> Path:
    """A copy of the finished folder to damage."""
    return Path(shutil.copytree(written, tmp_path / "copy"))


def _held(base: Path, *, quantize: str = "none") -> Base:
    return Base(name=str(base), quantize=quantize, compute_dtype="float32")


def _errors(folder: Path, **keys: Any) -> list[str]:
    return [str(problem) for problem in verify_folder(folder, **keys).errors]


# ----- our own folders -----
@pytest.mark.parametrize("quantize", ["none", "nf4", "int8"])
def test_a_finished_folder_is_proven(quantize: str, tiny_base: Path, tmp_path: Path) -> None:
    finished.write_finished(tmp_path / "out", tiny_base, quantize=quantize)
    report = verify_folder(tmp_path / "out", base=recorded_base(tmp_path / "out", name=str(tiny_base)))
    assert report.problems == ()
    found = report.facts["replay"]
    assert found["base"] < 1e-5 and found["adapter"] < 1e-5 and found["effect"] > 0.1
    assert found["scale"] == pytest.approx(1, abs=1e-4)
    assert report.facts["rank"] == 4 and report.facts["base"]["quantize"] == quantize


def test_it_is_proven_in_a_fresh_process(written: Path, tiny_base: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "lora_tune",
        "adapters",
        "verify",
        str(written),
        "--base",
        str(tiny_base),
        "--json",
    ]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    answer = json.loads(ended.stdout)
    assert answer["problems"] == [] and answer["replay"]["adapter"] < 1e-5


def test_quick_needs_neither_torch_nor_numpy_before_the_values(written: Path) -> None:
    code = (
        "import sys, pathlib; from lora_tune.adapter.verify import verify_folder\n"
        "report = verify_folder(pathlib.Path(sys.argv[1]), depth='quick')\n"
        "assert not report.errors, report.problems\n"
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'safetensors', 'bitsandbytes'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(written)], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_without_its_local_base_it_says_so(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapters", "verify", str(written)]) == 1
    assert "--base" in capsys.readouterr().err
    assert main(["adapters", "verify", str(written), "--quick"]) == 0
    with pytest.raises(CheckFailed, match="--base"):
        recorded_base(written)


def test_a_base_that_is_not_there_is_a_usage_error(written: Path, tmp_path: Path) -> None:
    assert main(["adapters", "verify", str(written), "--base", str(tmp_path / "gone")]) == 2


def _append(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        with (folder / name).open("a") as stream:
            stream.write(" ")

    return change


def _config(**fields: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return change


def _manifest(key: str, value: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / MANIFEST).read_text())
        content[key] = value
        (folder / MANIFEST).write_text(json.dumps(content))

    return change


DAMAGE = {
    **{name: (_append(name), "differs from its hash") for name in ("README.md", "recipe.yaml", "tokenizer.json")},
    "weights": (_append("adapter_model.safetensors"), "differs from its hash"),
    "template": (_append("chat_template.jinja"), "differs from its hash"),
    "config": (_config(lora_alpha=16), "differs from its hash"),
    "gone": (lambda folder: (folder / "ledger.json").unlink(), "not in the folder"),
    "added": (lambda folder: (folder / "vocab.json").write_text("{}"), "somebody added it"),
    "pickle": (lambda folder: (folder / "adapter_model.bin").write_bytes(b"x"), "pickle"),
    "manifest": (lambda folder: (folder / MANIFEST).write_text("{"), "not JSON"),
    "manifest files": (_manifest("files", {"../x": {"sha256": "0" * 64, "size": 1}}), "none of an adapter folder"),
    "link": (lambda folder: (folder / "loss.png").symlink_to("/etc/hostname"), "got a link"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_and_named(kind: str, copy: Path) -> None:
    change, reason = DAMAGE[kind]
    change(copy)
    errors = _errors(copy, depth="quick")
    assert len(errors) >= 1 and all("\n" not in error for error in errors)
    assert any(reason in error for error in errors), errors


def test_unknown_files_are_only_worth_a_warning(copy: Path) -> None:
    (copy / "notes.txt").write_text("x")
    report = verify_folder(copy, depth="quick")
    assert not report.errors and any("notes.txt" in str(problem) for problem in report.problems)


def test_another_base_of_the_same_shape_is_refused_by_its_fingerprint(written: Path, tmp_path: Path) -> None:
    other = tiny.write_base(tmp_path / "base", seed=2)
    errors = _errors(written, base=_held(other), depth="quick")
    assert len(errors) == 1 and "fingerprint" in errors[0]


# ----- the replay, without the help of hashes -----
@pytest.fixture(scope="module")
def known(written: Path) -> dict[str, Any]:
    return json.loads((written / "test_vectors.json").read_text())


HERE = precision(device="cpu", compute_dtype="float32", quantize="none")


def _replayed(
    written: Path, base: Path, known: dict[str, Any], *, scale: float = 1.0, template: str | None = None
) -> list[str]:
    section = _held(base)
    source = find_base(section)
    model = load_adapter(load_base(source, section), written)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.mul_(scale)
    chat = load_chat_template(load_tokenizer(source), template=template)
    return [str(problem) for problem in replay(model, chat, known, here=HERE, where="v").problems]


def test_replay_finds_what_hashes_cannot(written: Path, tiny_base: Path, known: dict[str, Any], tmp_path: Path) -> None:
    other = tiny.write_base(tmp_path / "other", seed=2)
    spaced = tiny.CHATML.replace("assistant\\n", "assistant \\n")
    assert _replayed(written, tiny_base, known) == []
    assert "the base answers otherwise" in _replayed(written, other, known)[0]
    assert "not applied" in _replayed(written, tiny_base, known, scale=0.0)[0]
    assert "another scale" in _replayed(written, tiny_base, known, scale=0.5)[0]
    for scale in (0.9, 1.1, 2.0):
        assert "the adapter" in _replayed(written, tiny_base, known, scale=scale)[0]
    assert "chat template" in _replayed(written, tiny_base, known, template=spaced)[0]
    assert "not applied" in _replayed(written, tiny_base, known, scale=math.nan)[0]


def test_an_adapter_that_does_nothing_is_worth_a_warning(tiny_base: Path) -> None:
    recipe = finished.recipe_for(tiny_base)
    model = finished.trained_model(recipe, strength=0.0)
    chat = load_chat_template(load_tokenizer(find_base(recipe.base)))
    found = replay(model, chat, make_test_vectors(model, chat, made_on=HERE), here=HERE, where="v")
    assert [problem.severity for problem in found.problems] == ["warning"]
    assert "changes too little" in found.problems[0].reason


def test_vectors_do_not_depend_on_threads_and_leave_the_mode_alone(tiny_base: Path, known: dict[str, Any]) -> None:
    recipe = finished.recipe_for(tiny_base)
    model, chat = finished.trained_model(recipe).train(), load_chat_template(load_tokenizer(find_base(recipe.base)))
    before, random = torch.get_num_threads(), torch.get_rng_state()
    try:
        torch.set_num_threads(2 if before == 1 else 1)
        found = replay(model, chat, known, here=HERE, where="v")
    finally:
        torch.set_num_threads(before)
    assert found.problems == () and max(found.base, found.adapter) < TOLERANCE[HERE] / 50
    assert model.training and torch.equal(torch.get_rng_state(), random)


def test_damaged_vectors_are_one_line(known: dict[str, Any], written: Path, tiny_base: Path) -> None:
    def changed(change: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        content = json.loads(json.dumps(known))
        change(content)
        return content

    for content in (
        [],
        changed(lambda v: v.update(format=2)),
        changed(lambda v: v.update(prompts=[])),
        changed(lambda v: v["prompts"][0].update(ids=[10**9])),
        changed(lambda v: v["prompts"][0]["positions"][0]["base"].pop()),
        changed(lambda v: v["prompts"][0]["positions"][0].update(base=[math.nan])),
    ):
        with pytest.raises(CheckFailed, match="write the folder again") as caught:
            _replayed(written, tiny_base, content)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)


def test_the_manifest_gives_the_base_as_trained(written: Path, tiny_base: Path) -> None:
    manifest = read_manifest(written)
    assert base_of(manifest, name=str(tiny_base)).compute_dtype == "float32"
    assert base_of(manifest, name="org/x", quantize="nf4").quantize == "nf4"
    hub = manifest.base.model_copy(update={"kind": "hub", "name": "org/x", "revision": "1" * 40})
    on_hub = manifest.model_copy(update={"base": hub})
    assert base_of(on_hub).revision == base_of(on_hub, name="org/x").revision == "1" * 40
    assert base_of(on_hub, name=str(tiny_base)).revision is None


# ----- names in files against names in memory -----
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "qwen3": {},
    "gemma": {"head_dim": 16},
    "phi": {},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4},
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48,
    },
}  # fmt: skip
SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_key_set_from_a_bases_files_is_that_of_the_loaded_model(family: str, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {**SIZES, **IDS, "num_key_value_heads": 2, **FAMILIES[family]}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings)).float().save_pretrained(
        tmp_path / "base"
    )
    section = _held(tmp_path / "base")
    source = find_base(section)
    model = attach(load_base(source, section), Lora(rank=2), source=source, base=section, seed=1)
    saved = saved_adapter(model, lora=Lora(rank=2), source=source)
    shapes = module_shapes(
        {name: info.shape for name, info in tensor_infos(source.folder).items()}, config=source.config
    )
    out = tmp_path / "out"
    out.mkdir()
    write_adapter(out, saved, source=source)
    assert [str(p) for p in run_checks(Subject(out, shapes=shapes, base_name="base")) if p.severity != "note"] == []
    loaded = load_adapter(load_base(source, section), out)
    ids = torch.arange(4, 40)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)


# ----- folders of strangers -----
@pytest.fixture(scope="module")
def kit(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("kit") / "out"
    subprocess.run([sys.executable, str(corpus / "cases" / "adapters.py"), str(out)], check=True, capture_output=True)
    return out


def test_every_odd_and_hostile_folder_gets_its_verdict(kit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All 91 folders of the kit, within 2 s and 32 MiB each, in one line a problem, without opening what they name."""
    monkeypatch.chdir(kit)
    config = json.loads((kit / "base" / "config.json").read_text())
    shapes = module_shapes({name: info.shape for name, info in tensor_infos(kit / "base").items()}, config=config)
    events = _audited(("pickle.find_class", "socket.connect"))
    wrong = []
    tracemalloc.start()
    for case in json.loads((kit / "expected.json").read_text())["cases"]:
        start = time.process_time()
        tracemalloc.reset_peak()
        problems = run_checks(Subject(kit / case["folder"], shapes=shapes, base_name="base"))
        seconds, mib = time.process_time() - start, tracemalloc.get_traced_memory()[1] / 2**20
        kinds = {problem.severity for problem in problems}
        verdict = "refuse" if "error" in kinds else "warn" if "warning" in kinds else "accept"
        lines = all("\n" not in str(problem) and len(str(problem)) < 2000 for problem in problems)
        if verdict not in (case["verdict"], case.get("or")) or seconds > 2 or mib > 32 or not lines:
            wrong.append((case["folder"], verdict, seconds, mib, list(map(str, problems))))
    tracemalloc.stop()
    assert wrong == []
    assert events == [] and not list(kit.rglob("*_RAN"))


def test_valid_folders_load_and_hostile_ones_leave_the_base_alone(kit: Path) -> None:
    section = Base(name=str(kit / "base"), quantize="none", compute_dtype="float32")
    base = load_base(find_base(section), section)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    for case in json.loads((kit / "expected.json").read_text())["cases"]:
        if case["verdict"] == "refuse" and "or" not in case:
            with pytest.raises(CheckFailed):
                load_adapter(base, kit / case["folder"])
    assert all(torch.equal(before[name], value) for name, value in base.state_dict().items())
    ids = torch.arange(4, 40)[None]
    for name in ("valid_good", "valid_rslora", "valid_bf16", "valid_dora", "valid_modules_to_save", "valid_one_layer"):
        loaded = load_adapter(load_base(find_base(section), section), kit / name)
        with torch.no_grad(), loaded.disable_adapter():
            plain = loaded(ids).logits
        with torch.no_grad():
            assert (loaded(ids).logits - plain).abs().max() > 0.01, name
            assert torch.equal(plain, base(ids).logits), name


_EVENTS: list[tuple[tuple[str, ...], list[str]]] = []


def _audited(names: tuple[str, ...]) -> list[str]:
    """A list that fills with these audit events from now on; the hook itself can never be taken off."""
    found: list[str] = []
    if not _EVENTS:
        sys.addaudithook(lambda event, _: [seen.append(event) for wanted, seen in _EVENTS if event in wanted] and None)
    _EVENTS.append((names, found))
    return found


@pytest.mark.parametrize("name", ["gpt2_r8_causal_bin", "qwen2.5-7b_lfs-pointer", "bert-base-uncased_r8_seqcls"])
def test_real_folders_that_are_no_causal_lora_are_refused_in_words(name: str, corpus: Path) -> None:
    assert len(_errors(corpus / "data" / "adapters" / name, depth="quick")) >= 1


@pytest.mark.parametrize("name", ["gpt2_r16_causal_trl-kto", "gemma-3-270m-it_r4_causal"])
def test_real_causal_loras_are_accepted_without_their_base(name: str, corpus: Path) -> None:
    assert _errors(corpus / "data" / "adapters" / name, depth="quick") == []


# ----- properties of the parts -----
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from([*FIELDS, "other"]), JSON, max_size=6))
def test_no_configuration_crashes_the_checks(fields: dict[str, Any]) -> None:
    good = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    for problem in check_config({**good, **fields}):
        assert problem.key is not None and problem.reason


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_no_damaged_weights_file_crashes_the_reader(data: st.DataObject) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        save_file({"a": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.float16)}, path)
        content = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 4))):
            place = data.draw(st.integers(0, len(content) - 1))
            content[place] = data.draw(st.integers(0, 255))
        path.write_bytes(bytes(content[: data.draw(st.integers(0, len(content)))]))
        try:
            header = read_header(path)
        except CheckFailed as error:
            assert str(path) in str(error)
        else:
            assert sum(entry.stop - entry.start for entry in header.values()) <= len(content)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [0.0, -3.0, 1e-3, 6e4, math.inf, -math.inf, math.nan])
def test_the_largest_value_is_read_from_the_bits(dtype: torch.dtype, value: float, tmp_path: Path) -> None:
    tensor = torch.zeros(5, dtype=dtype)
    tensor[3] = value
    save_file({"a": tensor}, tmp_path / "x")
    worst = worst_value(tmp_path / "x", read_header(tmp_path / "x")["a"])
    if not math.isfinite(value):
        assert worst == math.inf
    else:
        exact = float(tensor.abs().max())
        assert worst <= exact < 2 * worst or worst == exact == 0


def test_a_single_bad_number_anywhere_is_found(copy: Path) -> None:
    """Property over all tensors: a NaN in any one of them is refused (hashes left aside)."""
    (copy / MANIFEST).unlink()
    good = load_file(copy / "adapter_model.safetensors")
    draw = np.random.default_rng(0)
    for name in list(good)[:: max(1, len(good) // 6)]:
        bad = {key: tensor.clone() for key, tensor in good.items()}
        flat = bad[name].view(-1)
        flat[int(draw.integers(len(flat)))] = math.nan
        save_file(bad, copy / "adapter_model.safetensors")
        errors = _errors(copy, depth="quick")
        assert len(errors) == 1 and name in errors[0] and "not finite" in errors[0]


# ----- the verb -----
def test_list_shows_folders_and_their_scores(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapters", "list", str(written.parent)]) == 0
    shown = capsys.readouterr().out
    assert "adapter" in shown and "loss 3.5" in shown
    assert main(["adapters", "list", str(written.parent), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["adapters"][0]["rows"] == 300
    assert main(["adapters", "list", str(written / "gone")]) == 2


def test_verify_prints_its_verdict(
    written: Path, tiny_base: Path, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["adapters", "verify", str(written), "--base", str(tiny_base)]) == 0
    assert "replayed as cpu/float32/none" in capsys.readouterr().out
    _append("README.md")(copy)
    assert main(["adapters", "verify", str(copy), "--quick", "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["exit_code"] == 1 and answer["problems"][0]["file"].endswith("README.md")


def test_a_strangers_manifest_names_no_path(copy: Path) -> None:
    """A manifest that calls a path a hub base is not followed."""
    base = json.loads((copy / MANIFEST).read_text())["base"]
    _manifest("base", {**base, "kind": "hub", "name": "../../somewhere"})(copy)
    errors = _errors(copy)
    assert len(errors) == 1 and "--base" in errors[0]
    with pytest.raises((CheckFailed, UsageError)):
        recorded_base(copy)
