"""The adapter folder: who may write it, what is in it, that plain PEFT reads it."""

from __future__ import annotations

import json
import os
import re
import warnings
from pathlib import Path

import finished
import pytest
import torch
from transformers import AutoTokenizer

from lora_tune.adapter import folder as layout
from lora_tune.adapter.folder import FILES, MANIFEST, damaged_files, file_record, read_manifest
from lora_tune.adapter.load import attach_saved, load_adapter, read_adapter
from lora_tune.adapter.write import stored_recipe, write_run
from lora_tune.errors import CheckFailed, ResourceError
from lora_tune.model.base import load_base
from lora_tune.model.source import find_base
from lora_tune.recipe import Base
from lora_tune.recipe_file import read_recipe

IDS = torch.arange(4, 60)[None]


@pytest.fixture(scope="module")
def written(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A finished folder and the logits (1, T, V) of the model that it was written from."""
    folder = tmp_path_factory.mktemp("runs") / "adapter"
    model = finished.write_finished(folder, tiny_base)
    with torch.no_grad():
        return folder, model(IDS).logits


def _fresh(base: Path) -> torch.nn.Module:
    section = Base(name=str(base), quantize="none", compute_dtype="float32")
    return load_base(find_base(section), section)


def test_plain_peft_loads_it_by_the_lines_of_the_card(written: tuple[Path, torch.Tensor], tiny_base: Path) -> None:
    folder, trained = written
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert code is not None
    lines = code[1].replace(f"path/to/{tiny_base.name}", str(tiny_base)).replace("path/to/this/folder", str(folder))
    names: dict[str, torch.nn.Module] = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # PEFT's own call
        exec(compile(lines, "card", "exec"), names)
    with torch.no_grad():
        assert torch.equal(names["model"].eval()(IDS).logits, trained)


def test_the_one_loader_gives_equal_logits_and_leaves_base_and_random_numbers(
    written: tuple[Path, torch.Tensor], tiny_base: Path
) -> None:
    folder, trained = written
    base = _fresh(tiny_base)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    random = torch.get_rng_state()
    model = load_adapter(base, folder)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, trained)
    assert torch.equal(torch.get_rng_state(), random)
    after = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): value
        for name, value in model.state_dict().items()
        if ".lora_" not in name
    }
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(parameter.requires_grad for parameter in model.parameters())


LORAS = {
    "rslora": {"method": "rslora"},
    "dora": {"method": "dora"},
    "pissa": {"method": "pissa"},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.0.mlp.up_proj": 3.0}},
    "head": {"modules_to_save": ["lm_head"]},
    "embeddings": {"modules_to_save": ["embed_tokens"]},
    "new_tokens": {"new_tokens": ["<a>", "<b>"]},
    "few_targets": {"targets": ["q_proj", "mlp.down_proj"]},
}


@pytest.mark.parametrize(
    "kind, quantize",
    [*((kind, "none") for kind in LORAS), *((kind, "nf4") for kind in ("dora", "pissa", "new_tokens"))],
)
def test_every_kind_of_our_adapters_is_written_read_and_equal(
    kind: str, quantize: str, tiny_base: Path, tmp_path: Path
) -> None:
    model = finished.write_finished(tmp_path / "out", tiny_base, lora=LORAS[kind], quantize=quantize)
    section = Base(name=str(tiny_base), quantize=quantize, compute_dtype="float32")
    loaded = load_adapter(load_base(find_base(section), section), tmp_path / "out")
    with torch.no_grad():
        difference = (loaded(IDS).logits - model(IDS).logits).abs().max()
    assert difference <= (2e-5 if kind == "pissa" else 1e-6)  # pissa's factors are balanced at saving


def test_half_precision_tensors_keep_their_dtype(tiny_base: Path, written: tuple[Path, torch.Tensor]) -> None:
    saved = read_adapter(written[0])
    half = {name: tensor.to(torch.bfloat16) for name, tensor in saved.tensors.items()}
    model = attach_saved(_fresh(tiny_base), type(saved)(saved.config, half))
    kinds = {parameter.dtype for name, parameter in model.named_parameters() if ".lora_" in name}
    assert kinds == {torch.bfloat16}


def test_an_adapter_of_another_base_is_refused(written: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    import tiny

    other = tiny.write_base(tmp_path / "wide", config={"hidden_size": 96, "head_dim": 24})
    with pytest.raises(CheckFailed, match="another shape"):
        load_adapter(_fresh(other), written[0])


def test_manifest_lists_every_file_but_itself(written: tuple[Path, torch.Tensor], tiny_base: Path) -> None:
    folder, _ = written
    manifest = read_manifest(folder)
    on_disk = {path.name for path in folder.iterdir() if path.is_file()}
    assert on_disk == {*manifest.files, MANIFEST}
    assert on_disk <= set(FILES)
    assert all(file_record(folder / name) == record for name, record in manifest.files.items())
    assert manifest.base.name == tiny_base.name and manifest.base.kind == "local"
    assert manifest.scores["loss"].adapter == 1.25
    assert manifest.chat.stop_ids == (2,) and manifest.chat.origin == "base"


def test_tokenizer_and_template_come_back_from_the_folder(written: tuple[Path, torch.Tensor], tiny_base: Path) -> None:
    folder, _ = written
    messages = [{"role": "user", "content": "Hi ❤"}]
    ours, base = (
        AutoTokenizer.from_pretrained(path).apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        for path in (folder, tiny_base)
    )
    assert ours == base
    assert json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_two_templates_become_one_with_a_branch(tiny_base: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    plain = "{% for m in messages %}{{ m.content }}|{% endfor %}"
    tokenizer.chat_template = {"default": plain, "tool_use": "{{ tools | length }}" + plain}
    layout_before = [
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tools=tools, tokenize=False)
        for tools in (None, [{"type": "function"}])
    ]
    from lora_tune.adapter.write import write_tokenizer

    write_tokenizer(tmp_path, tokenizer)
    again = AutoTokenizer.from_pretrained(tmp_path)
    after = [
        again.apply_chat_template([{"role": "user", "content": "x"}], tools=tools, tokenize=False)
        for tools in (None, [{"type": "function"}])
    ]
    assert after == layout_before == ["x|", "1x|"]


def test_the_stored_recipe_reads_back_without_a_path(tiny_base: Path, tmp_path: Path) -> None:
    lora, evaluation = {"start_from": str(tmp_path / "older")}, {"hold_out": str(tmp_path / "held.jsonl")}
    recipe = finished.recipe_for(tiny_base, lora=lora, eval=evaluation)
    recipe = recipe.model_copy(update={"base": recipe.base.model_copy(update={"chat_template": "/secret/mine.jinja"})})
    text = stored_recipe(recipe, source=find_base(recipe.base), identities=())
    (tmp_path / "recipe.yaml").write_text(text)
    assert str(tmp_path) not in text and str(tiny_base.parent) not in text
    for name in ("held.jsonl", "chat_template.jinja", "rows.jsonl"):
        (tmp_path / name).touch()
    for name in ("older", tiny_base.name):
        (tmp_path / name).mkdir()
    again = read_recipe(tmp_path / "recipe.yaml").recipe
    assert Path(again.base.name).name == tiny_base.name
    assert Path(again.data[0].source).name == "rows.jsonl" and again.data[1].source == "org/data"
    assert again.train == recipe.train


def test_a_write_that_fails_leaves_no_manifest_and_no_half_file(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every rename of the final write fails once: what is there is whole, and the folder never counts as finished."""
    recipe = finished.recipe_for(tiny_base)
    run = finished.finished_run(recipe, finished.trained_model(recipe))
    rename, count, failing_at = os.replace, 0, -1

    def failing(source: Path, target: Path) -> None:
        nonlocal count
        count += 1
        if count == failing_at:
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(layout.os, "replace", failing)
    write_run(tmp_path, run)
    total, whole = count, {path.name for path in tmp_path.iterdir()}
    assert total == len(whole)
    for number in range(1, total + 1):
        count, failing_at = 0, number
        for path in tmp_path.iterdir():
            path.unlink()
        with pytest.raises(ResourceError, match="No space left"):
            write_run(tmp_path, run)
        names = {path.name for path in tmp_path.iterdir()}
        assert MANIFEST not in names and names < whole


def test_a_damaged_manifest_is_one_line(written: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    good = json.loads((written[0] / MANIFEST).read_text())
    for change, reason in (
        ({"format": 2}, "manifest format 1"),
        ({"seed": "x"}, "seed"),
        ({"extra": 1}, "extra"),
        ({"files": {"a": {"sha256": "zz", "size": 1}}}, "sha256"),
    ):
        (tmp_path / MANIFEST).write_text(json.dumps({**good, **change}))
        with pytest.raises(CheckFailed, match=reason):
            read_manifest(tmp_path)
    (tmp_path / MANIFEST).unlink()
    with pytest.raises(CheckFailed, match="not finished"):
        read_manifest(tmp_path)


def test_a_damaged_folder_never_counts_as_finished(tiny_base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    finished.write_finished(folder, tiny_base)
    assert damaged_files(folder) == []
    for name in sorted(read_manifest(folder).files):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert damaged_files(folder) == ([] if name == "README.md" else [name])  # a card may be edited
        (folder / name).unlink()
        assert damaged_files(folder) == [name]
        (folder / name).write_bytes(content)
    manifest = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(manifest[: len(manifest) // 2])
    assert damaged_files(folder) == [MANIFEST]


def test_what_makes_a_folder_an_adapter_is_written_last(tiny_base: Path, tmp_path: Path) -> None:
    """Without `adapter_config.json` no tool takes it for an adapter, without the manifest ours does not."""
    order: list[str] = []
    replace = os.replace

    def watched(source: Path, target: Path) -> None:
        order.append(Path(target).name)
        replace(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", watched)
        finished.write_finished(tmp_path / "run", tiny_base)
    assert order[-3:] == ["adapter_model.safetensors", "adapter_config.json", MANIFEST]
