"""GGUF files read back by gguf's own reader: they hold what PEFT computes, and what they cannot hold is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import gguf_kit
import numpy as np
import pytest
import tiny
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from lora_tune.adapter.at_hand import chat_of_folder
from lora_tune.adapter.export_gguf import write_gguf_adapter
from lora_tune.cli import main
from lora_tune.data.chat_template import load_chat_template
from lora_tune.errors import CheckFailed
from lora_tune.model.export_gguf import GgufDtype, write_gguf_base
from lora_tune.model.gguf_architecture import metadata_of, rope_factors, shape_of
from lora_tune.model.gguf_tokenizer import gguf_tokenizer
from lora_tune.model.llama_tokens import llama_tokenizer
from lora_tune.model.source import find_base
from lora_tune.recipe import Base

HEADS = {"attn_q": 4, "attn_k": 2}


def source_of(base: Path) -> Any:
    return find_base(Base(name=str(base), quantize="none"))


def straight(name: str, values: np.ndarray, architecture: str) -> np.ndarray:
    """The rows of a tensor in transformers' order: pairs of neighbours become halves again, counted row by row."""
    heads = next((count for part, count in HEADS.items() if f".{part}." in name), None)
    if architecture != "llama" or heads is None:
        return values
    size = values.shape[0] // heads
    order = [h * size + 2 * j + two for h in range(heads) for two in (0, 1) for j in range(size // 2)]
    return values[order]


@pytest.mark.parametrize("kind", ["llama", "qwen2, tied", "phi3"])
def test_base_plus_adapter_read_back_is_what_peft_merges(kind: str, tmp_path: Path) -> None:
    base = gguf_kit.random_base(tmp_path / "base", kind)
    model = gguf_kit.adapter_on(base, tmp_path / "adapter")
    source, chat = source_of(base), chat_of_folder(base)
    write_gguf_base(source, tmp_path / "base.gguf", chat=chat)
    facts = write_gguf_adapter(tmp_path / "adapter", tmp_path / "adapter.gguf", source=source)
    keys = gguf_kit.keys_of(tmp_path / "adapter.gguf")
    assert keys["general.type"] == "adapter" and keys["adapter.type"] == "lora"
    scale = keys["adapter.lora.alpha"] / facts["rank"]
    weights, parts = gguf_kit.tensors_of(tmp_path / "base.gguf"), gguf_kit.tensors_of(tmp_path / "adapter.gguf")
    merged = model.merge_and_unload().state_dict()
    names = {gguf_name: name for name, gguf_name in _names(facts["architecture"], merged).items()}
    changed = [name.removesuffix(".lora_a") for name in parts if name.endswith(".lora_a")]
    assert len(parts) == 2 * len(changed) == 2 * (8 if kind == "phi3" else 14)
    for name, weight in weights.items():
        update = scale * parts[f"{name}.lora_b"] @ parts[f"{name}.lora_a"] if name in changed else 0.0
        wanted = merged[names[name]].numpy()
        assert np.abs(straight(name, weight + update, facts["architecture"]) - wanted).max() <= 1e-6, name
        assert name not in changed or np.abs(update).max() > 1e-2
    assert ("output.weight" in weights) == (kind != "qwen2, tied")
    assert set(weights) == set(names) - ({"output.weight"} if kind == "qwen2, tied" else set())


def _names(architecture: str, parameters: Any) -> dict[str, str]:
    from lora_tune.model.gguf_file import tensor_names

    found = {name: given or "" for name, given in tensor_names(architecture, 2, parameters).items()}
    assert "" not in found.values()
    return found


def test_norms_that_count_from_one_are_written_whole(tmp_path: Path) -> None:
    base = gguf_kit.random_base(tmp_path / "base", "gemma")
    write_gguf_base(source_of(base), tmp_path / "base.gguf", chat=chat_of_folder(base))
    tensors = gguf_kit.tensors_of(tmp_path / "base.gguf")
    norms = [values for name, values in tensors.items() if "norm" in name]
    assert len(norms) == 5 and all(abs(float(values.mean()) - 1) < 0.1 for values in norms)
    assert abs(float(tensors["blk.0.attn_q.weight"].mean())) < 0.1


@pytest.mark.parametrize(("dtype", "most"), [("float32", 0.0), ("float16", 4e-4), ("bfloat16", 4e-3), ("q8_0", 3e-3)])
def test_number_formats_round_as_they_say(dtype: GgufDtype, most: float, tiny_base: Path, tmp_path: Path) -> None:
    chat = chat_of_folder(tiny_base)
    exact, rounded = tmp_path / "exact.gguf", tmp_path / "rounded.gguf"
    write_gguf_base(source_of(tiny_base), exact, chat=chat)
    written = write_gguf_base(source_of(tiny_base), rounded, chat=chat, dtype=dtype)
    assert written.bytes == rounded.stat().st_size
    one, other = gguf_kit.tensors_of(exact), gguf_kit.tensors_of(rounded)
    error = max(float(np.abs(one[name] - other[name]).max() / np.abs(one[name]).max()) for name in one)
    assert error <= most * 2 and (error > 0 or most == 0)
    assert np.array_equal(one["output_norm.weight"], other["output_norm.weight"])


def test_a_base_trained_in_four_bit_is_written_as_training_held_it(tmp_path: Path, tiny_base: Path) -> None:
    """`ollama-adapter` puts the adapter on the weights that it was trained on, not on those of the base's file."""
    from lora_tune.model.base import full_weight, load_base

    gguf_kit.adapter_on(tiny_base, tmp_path / "adapter", quantize="nf4")
    out = tmp_path / "out"
    command = ["export", str(tmp_path / "adapter"), "--base", str(tiny_base), "--to", "ollama-adapter"]
    assert main([*command, "--output", str(out)]) == 0
    held = Base(name=str(tiny_base), quantize="nf4", compute_dtype="float32")
    model = load_base(find_base(held), held)
    wanted = full_weight(model.model.layers[0].mlp.up_proj).float().numpy()
    got = gguf_kit.tensors_of(out / "base.gguf")["blk.0.ffn_up.weight"]
    stored = find_base(Base(name=str(tiny_base), quantize="none"))
    write_gguf_base(stored, tmp_path / "stored.gguf", chat=chat_of_folder(tiny_base))
    assert np.abs(got - wanted).max() <= 1e-6
    assert np.abs(gguf_kit.tensors_of(tmp_path / "stored.gguf")["blk.0.ffn_up.weight"] - wanted).max() > 1e-3


def test_a_merged_file_holds_weights_words_and_ends(tiny_base: Path, tmp_path: Path) -> None:
    """DoRA has no B·A: merged it becomes a file like any other."""
    model = gguf_kit.adapter_on(tiny_base, tmp_path / "adapter", lora={"method": "dora"})
    command = ["export", str(tmp_path / "adapter"), "--base", str(tiny_base)]
    assert main([*command, "--to", "gguf", "--output", str(tmp_path / "no")]) == 1 and not (tmp_path / "no").exists()
    assert main([*command, "--to", "gguf-merged", "--output", str(tmp_path / "out")]) == 0
    merged = model.merge_and_unload().state_dict()
    tensors = gguf_kit.tensors_of(tmp_path / "out" / "model.gguf")
    assert np.abs(tensors["blk.1.ffn_down.weight"] - merged["model.layers.1.mlp.down_proj.weight"].numpy()).max() < 1e-5
    keys = gguf_kit.keys_of(tmp_path / "out" / "model.gguf")
    assert keys["tokenizer.ggml.eos_token_id"] == tiny.END
    assert "tokenizer.ggml.eot_token_id" not in keys  # the template has one stop token
    assert keys["tokenizer.chat_template"] == tiny.CHATML and keys["general.name"] == "adapter"
    assert len(keys["tokenizer.ggml.tokens"]) == 260 and keys["tokenizer.ggml.token_type"][:5] == [3, 3, 3, 3, 1]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["model.gguf"]


@pytest.mark.parametrize(
    ("kind", "changes", "says"),
    [
        ("gpt_neox", {"intermediate_size": 64}, "type 'gpt_neox'"),
        ("mixtral", {}, "type 'mixtral'"),
        ("llama", {"hidden_act": "gelu"}, "activation 'gelu'"),
        ("llama", {"mlp_bias": True}, "biases in the MLP"),
        ("qwen2", {"rope_parameters": gguf_kit.LLAMA3}, "rotary scaling 'llama3'"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}, "scaling 'yarn'"),
        ("gemma2", {"query_pre_attn_scalar": 144}, "query_pre_attn_scalar 144"),
        ("gemma3_text", {"layer_types": ["full_attention"] * 7}, "windows in other layers"),
        ("phi3", {"partial_rotary_factor": 0.5}, "rotated in part"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused_by_name(kind: str, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(CheckFailed, match="not supported in a GGUF file") as caught:
        shape = shape_of(gguf_kit.config_of(kind, **changes))
        metadata_of(shape)
        rope_factors(shape)
    assert says in str(caught.value)


def test_a_window_becomes_the_context(tmp_path: Path) -> None:
    """llama.cpp has no sliding window for Mistral: within the window the two agree, so no more is declared."""
    shape = shape_of(gguf_kit.config_of("mistral", sliding_window=128))
    assert metadata_of(shape)["llama.context_length"].value == 128  # type: ignore[union-attr]
    assert metadata_of(shape_of(gguf_kit.config_of("llama")))["llama.context_length"].value == 512  # type: ignore[union-attr]


def chat_with(change: Any, *, template: str = tiny.CHATML) -> Any:
    """The tiny tokenizer after `change` of its tokenizer.json."""
    content = copy.deepcopy(tiny.tokenizer())
    change(content)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)), eos_token="<|im_end|>", bos_token="<|endoftext|>"
    )
    tokenizer.chat_template = template
    return load_chat_template(tokenizer)


def cut_by(*steps: dict[str, Any], whole: bool = False) -> Any:
    def change(content: dict[str, Any]) -> None:
        last = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": len(steps) == 0}
        content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*steps, last]}
        content["model"]["ignore_merges"] = whole

    return change


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{REST}"
LLAMA3 = rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{REST}"


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (cut_by(), "gpt-2"),
        (cut_by(split(QWEN2)), "qwen2"),
        (cut_by(split(LLAMA3)), "dbrx"),
        (cut_by(split(LLAMA3), whole=True), "llama-bpe"),
    ],
)
def test_pre_tokenizers_are_known_by_what_they_do(change: Any, name: str) -> None:
    assert gguf_tokenizer(chat_with(change), rows=260).metadata["tokenizer.ggml.pre"] == name


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (cut_by(split(r"\p{N}{1,2}|.")), "Split"),
        (cut_by(split(QWEN2), whole=True), "ignore_merges"),
        (lambda content: content.update(normalizer={"type": "Lowercase"}), "the normalizer Lowercase"),
        (lambda content: content["pre_tokenizer"].update(add_prefix_space=True), "ByteLevel"),
        (lambda content: content["added_tokens"][1].update(rstrip=True), "takes the white space"),
    ],
)
def test_tokenizers_that_cannot_be_said_are_refused(change: Any, says: str) -> None:
    with pytest.raises(CheckFailed, match="not supported in a GGUF file") as caught:
        gguf_tokenizer(chat_with(change), rows=260)
    assert says in str(caught.value)


def test_text_that_llama_cpp_would_cut_otherwise_is_refused_where_it_stands() -> None:
    chat = chat_with(lambda content: content.update(normalizer={"type": "NFC"}))
    written = gguf_tokenizer(chat, rows=260)
    assert list(written.cut_otherwise) == ["not NFC"]
    words = llama_tokenizer(written, chat)
    assert words.ids("\u00e9<|im_end|>") == chat.tokenizer.encode("\u00e9<|im_end|>")
    if words.by == "transformers":
        with pytest.raises(CheckFailed, match="NFC"):
            words.ids("e\u0301")


def test_bos_is_added_by_one_side_alone() -> None:
    """Where tokenizer and template both write it, the file says that llama.cpp adds it; else it stands in the text."""

    def with_bos(content: dict[str, Any]) -> None:
        bos = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
        single = [bos, {"Sequence": {"id": "A", "type_id": 0}}]
        special = {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [tiny.DOCUMENT], "tokens": ["<|endoftext|>"]}}
        pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
        content["post_processor"] = {
            "type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special,
        }  # fmt: skip

    template = "{{ bos_token }}" + tiny.CHATML
    for change, text, adds in (
        (with_bos, template, True),
        (with_bos, tiny.CHATML, False),
        (lambda content: None, template, False),
    ):
        chat = chat_with(change, template=text)
        written = gguf_tokenizer(chat, rows=260)
        assert written.adds_bos is adds is written.metadata["tokenizer.ggml.add_bos_token"]


def test_real_tokenizers(corpus: Path) -> None:
    """Qwen's is written, Phi-3's control tokens and TinyLlama's first space have no form in the file."""
    said = {}
    for name in ("qwen2.5-7b-unsloth_vision-pad", "phi-3-mini", "tinyllama-1.1b-chat"):
        chat = chat_of_folder(corpus / "data" / "tokenizers" / name)
        try:
            said[name] = str(gguf_tokenizer(chat, rows=len(chat.tokenizer)).metadata["tokenizer.ggml.pre"])
        except CheckFailed as error:
            said[name] = error.problems[0].reason.removeprefix("not supported in a GGUF file: ")
    assert said == {
        "qwen2.5-7b-unsloth_vision-pad": "qwen2",
        "phi-3-mini": "the token '<|assistant|>', which takes the white space beside it with it",
        "tinyllama-1.1b-chat": (
            "a tokenizer that puts a space before the first word alone, where a chat begins with words"
        ),
    }


def test_without_gguf_one_line_says_what_to_install(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    from lora_tune.errors import UsageError

    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UsageError, match=r"lora_tune\[gguf\]"):
        write_gguf_base(source_of(tiny_base), tmp_path / "base.gguf", chat=chat_of_folder(tiny_base))


def test_an_update_of_shared_embeddings_is_refused(tmp_path: Path) -> None:
    base = gguf_kit.random_base(tmp_path / "base", "llama, tied")
    gguf_kit.foreign_adapter(base, tmp_path / "adapter", ["embed_tokens", "q_proj"])
    with pytest.raises(CheckFailed, match=r"model\.embed_tokens, which the base shares"):
        write_gguf_adapter(tmp_path / "adapter", tmp_path / "a.gguf", source=source_of(base))
