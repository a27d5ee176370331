"""Finding a base: folders, the built-in one, the hub (a small one on this machine), and every way in which it fails."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from lora_tune.errors import LoraTuneError, RecipeError, UsageError
from lora_tune.model.source import BaseSource, base_fingerprint, check_against_base, find_base, load_tokenizer
from lora_tune.model.weights import read_header, tensor_infos
from lora_tune.recipe import Base, Lora, Train

COMMIT = "0123456789abcdef0123456789abcdef01234567"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 4431\n"
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 260}


def folder_with(folder: Path, config: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return folder


def refused(call: Callable[[], Any], *words: str) -> LoraTuneError:
    """The call ends in a one-line error that holds these words."""
    with pytest.raises(LoraTuneError) as caught:
        call()
    assert len(caught.value.problems) == 1 and "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value), str(caught.value)
    return caught.value


# --- folders and the built-in base


def test_a_local_base_is_recorded_by_the_name_of_its_folder_and_never_by_a_path(tiny_base: Path) -> None:
    source = find_base(Base(name=str(tiny_base)))
    assert (source.name, source.kind, source.revision) == (tiny_base.name, "local", None)
    assert source.folder == tiny_base.resolve() and source.config["model_type"] == "llama"


def test_the_built_in_base_is_found_by_name() -> None:
    source = find_base(Base(name="builtin:quickstart"))
    assert (source.name, source.kind, source.revision) == ("builtin:quickstart", "builtin", None)


@pytest.mark.parametrize("name", ["builtin:quikstart", "builtin:", "builtin:../quickstart", "builtin:quickstart/"])
def test_an_unknown_built_in_base_lists_those_that_there_are(name: str) -> None:
    refused(lambda: find_base(Base(name=name)), name, "builtin:quickstart")


def test_a_snapshot_folder_of_the_hub_cache_is_recorded_as_its_repository_and_commit(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "models--owner--model" / "snapshots" / COMMIT, LLAMA)
    source = find_base(Base(name=str(folder)))
    assert (source.name, source.kind, source.revision) == ("owner/model", "local", COMMIT)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (None, ("no config.json",)),
        ("", ("not JSON",)),
        ("{'model_type': 1}", ("not JSON",)),
        ("[" * 100_000, ("not JSON",)),
        ("[1]", ("JSON object", "list")),
        (POINTER, ("Git LFS pointer", "git lfs pull")),
        (" " * 5_000_000, ("5000000 bytes",)),
        ({}, ("model_type",)),
        ({"model_type": 3}, ("model_type",)),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, ("encoder", "BertForMaskedLM")),
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, ("sequence-to-sequence",)),
        ({"model_type": "qwen3_vl", "architectures": ["Qwen3VLForConditionalGeneration"]}, ("vision-language",)),
        ({"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}, ("classifier",)),
        ({"model_type": "clip", "architectures": ["CLIPModel"]}, ("not supported", "CLIPModel")),
        ({"model_type": "chatglm", "auto_map": {"AutoModel": "x.Y"}}, ("--trust-remote-code base",)),
        ({**LLAMA, "quantization_config": {"quant_method": "gptq"}}, ("gptq", "*-bnb-4bit")),
        ({**LLAMA, "quantization_config": {"quant_method": "awq"}}, ("awq",)),
        ({**LLAMA, "quantization_config": {"quant_method": "fp8"}}, ("fp8",)),
        ({**LLAMA, "quantization_config": {"quant_method": "mxfp4"}}, ("mxfp4",)),
        ({**LLAMA, "quantization_config": "mystery"}, ("mystery",)),
        ({**LLAMA, "quantization_config": {"load_in_8bit": True}}, ("stored as int8 already", "base.quantize: int8")),
        (
            {**LLAMA, "quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}},
            ("stored as fp4 already", "base.quantize: fp4"),
        ),
    ],
)
def test_a_base_that_cannot_be_trained_is_refused_in_one_line(tmp_path: Path, config: Any, words: Any) -> None:
    folder = tmp_path / "base"
    folder.mkdir()
    if config is not None:
        folder_with(folder, config)
    refused(lambda: find_base(Base(name=str(folder))), *words)


@pytest.mark.parametrize(
    ("stored", "quantize"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "nf4"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "int8"),
        ({"_load_in_8bit": True, "quant_method": "bitsandbytes"}, "int8"),
    ],
)
def test_a_base_stored_by_bitsandbytes_is_accepted_as_it_is(tmp_path: Path, stored: Any, quantize: Any) -> None:
    folder = folder_with(tmp_path / "base", {**LLAMA, "quantization_config": stored})
    assert find_base(Base(name=str(folder), quantize=quantize)).quantization == stored


def test_paths_that_are_no_base_folder_say_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(lambda: find_base(Base(name=str(tmp_path / "file"))), "a file, not a folder")
    refused(lambda: find_base(Base(name=str(tmp_path / "nowhere"))), "no such folder")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    refused(lambda: find_base(Base(name=str(adapter))), "this is an adapter folder", "lora.start_from")
    folder = folder_with(tmp_path / "base", LLAMA)
    refused(lambda: find_base(Base(name=str(folder), revision="main")), "base.revision", "'main'")


def test_code_of_a_base_runs_only_where_the_flag_names_that_very_base(tmp_path: Path) -> None:
    base = Base(name=str(folder_with(tmp_path / "glm", {"model_type": "chatglm", "auto_map": {"AutoModel": "x.Y"}})))
    refused(lambda: find_base(base), "not supported", "--trust-remote-code glm")
    refused(lambda: find_base(base, trust_remote_code="other/glm"), "another repository", "'other/glm'")
    assert find_base(base, trust_remote_code="glm").name == "glm"


def test_a_type_that_transformers_has_itself_needs_no_code_of_the_repository(tmp_path: Path) -> None:
    config = {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "auto_map": {"AutoConfig": "x.Y"}}
    assert find_base(Base(name=str(folder_with(tmp_path / "phi", config)))).name == "phi"


def test_the_configs_of_real_models_get_the_verdict_that_they_should(corpus: Path, tmp_path: Path) -> None:
    refusals = {
        "deepseek_v3_h7168_l61_DeepSeek-R1": "stored as fp8",
        "gpt_oss_h2880_l24_gpt-oss-20b": "stored as mxfp4",
        "llama_h4096_l32_Llama-3.1-8B-Instruct_bnb-int8": "stored as int8 already",
        "qwen3_vl_h2560_l36_Qwen3-VL-4B-Instruct": "vision-language",
    }
    seen = set()
    for path in sorted((corpus / "data" / "configs").glob("*/config.json")):
        name = path.parent.name
        seen.add(name)
        folder = folder_with(tmp_path / name, path.read_text())
        if name in refusals:
            refused(lambda: find_base(Base(name=str(folder))), refusals[name])  # noqa: B023
        else:
            assert find_base(Base(name=str(folder))).name == name
    assert refusals.keys() <= seen and len(seen) >= 15


# --- the hub


def hub_cache(root: Path, tiny_base: Path) -> Path:
    """A cache as huggingface_hub lays it out, with the tiny base as owner/model at one commit."""
    repository = root / "hub" / "models--owner--model"
    shutil.copytree(tiny_base, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return root / "hub"


def test_offline_a_base_is_taken_from_the_local_cache(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    assert constants.HF_HUB_OFFLINE
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub_cache(tmp_path, tiny_base)))
    for revision in (None, "main", COMMIT):
        source = find_base(Base(name="owner/model", revision=revision))
        assert (source.name, source.kind, source.revision) == ("owner/model", "hub", COMMIT)
        assert len(load_tokenizer(source)) == 260
    assert base_fingerprint(source) == base_fingerprint(find_base(Base(name=str(tiny_base))))
    refused(lambda: find_base(Base(name="owner/model", revision="v2")), "'owner/model'", "'v2'", "offline")
    refused(lambda: find_base(Base(name="owner/other")), "'owner/other'", "offline", "HF_HUB_OFFLINE")


class _Hub(http.server.BaseHTTPRequestHandler):
    """A hub in small: one open repository and several that fail as the real hub's do."""

    files: dict[str, bytes]
    asked: list[tuple[str, str | None]]
    failures: ClassVar[dict[str, tuple[int, str]]] = {
        "gated": (403, "GatedRepo"),
        "private": (401, "RepoNotFound"),
        "missing": (404, "RepoNotFound"),
        "revision": (404, "RevisionNotFound"),
        "broken": (500, ""),
    }

    def do_GET(self) -> None:
        self.asked.append((self.path, self.headers.get("Authorization")))
        name = self.path.split("/models/owner/")[-1].split("/")[0]
        if name in self.failures and self.headers.get("Authorization") != "Bearer hf_allowed":
            status, code = self.failures[name]
            self._answer(status, json.dumps({"error": code}).encode(), {"X-Error-Code": code})
        elif "/api/models/" in self.path and "/tree/" in self.path:
            listed = [{"type": "file", "path": p, "size": len(d), "oid": p} for p, d in self.files.items()]
            self._answer(200, json.dumps(listed).encode(), {})
        elif "/api/models/" in self.path:
            self._answer(200, json.dumps({"id": f"owner/{name}", "sha": COMMIT, "siblings": []}).encode(), {})
        else:
            path = self.path.split(f"/resolve/{COMMIT}/")[-1]
            self._answer(200, self.files[path], {"ETag": f'"{path}"', "X-Repo-Commit": COMMIT})

    do_HEAD = do_GET

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body)), "Content-Type": "application/json"}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def hub(tiny_base: Path) -> Iterator[tuple[str, type[_Hub]]]:
    _Hub.files = {path.name: path.read_bytes() for path in tiny_base.iterdir()} | {"run_me.py": b"", "old.bin": b"x"}
    _Hub.asked = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", _Hub
    server.shutdown()


def online(hub_url: str, home: Path, names: list[str], **environment: str) -> dict[str, Any]:
    """What `find_base` gives for each name in a fresh process that talks to that hub; errors as text."""
    script = (
        "import json, sys\n"
        "from lora_tune.errors import LoraTuneError\n"
        "from lora_tune.model.source import find_base\n"
        "from lora_tune.recipe import Base\n"
        "found = {}\n"
        "for name in sys.argv[1:]:\n"
        "    try:\n"
        "        source = find_base(Base(name=name))\n"
        "        files = sorted(path.name for path in source.folder.iterdir())\n"
        "        found[name] = [source.name, source.kind, source.revision, files]\n"
        "    except LoraTuneError as error:\n"
        "        found[name] = str(error)\n"
        "print(json.dumps(found))\n"
    )
    settings = {"HF_ENDPOINT": hub_url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
    clean = {key: value for key, value in os.environ.items() if key not in ("HF_HUB_CACHE", "HF_TOKEN")}
    root = str(Path(__file__).resolve().parent.parent)
    result = subprocess.run(
        [sys.executable, "-c", script, *names],
        env={**clean, **settings, "PYTHONPATH": root, "no_proxy": "127.0.0.1", **environment},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_of_a_hub_base_only_config_and_tokenizer_are_fetched_and_every_refusal_is_one_line(
    hub: tuple[str, type[_Hub]], tmp_path: Path
) -> None:
    url, server = hub
    server.asked.clear()
    found = online(url, tmp_path, ["owner/model", *(f"owner/{name}" for name in _Hub.failures), "two words"])
    name, kind, revision, files = found["owner/model"]
    assert (name, kind, revision) == ("owner/model", "hub", COMMIT)
    assert "config.json" in files and "tokenizer.json" in files
    assert not {"model.safetensors", "old.bin", "run_me.py"} & set(files)
    assert not any("safetensors" in path for path, _ in server.asked)
    for name, words in {
        "owner/gated": ("gated", "accept its terms", "HF_TOKEN"),
        "owner/private": ("private", "HF_TOKEN"),
        "owner/missing": ("no such repository", "check the spelling"),
        "owner/revision": ("no such branch, tag or commit",),
        "owner/broken": ("cannot be reached",),
        "two words": ("no such folder",),
    }.items():
        assert isinstance(found[name], str) and "\n" not in found[name], found[name]
        assert all(word in found[name] for word in words), found[name]


def test_hf_token_opens_what_is_gated(hub: tuple[str, type[_Hub]], tmp_path: Path) -> None:
    url, server = hub
    server.asked.clear()
    assert online(url, tmp_path, ["owner/gated"], HF_TOKEN="hf_allowed")["owner/gated"][2] == COMMIT
    assert all(token == "Bearer hf_allowed" for _, token in server.asked)


def test_a_hub_that_does_not_answer_is_one_line(tmp_path: Path) -> None:
    found = online("http://127.0.0.1:9", tmp_path, ["owner/model"])
    assert "cannot be reached" in found["owner/model"] and "\n" not in found["owner/model"]


# --- headers and fingerprint

NAMES = st.text("abc._0", min_size=1, max_size=8).filter(lambda name: name != "__metadata__")
SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
DTYPES = st.sampled_from([np.float32, np.float16, np.int8, np.int64, np.bool_])


@given(tensors=st.dictionaries(NAMES, st.tuples(SHAPES, DTYPES), min_size=1, max_size=5))
@settings(max_examples=40, deadline=None)
def test_headers_are_read_as_the_safetensors_library_reads_them(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, tuple[tuple[int, ...], Any]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "random.safetensors"
    arrays = {name: np.ones(shape, dtype) for name, (shape, dtype) in tensors.items()}
    save_file(arrays, path, {"format": "pt"})
    found = read_header(path)
    data = path.read_bytes()
    assert {name: info.shape for name, info in found.items()} == {name: a.shape for name, a in arrays.items()}
    assert all(data[info.start : info.end] == arrays[name].tobytes() for name, info in found.items())


def _file(header: bytes, body: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + body


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not a whole safetensors file"),
        (b"1234", "not a whole safetensors file"),
        (POINTER.encode(), "Git LFS pointer"),
        (_file(b"{}", length=2**60), "not a whole safetensors file"),
        (_file(b"{}", length=0), "not a whole safetensors file"),
        (_file(b"[]"), "not a JSON object"),
        (_file(b'{"a"'), "not a JSON object"),
        (_file(b"[" * 100_000), "not a JSON object"),
        (_file(b'{"a": 1}'), "'a'"),
        (_file(b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', b"1234567"), "ending at byte"),
        (_file(b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', b"1234"), "4 bytes for F32 [2]"),
        (_file(b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}', b"1234"), "shape [-1]"),
        (_file(b'{"a": {"dtype": "U8", "shape": [4], "data_offsets": [4, 0]}}', b"1234"), "offsets 4, 0"),
        (_file(b'{"a": {"dtype": "U8", "shape": [true], "data_offsets": [0, 1]}}', b"1"), "shape [True]"),
    ],
)
def test_damaged_weights_are_named(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    refused(lambda: read_header(path), words, str(path))


def _shard(folder: Path, tensors: dict[str, Any], *, parts: int) -> Path:
    """The tensors spread over files in reverse order, with an index."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    names = sorted(tensors, reverse=True)
    weight_map = {}
    for part in range(parts):
        file = f"model-{part}.safetensors"
        save_file({name: tensors[name] for name in names[part::parts]}, folder / file)
        weight_map.update(dict.fromkeys(names[part::parts], file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def fingerprint_of(folder: Path) -> str:
    return base_fingerprint(find_base(Base(name=str(folder))))


def test_the_fingerprint_is_of_the_tensors_whatever_the_sharding(tmp_path: Path, tiny_base: Path) -> None:
    tensors = load_file(tiny_base / "model.safetensors")
    for parts in (1, 3):
        folder = _shard(tmp_path / str(parts), tensors, parts=parts)
        assert fingerprint_of(folder) == fingerprint_of(tiny_base)
        assert tensor_infos(folder).keys() == tensors.keys()


@pytest.mark.parametrize("change", ["first", "last", "name", "dtype", "shape", "missing"])
def test_the_fingerprint_tells_another_base(tmp_path: Path, tiny_base: Path, change: str) -> None:
    tensors = load_file(tiny_base / "model.safetensors")
    name = "model.layers.0.mlp.gate_proj.weight"
    tensor = tensors.pop(name).copy()
    if change in ("first", "last"):
        tensor.reshape(-1)[0 if change == "first" else -1] += 1e-3
    if change != "missing":
        tensor = tensor.astype(np.float16) if change == "dtype" else tensor
        tensors[name + "x" if change == "name" else name] = tensor.reshape(-1, 32) if change == "shape" else tensor
    assert fingerprint_of(_shard(tmp_path / "other", tensors, parts=2)) != fingerprint_of(tiny_base)


@pytest.mark.parametrize(
    "index", ["[]", "{}", '{"weight_map": {"a": "../up.safetensors"}}', '{"weight_map": {"a": "gone.safetensors"}}']
)
def test_an_index_that_names_no_files_here_is_refused(tmp_path: Path, index: str) -> None:
    folder = folder_with(tmp_path / "base", LLAMA)
    (tmp_path / "up.safetensors").write_bytes(_file(b"{}"))
    (folder / "model.safetensors.index.json").write_text(index)
    refused(lambda: fingerprint_of(folder), "model.safetensors.index.json")


def test_a_base_without_safetensors_has_no_fingerprint(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "base", LLAMA)
    (folder / "pytorch_model.bin").write_bytes(b"")
    refused(lambda: fingerprint_of(folder), "no safetensors weights")
    problems = check_against_base(find_base(Base(name=str(folder))), lora=Lora(), train=Train())
    assert [problem.key for problem in problems if problem.severity == "error"] == ["base.name"]


# --- the adapter against the base

START = {"start_from": "adapter"}


@pytest.mark.parametrize(
    ("lora", "quantize", "expected"),
    [
        ({}, "nf4", None),
        ({"targets": ("q_proj", "layers.1.mlp.down_proj", "model.layers.0.self_attn.v_proj")}, "nf4", None),
        ({"targets": ("q_porj",)}, "nf4", ("error", "lora.targets", "did you mean q_proj?")),
        ({"targets": ("proj",)}, "nf4", ("error", "lora.targets", "matches no layer")),
        ({"targets": ("query_key_value",)}, "nf4", ("error", "lora.targets", "query_key_value")),
        ({"targets": ("lm_head",)}, "none", ("error", "lora.targets", "modules_to_save: [lm_head]")),
        ({"targets": ("embed_tokens",)}, "none", ("error", "lora.targets", "no linear layer")),
        ({"targets": ("norm",)}, "none", ("error", "lora.targets", "matches no layer")),
        ({"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"mlp.up_proj": 3.0}}, "nf4", None),
        ({"rank_pattern": {"q_prj": 4}}, "nf4", ("error", "lora.rank_pattern", "did you mean q_proj?")),
        (
            {"targets": ("q_proj",), "alpha_pattern": {"v_proj": 4.0}},
            "nf4",
            ("error", "lora.alpha_pattern", "got 'v_proj'"),
        ),
        ({"rank_pattern": {".*_proj": 4}}, "nf4", ("error", "lora.rank_pattern", "regular expressions")),
        ({"modules_to_save": ("lm_head", "embed_tokens", "norm")}, "nf4", None),
        ({"modules_to_save": ("lm_haed",)}, "nf4", ("error", "lora.modules_to_save", "did you mean lm_head?")),
        (
            {"targets": ("q_proj",), "modules_to_save": ("mlp",)},
            "nf4",
            ("error", "lora.modules_to_save", "a quantized layer cannot be trained in full"),
        ),
        ({"targets": ("q_proj",), "modules_to_save": ("mlp",)}, "none", None),
        ({"modules_to_save": ("mlp",)}, "none", ("error", "lora.modules_to_save", "has an adapter too")),
        (
            {"new_tokens": ("<a>",), "modules_to_save": ("embed_tokens",)},
            "nf4",
            ("error", "lora.modules_to_save", "leave out one"),
        ),
        ({"rank": 64}, "nf4", ("warning", "lora.rank", "rank 64 is above the 32")),
        ({"rank": 64, "method": "pissa"}, "nf4", ("error", "lora.rank", "rank 64 is above the 32")),
        ({"rank_pattern": {"k_proj": 33}, "method": "olora"}, "nf4", ("error", "lora.rank", "rank 33")),
        ({"method": "loftq"}, "none", ("error", "lora.method", "base.quantize is none")),
        ({"method": "loftq"}, "int8", None),
        ({"method": "dora"}, "int8", ("error", "lora.method", "int8")),
        ({"method": "dora"}, "fp4", None),
        *[({"method": m, **START}, "nf4", ("error", "lora.start_from", m)) for m in ("pissa", "olora", "loftq", "eva")],
        *[({"method": m, **START}, "nf4", None) for m in ("lora", "rslora", "dora")],
    ],
)
def test_what_does_not_fit_the_base_is_found_before_a_weight_is_read(
    tiny_base: Path, lora: dict[str, Any], quantize: Any, expected: tuple[str, str, str] | None
) -> None:
    source = find_base(Base(name=str(tiny_base), quantize=quantize))
    problems = check_against_base(source, lora=Lora.model_validate(lora), train=Train(max_length=512))
    found = [(problem.severity, problem.key, str(problem)) for problem in problems]
    if expected is None:
        assert found == []
        return
    severity, key, words = expected
    assert [item[:2] for item in found] == [(severity, key)] and words in found[0][2], found


@pytest.mark.parametrize("method", ["pissa", "olora", "loftq"])
def test_a_base_stored_quantized_has_no_weights_to_start_from(tmp_path: Path, method: Any) -> None:
    stored = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    folder = folder_with(tmp_path / "base", {**LLAMA, "quantization_config": stored})
    save_file({"model.layers.0.q_proj.weight": np.zeros((8, 1), np.uint8)}, folder / "model.safetensors")
    source = find_base(Base(name=str(folder)))
    problems = check_against_base(source, lora=Lora(method=method), train=Train())
    assert [(problem.severity, problem.key) for problem in problems] == [("error", "lora.method")]
    assert check_against_base(source, lora=Lora(targets=("q_proj",)), train=Train()) == []


def test_lengths_beyond_the_base_are_told(tmp_path: Path) -> None:
    def told(train: Train, **config: Any) -> list[tuple[str, str | None]]:
        source = BaseSource("base", "hub", tmp_path, None, {**LLAMA, **config})
        return [(p.severity, p.key) for p in check_against_base(source, lora=Lora(), train=train)]

    long = Train(max_length=4096)
    assert told(long, max_position_embeddings=4096, sliding_window=None) == []
    assert told(long, max_position_embeddings=2048) == [("warning", "train.max_length")]
    assert told(long, n_positions=1024) == [("warning", "train.max_length")]
    assert told(long, sliding_window=1024) == [("note", "train.max_length")]
    assert told(long, sliding_window=1024, use_sliding_window=False) == []


def test_experts_are_told_of_and_cannot_be_targets(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "moe", {**LLAMA, "num_local_experts": 4})
    tensors = {
        f"model.layers.0.{name}.weight": np.zeros((16, 16), np.float32)
        for name in ("self_attn.q_proj", "mlp.experts.0.w1", "mlp.experts.1.w1", "mlp.shared.down_proj")
    }
    save_file(tensors, folder / "model.safetensors")
    source = find_base(Base(name=str(folder)))
    everywhere = check_against_base(source, lora=Lora(), train=Train())
    assert [(p.severity, p.key) for p in everywhere] == [("note", "lora.targets"), ("warning", "base.quantize")]
    named = check_against_base(source, lora=Lora(targets=("w1", "q_proj")), train=Train())
    assert [(p.severity, p.key) for p in named] == [("error", "lora.targets"), ("warning", "base.quantize")]
    assert "experts" in named[0].reason and "'w1'" in named[0].reason


# --- tokenizers


def copied(tiny_base: Path, folder: Path, **changes: str | None) -> BaseSource:
    """A copy of the tiny base with the content of some files (`tokenizer_json=`…) replaced, or removed for None."""
    shutil.copytree(tiny_base, folder)
    for key, content in changes.items():
        path = folder / ".".join(key.rsplit("_", 1))
        path.unlink() if content is None else path.write_text(content)
    return find_base(Base(name=str(folder)))


def test_new_tokens_are_added_behind_the_others(tiny_base: Path) -> None:
    source = find_base(Base(name=str(tiny_base)))
    tokenizer = load_tokenizer(source, new_tokens=("<tool>", "<|answer|>"))
    assert len(tokenizer) == 262 and len(load_tokenizer(source)) == 260
    assert tokenizer.encode("a<tool>b", add_special_tokens=False)[1] == 260
    with pytest.raises(RecipeError, match="has these tokens already"):
        load_tokenizer(source, new_tokens=("<|im_end|>",))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ("no tokenizer", "tokenizer.json")),
        (POINTER, ("Git LFS pointer", "git lfs pull")),
        ("{", ("cannot be loaded",)),
        ('{"version": "1.0"}', ("cannot be loaded",)),
    ],
)
def test_a_tokenizer_that_lost_its_vocabulary_is_refused(
    tmp_path: Path, tiny_base: Path, content: str | None, words: Any
) -> None:
    source = copied(tiny_base, tmp_path / "base", tokenizer_json=content)
    refused(lambda: load_tokenizer(source), *words)


def test_a_tokenizer_that_encodes_text_to_nothing_is_refused(tmp_path: Path, tiny_base: Path) -> None:
    tokenizer = json.loads((tiny_base / "tokenizer.json").read_text())
    tokenizer["model"] = {**tokenizer["model"], "vocab": {}, "merges": []}
    source = copied(tiny_base, tmp_path / "base", tokenizer_json=json.dumps(tokenizer))
    refused(lambda: load_tokenizer(source), "encodes ordinary text to 0 tokens")


def test_a_tokenizer_of_another_base_is_refused(tmp_path: Path, tiny_base: Path) -> None:
    config = json.loads((tiny_base / "config.json").read_text())
    source = copied(tiny_base, tmp_path / "base", config_json=json.dumps({**config, "vocab_size": 128}))
    refused(lambda: load_tokenizer(source), "260 tokens", "128 embeddings")


def test_code_of_a_tokenizer_never_runs_by_itself(tmp_path: Path, tiny_base: Path) -> None:
    settings_ = json.loads((tiny_base / "tokenizer_config.json").read_text())
    settings_ |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    marker = tmp_path / "ran"
    source = copied(tiny_base, tmp_path / "base", tokenizer_config_json=json.dumps(settings_))
    (source.folder / "own.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    refused(lambda: load_tokenizer(source), "--trust-remote-code base")
    assert not marker.exists()


def test_broken_tokenizers_of_real_repositories_are_refused(corpus: Path) -> None:
    def source(*parts: str) -> BaseSource:
        return BaseSource(parts[-1], "local", corpus.joinpath("data", *parts), None, {})

    refused(lambda: load_tokenizer(source("tokenizers", "llama-2_corrupt-merges")), "cannot be loaded", "PyMerges")
    refused(lambda: load_tokenizer(source("adapters", "qwen2.5-7b_lfs-pointer")), "no tokenizer there")
    refused(lambda: load_tokenizer(source("tokenizers", "chatglm-6b")), "--trust-remote-code chatglm-6b")
    assert len(load_tokenizer(source("tokenizers", "phi-3-mini"))) == 32011


# --- cold


def test_a_base_is_found_and_checked_without_torch_or_transformers(tiny_base: Path) -> None:
    script = (
        "import sys\n"
        "from lora_tune.model.source import base_fingerprint, check_against_base, find_base\n"
        "from lora_tune.recipe import Base, Lora, Train\n"
        "source = find_base(Base(name=sys.argv[1]))\n"
        "check_against_base(source, lora=Lora(), train=Train())\n"
        "base_fingerprint(source)\n"
        "hot = {'torch', 'transformers', 'numpy', 'peft', 'datasets', 'huggingface_hub'} & sys.modules.keys()\n"
        "sys.exit(f'imported {sorted(hot)}' if hot else 0)\n"
    )
    root = str(Path(__file__).resolve().parent.parent)
    environment = {**os.environ, "PYTHONPATH": root}
    command = [sys.executable, "-c", script, str(tiny_base)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


def test_problems_have_the_class_of_a_usage_error() -> None:
    with pytest.raises(UsageError) as caught:
        find_base(Base(name="builtin:none"))
    assert caught.value.exit_code == 2
