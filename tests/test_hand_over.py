"""Adapters in other hands: what other engines do with them, inspect, the canonical form, archives, differences."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
import stat
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import finished
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_tune.adapter.archive import pack, unpack
from lora_tune.adapter.canonical import canonical
from lora_tune.adapter.compat import ENGINES, RULES, Traits, engines_named, judge, matrix, traits_of
from lora_tune.adapter.describe import INERT, is_inert, read_matrix, updates
from lora_tune.adapter.difference import changed, distance
from lora_tune.adapter.folder import CONFIG, FILES, MANIFEST, WEIGHTS
from lora_tune.adapter.load import load_adapter, read_adapter
from lora_tune.adapter.lora_config import read_settings
from lora_tune.adapter.secrets import secrets_in
from lora_tune.adapter.tensor_file import read_header
from lora_tune.adapter.verify import engine_traits, recorded_base, verify_folder
from lora_tune.adapter.words import check_tokenizer, differs
from lora_tune.cli import main
from lora_tune.errors import CheckFailed, UsageError
from lora_tune.model.base import load_base
from lora_tune.model.source import find_base
from lora_tune.recipe import Base

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"method": "rslora"},
    "alpha_pattern": {"alpha_pattern": {"q_proj": 16.0, "down_proj": 3.0}},
    "rank_pattern": {"rank_pattern": {"v_proj": 2, "up_proj": 8}},
    "all of it": {"method": "rslora", "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"o_proj": 5.0}},
}


@pytest.fixture(scope="module")
def folders(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Finished folders of every variant."""
    place = tmp_path_factory.mktemp("variants")
    for name, lora in VARIANTS.items():
        finished.write_finished(place / name, tiny_base, lora=lora)
    return {name: place / name for name in VARIANTS}


def _subject(folder: Path) -> Any:
    report = verify_folder(folder, depth="quick")
    assert not report.errors
    return report.subject


def _marks(folder: Path) -> dict[str, str]:
    traits = engine_traits(_subject(folder))
    return {engine: judge(traits, engine).mark for engine in ENGINES}


# ----- other engines -----
@pytest.mark.parametrize(
    ("variant", "wrong"),
    [
        ("plain", set()),
        ("rslora", {"sglang", "llama.cpp", "ollama"}),
        ("alpha_pattern", {"sglang", "llama.cpp", "ollama", "lorax"}),
        ("rank_pattern", {"sglang", "lorax"}),
        ("all of it", {"sglang", "llama.cpp", "ollama", "lorax"}),
    ],
)
def test_what_engines_run_wrong_is_known(variant: str, wrong: set[str], folders: dict[str, Path]) -> None:
    """Facts: rsLoRA at alpha / r in three engines, patterns in four; measured on the engines' own code."""
    assert {engine for engine, mark in _marks(folders[variant]).items() if mark == "wrong"} == wrong


def test_the_canonical_form_is_wrong_nowhere(folders: dict[str, Path], tmp_path: Path) -> None:
    for number, folder in enumerate(folders.values()):
        assert main(["export", str(folder), "--to", "canonical", "--output", str(tmp_path / str(number))]) == 0
        marks = _marks(tmp_path / str(number))
        assert "wrong" not in marks.values() and "refused" not in marks.values()


def test_every_rule_has_an_adapter_and_says_what_to_do() -> None:
    having: dict[str, Any] = {
        "rslora": True, "several_scales": True, "dora": True, "saved_modules": True, "trained_tokens": True,
        "embeddings_or_head": True, "some_layers": True, "fractional_alpha": True, "quantized_base": True,
        "own_template": True, "architecture": "gpt2", "ranks": (4, 1024),
    }  # fmt: skip
    plain = Traits(ranks=(16,), architecture="llama")
    assert not any(rule.holds(plain) for rule in RULES)
    odd = [*(replace(plain, **{field: value}) for field, value in having.items()), replace(plain, architecture=None)]
    fired = {rule.trait for traits in odd for rule in RULES if rule.holds(traits)}
    assert fired == {rule.trait for rule in RULES}
    for rule in RULES:
        for answer in rule.answers.values():
            assert answer.mark != "ok" and answer.reason and answer.fix


@pytest.mark.parametrize(("rank", "flag"), [(4, 8), (8, 8), (9, 16), (64, 64), (300, 320), (512, 512)])
def test_the_smallest_rank_that_vllm_takes(rank: int, flag: int) -> None:
    assert judge(Traits(ranks=(rank,)), "vllm").flags.endswith(f"--max-lora-rank {flag}")


def test_a_rank_over_512_is_refused_by_vllm() -> None:
    verdict = judge(Traits(ranks=(513,)), "vllm")
    assert verdict.mark == "refused" and verdict.flags == ""


def test_the_worst_mark_counts() -> None:
    verdict = judge(Traits(ranks=(16,), rslora=True, quantized_base=True), "sglang")
    assert verdict.mark == "wrong" and [answer.mark for answer in verdict.answers] == ["wrong", "care"]


def test_traits_come_from_the_tensors(folders: dict[str, Path]) -> None:
    subject = _subject(folders["rank_pattern"])
    assert engine_traits(subject).ranks == (2, 4, 8)
    settings = read_settings({"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]})
    whole = traits_of(settings, ("m.layers.0.q_proj", "m.layers.1.q_proj"))
    partly = traits_of(settings, ("m.layers.0.q_proj", "m.layers.1.q_proj", "m.layers.0.v_proj"))
    assert not whole.some_layers and partly.some_layers


def test_an_unknown_engine_is_named() -> None:
    with pytest.raises(UsageError, match="no such engine, got 'vlm'"):
        engines_named("vllm, vlm")
    assert engines_named("all") == tuple(ENGINES) and engines_named("mlx,vllm") == ("mlx", "vllm")


def test_the_documented_matrix_is_the_table() -> None:
    text = (Path(__file__).parent.parent / "adapters" / "README.md").read_text(encoding="utf-8")
    for row in matrix():
        assert "| " + " | ".join(row) + " |" in text


def test_the_verb_exits_with_1_where_an_engine_runs_it_wrong(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["adapters", "verify", str(folders["rslora"]), "--quick", "--for", "vllm", "--json"]) == 0
    assert main(["adapters", "verify", str(folders["rslora"]), "--quick", "--for", "vllm,ollama"]) == 1
    shown = capsys.readouterr().out
    assert "☠ Ollama" in shown and "lora-tune export --to gguf, or --to ollama" in shown


# ----- inspect -----
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_norms_are_those_of_the_updates(variant: str, folders: dict[str, Path]) -> None:
    subject = _subject(folders[variant])
    tensors = load_file(folders[variant] / WEIGHTS)
    found = updates(folders[variant] / WEIGHTS, subject.header, subject.known_settings())
    assert len(found) * 2 == len(tensors)
    for update in found:
        key = f"base_model.model.{update.module}.lora_"
        whole = update.scale * tensors[f"{key}B.weight"].double() @ tensors[f"{key}A.weight"].double()
        assert update.norm == pytest.approx(float(whole.norm()), rel=1e-9) and update.weights == whole.numel()
        assert update.rms == pytest.approx(float(whole.pow(2).mean().sqrt()), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_tensors_are_read_in_every_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    tensor = torch.randn(5, 7).to(dtype)
    save_file({"other": torch.zeros(3), "x": tensor}, tmp_path / "t.safetensors")
    entry = read_header(tmp_path / "t.safetensors")["x"]
    assert np.array_equal(read_matrix(tmp_path / "t.safetensors", entry), tensor.double().numpy())


def test_inspect_tells_an_inert_adapter(folders: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    folder = Path(shutil.copytree(folders["plain"], tmp_path / "inert", ignore=shutil.ignore_patterns(MANIFEST)))
    tensors = load_file(folder / WEIGHTS)
    save_file({k: t * 0 if "lora_B" in k else t for k, t in tensors.items()}, folder / WEIGHTS, {"format": "pt"})
    assert main(["adapters", "inspect", str(folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["inert"] is True and facts["rank"] == 4 and len(facts["layers"]) == 2
    subject = _subject(folders["plain"])
    alive = updates(folders["plain"] / WEIGHTS, subject.header, subject.known_settings())
    assert not is_inert(alive) and min(update.rms for update in alive) > 100 * INERT


def test_inspect_shows_what_it_is(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapters", "inspect", str(folders["rslora"])]) == 0
    shown = capsys.readouterr().out
    for text in ("rslora, rank 4, alpha 8", "layer 0", "layer 1", "loss 3.5 → 1.25", "rows.jsonl (100 rows)"):
        assert text in shown


# ----- tokenizer and template against the base's -----
def test_tokens_with_other_ids_are_told(folders: dict[str, Path], tmp_path: Path) -> None:
    base = folders["rslora"]  # its tokenizer is the base's
    assert list(check_tokenizer(folders["plain"], base)) == []
    copy = Path(shutil.copytree(folders["plain"], tmp_path / "copy"))
    content = json.loads((copy / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    first, second, third = list(vocabulary)[40:43]  # no special ones
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    del vocabulary[third]
    (copy / "tokenizer.json").write_text(json.dumps(content))
    problems = [str(problem) for problem in check_tokenizer(copy, base)]
    assert len(problems) == 2 and "2 tokens" in problems[0] and "1 tokens of its base's are missing" in problems[1]


def test_another_template_is_told(folders: dict[str, Path], tiny_base: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folders["plain"], tmp_path / "copy"))
    assert differs(copy, tiny_base) is False
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    assert differs(copy, tiny_base) is True
    (copy / MANIFEST).unlink()
    report = verify_folder(copy, base=Base(name=str(tiny_base), quantize="none"), depth="quick")
    assert any("another chat template" in problem.reason for problem in report.problems) and not report.errors


# ----- folders that strangers made -----
@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("gemma-3-270m-it_r4_causal", ""),
        ("gpt2_r16_causal_trl-kto", ""),
        ("bert-base-uncased_r8_seqcls", "not supported: task_type"),
        ("gpt2_r8_causal_bin", "not supported: a pickle"),
        ("opt-350m_lora_peft0.6_bin", "not supported: a pickle"),
        ("qwen2.5-0.5b_mlx-lm", "not supported: an adapter of mlx-lm"),
        ("qwen2.5-7b_lfs-pointer", "is a Git LFS pointer"),
        ("roberta-base_unilora", "not supported: peft_type must be LORA, got UNILORA"),
    ],
)
def test_real_adapters_are_inspected_or_refused_by_name(
    name: str, answer: str, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["adapters", "inspect", str(corpus / "data" / "adapters" / name), "--json"])
    facts = json.loads(capsys.readouterr().out)
    errors = [problem["reason"] for problem in facts["problems"] if problem["severity"] == "error"]
    if not answer:
        assert code == 0 and errors == [] and facts["layers"] and all(line["norm"] > 0 for line in facts["layers"])
        assert main(["adapters", "verify", str(corpus / "data" / "adapters" / name), "--quick", "--for", "vllm"]) == 0
    else:
        assert code == 1 and errors[0].startswith(answer)


# ----- the canonical form -----
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_canonical_form_computes_the_same(
    variant: str, folders: dict[str, Path], tiny_base: Path, tmp_path: Path
) -> None:
    assert main(["export", str(folders[variant]), "--to", "canonical", "--output", str(tmp_path / "out")]) == 0
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert config["r"] == config["lora_alpha"] and not config["use_rslora"]
    assert not config["rank_pattern"] and not config["alpha_pattern"]
    logits = []
    for folder in (folders[variant], tmp_path / "out"):
        base = recorded_base(folder, name=str(tiny_base))
        model = load_adapter(load_base(find_base(base), base), folder)
        with torch.no_grad():
            logits.append(model(torch.arange(5, 40)[None]).logits)
    assert float((logits[0] - logits[1]).abs().max()) < 2e-5
    report = verify_folder(tmp_path / "out", base=recorded_base(tmp_path / "out", name=str(tiny_base)))
    assert report.problems == () and report.facts["replay"]["adapter"] < 1e-5  # the original's own test vectors


@pytest.mark.parametrize(("dtype", "most"), [("float32", 2e-7), ("bfloat16", 1e-2), ("float16", 2e-3)])
def test_the_rounding_is_measured(dtype: Any, most: float, folders: dict[str, Path]) -> None:
    saved = read_adapter(folders["all of it"])
    form = canonical(saved, dtype=dtype, least_rank=16)
    assert form.rank == 16 and {str(t.dtype) for t in form.adapter.tensors.values()} == {f"torch.{dtype}"}
    settings, worst = read_settings(saved.config), 0.0
    for key, a in saved.tensors.items():
        if "lora_A" in key:
            b_key = key.replace("lora_A", "lora_B")
            module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            old = settings.scale_of(module) * saved.tensors[b_key].double() @ a.double()
            new = form.adapter.tensors[b_key].double() @ form.adapter.tensors[key].double()
            worst = max(worst, float((new - old).norm() / old.norm()))
    assert form.error == pytest.approx(worst, rel=1e-3) and form.error < most


@pytest.mark.parametrize("lora", [{"method": "dora"}, {"modules_to_save": ["lm_head"]}, {"new_tokens": ["<x>"]}])
def test_what_has_no_canonical_form_is_refused(lora: dict[str, Any], tiny_base: Path, tmp_path: Path) -> None:
    finished.write_finished(tmp_path / "in", tiny_base, lora=lora)
    with pytest.raises(CheckFailed, match=r"not supported: .* lora-tune merge"):
        canonical(read_adapter(tmp_path / "in"))
    assert main(["export", str(tmp_path / "in"), "--to", "canonical", "--output", str(tmp_path / "out")]) == 1
    assert not (tmp_path / "out").exists()


# ----- archives -----
def test_pack_and_unpack_give_the_same_folder(folders: dict[str, Path], tmp_path: Path) -> None:
    (folders["plain"] / "checkpoints").mkdir(exist_ok=True)
    assert pack(folders["plain"], tmp_path / "a.zip") == (tmp_path / "a.zip").stat().st_size
    pack(folders["plain"], tmp_path / "b.zip")
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    assert main(["adapters", "unpack", str(tmp_path / "a.zip"), str(tmp_path / "new")]) == 0
    names = {path.name for path in (tmp_path / "new").iterdir()}
    assert names == {path.name for path in folders["plain"].iterdir()} - {"checkpoints"}
    for name in names:
        assert (tmp_path / "new" / name).read_bytes() == (folders["plain"] / name).read_bytes()


def _archive(folder: Path, path: Path, changes: dict[str, bytes | None], mode: int = stat.S_IFREG | 0o644) -> Path:
    """An archive of the folder with some members replaced (None: left out), each changed one of this file mode."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for name in FILES:
            if (folder / name).is_file() and name not in changes:
                target.write(folder / name, name)
        for name, data in changes.items():
            if data is not None:
                entry = zipfile.ZipInfo(name)
                entry.external_attr, entry.compress_type = mode << 16, zipfile.ZIP_DEFLATED
                target.writestr(entry, data)
    return path


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"../escaped": b"x"}, "no file of an adapter folder"),
        ({"/etc/x": b"x"}, "no file of an adapter folder"),
        ({"sub/manifest.json": b"x"}, "no file of an adapter folder"),
        ({"run.py": b"x"}, "no file of an adapter folder"),
        ({"training_args.bin": b"x"}, "no file of an adapter folder"),
        ({"ledger.json": b" " * 30_000_000}, "would grow"),
        ({MANIFEST: None}, "holds no manifest.json"),
        ({"README.md": b"changed"}, "differs from its hash"),
        ({WEIGHTS: b"x" * 1000}, "differs from its hash"),
    ],
)
def test_hostile_archives_are_refused(
    changes: dict[str, bytes | None], reason: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    archive = _archive(folders["plain"], tmp_path / "x.zip", changes)
    with pytest.raises(CheckFailed, match=re.escape(reason)):
        unpack(archive, tmp_path / "deep" / "new")
    assert list((tmp_path / "deep").iterdir()) == [] and not (tmp_path / "escaped").exists()


def test_links_and_doubles_and_cut_archives_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    link = _archive(folders["plain"], tmp_path / "l.zip", {"README.md": b"/etc/hostname"}, mode=stat.S_IFLNK | 0o777)
    with pytest.raises(CheckFailed, match="must be a regular file"):
        unpack(link, tmp_path / "new")
    whole = _archive(folders["plain"], tmp_path / "w.zip", {})
    with zipfile.ZipFile(whole, "a") as target, pytest.warns(UserWarning, match="Duplicate name"):
        target.writestr(MANIFEST, b"{}")
    with pytest.raises(CheckFailed, match="twice"):
        unpack(whole, tmp_path / "new")
    (tmp_path / "cut.zip").write_bytes(whole.read_bytes()[:-100])
    with pytest.raises(CheckFailed, match="no sound ZIP"):
        unpack(tmp_path / "cut.zip", tmp_path / "new")
    with pytest.raises(CheckFailed, match="would unpack to"):
        unpack(_archive(folders["plain"], tmp_path / "big.zip", {}), tmp_path / "new", max_bytes=10_000)
    assert not (tmp_path / "new").exists()


def test_damaged_bytes_inside_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    archive = _archive(folders["plain"], tmp_path / "x.zip", {})
    data = bytearray(archive.read_bytes())
    with zipfile.ZipFile(archive) as source:
        start = source.getinfo("tokenizer.json").header_offset + 200
    data[start : start + 40] = b"\xff" * 40
    archive.write_bytes(data)
    with pytest.raises(CheckFailed, match="no sound ZIP"):
        unpack(archive, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_declared_size_that_lies_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    archive = _archive(folders["plain"], tmp_path / "x.zip", {})
    data = bytearray(archive.read_bytes())
    with zipfile.ZipFile(io.BytesIO(data)) as source:
        size = source.getinfo("ledger.json").file_size
    for magic, offset in ((b"PK\x01\x02", 24), (b"PK\x03\x04", 22)):
        start = next(
            m.start() for m in re.finditer(re.escape(magic), data) if b"ledger.json" in data[m.start() : m.start() + 80]
        )
        assert int.from_bytes(data[start + offset : start + offset + 4], "little") == size
        data[start + offset : start + offset + 4] = (size - 1).to_bytes(4, "little")
    archive.write_bytes(data)
    with pytest.raises(CheckFailed):
        unpack(archive, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("name", "text", "kind"),
    [
        ("README.md", "token hf_" + "a1B2" * 9, "a Hugging Face token"),
        ("recipe.yaml", r"# C:\Users\ann\data.jsonl", "a path of a local machine"),
        ("ledger.json", '{"x": "AKIA' + "ABCD" * 4 + '"}', "an AWS key"),
        ("metrics.jsonl", "s3cret-value-of-mine", "a secret of your environment"),
    ],
)
def test_secrets_keep_a_folder_from_being_packed(
    name: str, text: str, kind: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_API_KEY", "s3cret-value-of-mine")
    assert list(secrets_in(folders["plain"])) == []
    copy = Path(shutil.copytree(folders["plain"], tmp_path / "copy"))
    (copy / name).write_text(f"first\n{text}\n")
    found = [(problem.reason, problem.line) for problem in secrets_in(copy)]
    assert found == [(f"holds {kind}", 2)] and not any(text in str(problem) for problem in secrets_in(copy))


# ----- differences -----
def test_diff_measures_the_distance_of_the_updates(folders: dict[str, Path], capsys: Any) -> None:
    a, b = _subject(folders["plain"]), _subject(folders["rank_pattern"])
    found, whole = distance(a, b), []
    for subject in (a, b):
        tensors = load_file(subject.folder / WEIGHTS)
        scale = subject.known_settings().scale_of
        modules = sorted(key.removesuffix(".lora_A.weight") for key in tensors if "lora_A" in key)
        whole.append(
            torch.cat([
                (scale(m.removeprefix("base_model.model."))
                 * tensors[f"{m}.lora_B.weight"].double() @ tensors[f"{m}.lora_A.weight"].double()).flatten()
                for m in modules
            ])
        )  # fmt: skip
    assert found.distance == pytest.approx(float((whole[0] - whole[1]).norm()), rel=1e-6)
    assert found.cosine == pytest.approx(float(torch.cosine_similarity(whole[0], whole[1], dim=0)), rel=1e-6)
    fields = {field for field, _, _ in changed(a, b)}
    assert {"adapter_config.rank_pattern.v_proj", "recipe.lora.rank_pattern.v_proj"} <= fields
    same = distance(a, a)
    assert same.distance < 1e-6 * same.norm_a and same.cosine == pytest.approx(1) and changed(a, a) == []
    assert main(["adapters", "diff", str(folders["plain"]), str(folders["rslora"]), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["weights"]["shared"] == 14 and math.isfinite(answer["weights"]["distance"])
