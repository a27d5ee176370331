"""200 loads and unloads beside living adapters: base and other tenants stay the same to the last bit."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file

from lora_tune.adapter.checks import Subject, run_checks
from lora_tune.adapter.folder import CONFIG, WEIGHTS
from lora_tune.adapter.load import attach_saved, detach, live_shapes, read_adapter, read_checked
from lora_tune.adapter.target_pattern import matched, short_names
from lora_tune.errors import CheckFailed, RecipeError
from lora_tune.model.base import load_base
from lora_tune.model.source import find_base
from lora_tune.model.targets import named_modules
from lora_tune.recipe import Base, Lora

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
LOADS = 200


@pytest.fixture(scope="module")
def kit(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("kit") / "out"
    subprocess.run([sys.executable, str(corpus / "cases" / "adapters.py"), str(out)], check=True, capture_output=True)
    return out


def _hash(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.view(torch.uint8).numpy().tobytes() if value.dim() else bytes(str(value.item()), "ascii"))
    return digest.hexdigest()


def _base_hash(model: PeftModel, before: list[str]) -> str:
    """Of every parameter and buffer that the bare base has, wherever PEFT keeps it by now."""
    now = {
        name.replace(".base_layer", "").replace(".original_module", ""): value
        for name, value in model.get_base_model().state_dict().items()
        if ".lora_" not in name and ".modules_to_save." not in name
    }
    assert set(before) <= set(now)
    return _hash({name: now[name] for name in before})


def test_base_and_other_adapters_are_the_same_after_200_loads(kit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every valid, odd, hostile and poisonous folder of the kit, again and again, between two that stay."""
    monkeypatch.chdir(kit)
    section = Base(name=str(kit / "base"), quantize="none", compute_dtype="float32")
    base = load_base(find_base(section), section)
    names, shapes, before = list(base.state_dict()), live_shapes(base), _hash(dict(base.state_dict()))
    model = attach_saved(base, read_adapter(kit / "valid_good"), name="first")
    attach_saved(model, read_adapter(kit / "valid_rslora"), name="second")

    def tenants() -> list[str]:
        return [_hash(get_peft_model_state_dict(model, adapter_name=name)) for name in ("first", "second")]

    def answers() -> list[torch.Tensor]:
        found = []
        for name in ("first", "second"):
            model.set_adapter(name)
            with torch.no_grad():
                found.append(model(torch.arange(4, 40)[None]).logits)
        return found

    others, said = tenants(), answers()
    cases = json.loads((kit / "expected.json").read_text())["cases"]
    verdicts: dict[str, set[str]] = {}
    for number in range(LOADS):
        folder = kit / cases[number % len(cases)]["folder"]
        model.set_adapter("first")
        try:
            saved = read_checked(folder, shapes=shapes)
            attach_saved(model, saved, name=f"guest{number}")
        except CheckFailed:
            verdicts.setdefault(folder.name, set()).add("refused")
        else:
            verdicts.setdefault(folder.name, set()).add("loaded")
            model.set_adapter("first")
            detach(model, f"guest{number}")
        assert sorted(model.peft_config) == ["first", "second"], folder.name
    assert {name: found for name, found in verdicts.items() if len(found) > 1} == {}  # the same each time
    assert len(verdicts) == len(cases)
    assert sum(found == {"loaded"} for found in verdicts.values()) >= 16
    for case in cases:
        if case["verdict"] == "refuse" and "or" not in case:
            assert verdicts[case["folder"]] == {"refused"}, case
        if case["verdict"] == "accept" and "or" not in case:
            assert verdicts[case["folder"]] == {"loaded"}, case
    assert _base_hash(model, names) == before and tenants() == others
    assert all(torch.equal(one, other) for one, other in zip(said, answers(), strict=True))
    assert not list(kit.rglob("PICKLE_RAN"))


# ----- targets that are no list -----
def _folder(place: Path, config: dict[str, Any], modules: list[str]) -> Path:
    place.mkdir()
    content = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, **config}
    (place / CONFIG).write_text(json.dumps(content))
    tensors = {}
    for module in modules:
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.ones(2, 8)
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.ones(8, 2)
    save_file(tensors, place / WEIGHTS)
    return place


MODULES = [
    f"model.layers.{layer}.{name}"
    for layer in range(2)
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj")
]


@pytest.mark.parametrize(
    ("pattern", "count", "names"),
    [
        (r".*\.(q|v)_proj", 4, ["q_proj", "v_proj"]),
        (r"model\.layers\.1\.mlp\.up_proj", 1, ["1.mlp.up_proj"]),
        (r".*", 8, ["k_proj", "q_proj", "up_proj", "v_proj"]),
        ("q_proj", 0, []),  # PEFT asks for the whole name
    ],
)
def test_a_regular_expression_is_refused_with_its_list(
    pattern: str, count: int, names: list[str], tmp_path: Path
) -> None:
    folder = _folder(tmp_path / "a", {"target_modules": pattern}, MODULES)
    (problem,) = [one for one in run_checks(Subject(folder)) if one.severity == "error"]
    assert f"it would match {count} of 8 modules" in problem.reason and problem.key == "target_modules"
    assert not names or json.dumps(names) in problem.fix
    if names:  # the list is what the expression meant: with it, PEFT's names are the same
        chosen = {module for module in MODULES for name in names if module.endswith("." + name)}
        assert chosen == set(matched(pattern, MODULES) or ())
    shapes = {f"{module}.weight": (8, 8) for module in [*MODULES, "model.layers.2.self_attn.q_proj"]}
    (problem,) = [one for one in run_checks(Subject(folder, shapes=shapes)) if one.severity == "error"]
    assert "of 9 modules" in problem.reason  # those of the base where it is at hand


@pytest.mark.parametrize("pattern", ["(([a-z_.0-9]+)+)+!", "((", "a" * 3000, "(?P<x>a)(?P=x"])
def test_an_expression_that_never_ends_or_is_none_is_said(pattern: str, tmp_path: Path) -> None:
    folder = _folder(tmp_path / "a", {"target_modules": pattern}, MODULES)
    (problem,) = [one for one in run_checks(Subject(folder)) if one.severity == "error"]
    assert "no sound one or takes too long" in problem.reason and len(str(problem)) < 400


def test_short_names_are_exact_in_the_presence_of_others() -> None:
    modules = ["a.mlp.proj", "a.attn.proj", "b.mlp.proj", "head"]
    assert short_names(["a.mlp.proj", "b.mlp.proj"], modules) == ["mlp.proj"]
    assert short_names(["a.mlp.proj"], modules) == ["a.mlp.proj"]
    assert short_names(modules, modules) == ["head", "proj"]


# ----- experts -----
def test_an_adapter_on_single_experts_is_refused_before_its_base_is_read(tmp_path: Path) -> None:
    modules = ["model.layers.0.self_attn.q_proj", *(f"model.layers.0.mlp.experts.{n}.gate_proj" for n in range(4))]
    folder = _folder(tmp_path / "a", {"target_modules": ["q_proj", "gate_proj"]}, modules)
    (problem,) = [one for one in run_checks(Subject(folder)) if one.severity == "error"]
    assert "not supported: 8 tensors on single experts" in problem.reason


def test_layers_of_single_experts_get_no_adapter(tiny_base: Path) -> None:
    """A base that holds each expert as layers of its own, as DeepSeek's first code does."""
    section = Base(name=str(tiny_base), quantize="none", compute_dtype="float32")
    source = find_base(section)
    model = load_base(source, section)
    experts = [torch.nn.ModuleDict({"gate_proj": torch.nn.Linear(64, 8)}) for _ in range(3)]
    model.model.layers[1].mlp.experts = torch.nn.ModuleList(experts)
    for targets in ("all-linear", ("gate_proj",)):
        with pytest.raises(RecipeError, match=r"3 layers of single experts .* name the attention layers"):
            named_modules(model, Lora(targets=targets), source=source, base=section)
    assert named_modules(model, Lora(targets=("q_proj",)), source=source, base=section).targets == ("q_proj",)
