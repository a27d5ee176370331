"""What exported adapters compute in other engines, against PEFT: the largest difference of a logit on held-out rows.

    python -m benchmarks.export_parity [--rows 8]

Takes the example adapter and copies of it whose scale or rank engines disagree about (rsLoRA, alpha_pattern,
rank_pattern), all on the embedded base in float32. `canonical` and `merged` run in PEFT and transformers themselves;
`mlx` in mlx-lm and `gguf` in llama.cpp where these are installed (`pip install 'mlx[cpu]' mlx-lm llama-cpp-python`).
`effect` is what the adapter changes at all, `noise` how far the engine's bare base is from transformers' base: an
export cannot be nearer than that.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import platform
import shutil
import tempfile
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "adapters" / "example"
BASE = "builtin:quickstart"
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rsLoRA": {"use_rslora": True, "lora_alpha": 7},
    "alpha_pattern": {"alpha_pattern": {"q_proj": 50, "down_proj": 11}},
    "rank_pattern": {"rank_pattern": {"v_proj": 4, "up_proj": 8}},
    "all of it": {"use_rslora": True, "lora_alpha": 7, "alpha_pattern": {"o_proj": 5}, "rank_pattern": {"v_proj": 4}},
}
Logits = list[np.ndarray]
"""For each row (T, V) float32."""


def write_variant(folder: Path, changes: dict[str, Any], *, like: Path = EXAMPLE) -> Path:
    """A stranger's folder: the adapter of `like` with other settings, its matrices cut to the ranks that these say."""
    from safetensors.torch import load_file, save_file

    from lora_tune.adapter.lora_config import read_settings

    folder.mkdir(parents=True)
    config = json.loads((like / "adapter_config.json").read_text()) | changes
    settings = read_settings(config)
    tensors = {}
    for key, tensor in load_file(like / "adapter_model.safetensors").items():
        rank = settings.rank_of(key.removeprefix("base_model.model.").partition(".lora_")[0])
        tensors[key] = (tensor[:rank] if "lora_A" in key else tensor[:, :rank]).contiguous()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(like / name, folder / name)
    return folder


def in_transformers(model_folder: Path, rows: Sequence[Sequence[int]], *, adapter: Path | None = None) -> Logits:
    """Logits of a model folder in transformers, in float32; `adapter` is put on it by PEFT itself."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype="float32")
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter), autocast_adapter_dtype=False)
    with torch.no_grad():
        return [model.eval()(torch.tensor([list(row)])).logits[0].float().numpy() for row in rows]


def in_mlx(model_folder: Path, rows: Sequence[Sequence[int]], *, adapter: Path | None = None) -> Logits:
    """The same in mlx-lm, on the CPU."""
    import mlx.core as mx
    from mlx_lm import load

    mx.set_default_device(mx.cpu)
    model = load(str(model_folder), adapter_path=str(adapter) if adapter else None)[0]
    model.set_dtype(mx.float32)
    model.eval()
    return [np.array(model(mx.array([list(row)]))[0].astype(mx.float32)) for row in rows]


def in_llama_cpp(model_file: Path, rows: Sequence[Sequence[int]], *, adapter: Path | None = None) -> Logits:
    """The same in llama.cpp, on the CPU, with a cache in float32."""
    from llama_cpp import Llama

    model = Llama(
        str(model_file), lora_path=str(adapter) if adapter else None, n_ctx=512, logits_all=True, verbose=False,
        type_k=0, type_v=0, n_threads=1,
    )  # fmt: skip
    found = []
    for row in rows:
        model.reset()
        model.eval(list(row))
        found.append(np.array(model.scores[: len(row)], dtype=np.float32))
    return found


def quiet() -> None:
    """No progress bars of transformers between the lines."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def is_here(engine: str) -> bool:
    """Whether mlx-lm or llama.cpp is installed."""
    return importlib.util.find_spec({"mlx": "mlx_lm", "llama.cpp": "llama_cpp"}[engine]) is not None


def largest(one: Logits, other: Logits) -> float:
    """The largest difference of a logit over all rows and positions."""
    return max(float(np.abs(a - b).max()) for a, b in zip(one, other, strict=True))


def same_top(one: Logits, other: Logits) -> float:
    """The share of positions with the same most likely token."""
    same = [a.argmax(-1) == b.argmax(-1) for a, b in zip(one, other, strict=True)]
    return float(np.concatenate(same).mean())


def export(folder: Path, output: Path, *, to: str, base: str = BASE) -> Path:
    """`lora-tune export` in this process. Raises: SystemExit where it is refused."""
    from lora_tune.cli import main

    with contextlib.redirect_stdout(io.StringIO()):
        code = main(["export", str(folder), "--to", to, "--output", str(output), "--base", base, "--json"])
    if code:
        raise SystemExit(f"the export to {to} ended with {code}")
    return output


def held_out_ids(count: int) -> list[list[int]]:
    """The token ids of the first held-out rows, with their answers."""
    from lora_tune.adapter.at_hand import chat_of_folder
    from lora_tune.adapter.parity import held_out_conversations

    chat = chat_of_folder(EXAMPLE)
    data = ROOT / "recipes" / "quickstart" / "held_out.jsonl"
    conversations = held_out_conversations(EXAMPLE, chat, rows=count, data=data)
    entries = chat.rows(conversations, loss_on="assistant")
    return [[int(token) for token in row.input_ids] for entry in entries if isinstance(entry, list) for row in entry]


def float32_base(folder: Path) -> Path:
    """The embedded base with its weights stored in float32, so that no engine rounds them in its own way."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = ROOT / "lora_tune" / "builtin" / "quickstart"
    AutoModelForCausalLM.from_pretrained(place, dtype="float32").save_pretrained(folder)
    AutoTokenizer.from_pretrained(place).save_pretrained(folder)
    return folder


def measured(place: Path, rows: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    """One line for each variant and engine."""
    quiet()
    base = float32_base(place / "base")
    bare = in_transformers(base, rows)
    engines = [engine for engine in ("mlx", "llama.cpp") if is_here(engine)]
    noise = {"PEFT, canonical": 0.0, "transformers, merged": 0.0}
    if "mlx" in engines:
        noise["mlx-lm"] = largest(in_mlx(base, rows), bare)
    if "llama.cpp" in engines:
        noise["llama.cpp"] = largest(in_llama_cpp(_gguf_base(base, place / "base.gguf"), rows), bare)
    lines = []
    for name, changes in VARIANTS.items():
        folder = write_variant(place / name / "in", changes)
        trained = in_transformers(base, rows, adapter=folder)
        found = {
            "PEFT, canonical": in_transformers(
                base, rows, adapter=export(folder, place / name / "canonical", to="canonical", base=str(base))
            )
        }
        merged = export(folder, place / name / "merged", to="merged", base=str(base))
        found["transformers, merged"] = in_transformers(merged, rows)
        if "mlx" in engines:
            out = export(folder, place / name / "mlx", to="mlx", base=str(base))
            found["mlx-lm"] = in_mlx(base, rows, adapter=out)
        if "llama.cpp" in engines:
            lora = _gguf_adapter(folder, place / name / "adapter.gguf", base)
            found["llama.cpp"] = in_llama_cpp(place / "base.gguf", rows, adapter=lora)
        for engine, logits in found.items():
            lines.append({
                "adapter": name, "engine": engine, "difference": largest(logits, trained),
                "effect": largest(trained, bare), "noise": noise[engine], "same_top": same_top(logits, trained),
            })  # fmt: skip
    return lines


def _gguf_base(base: Path, file: Path) -> Path:
    from lora_tune.adapter.at_hand import chat_of_folder
    from lora_tune.model.export_gguf import write_gguf_base
    from lora_tune.model.source import find_base
    from lora_tune.recipe import Base

    source = find_base(Base(name=str(base), quantize="none"))
    write_gguf_base(source, file, chat=chat_of_folder(EXAMPLE), dtype="float32")
    return file


def _gguf_adapter(folder: Path, file: Path, base: Path) -> Path:
    from lora_tune.adapter.export_gguf import write_gguf_adapter
    from lora_tune.model.source import find_base
    from lora_tune.recipe import Base

    write_gguf_adapter(folder, file, source=find_base(Base(name=str(base), quantize="none")))
    return file


def versions() -> dict[str, str]:
    """Versions of everything that computed."""
    found = {}
    for name in ("torch", "transformers", "peft", "mlx", "mlx-lm", "llama-cpp-python", "gguf"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def main() -> None:
    """Export, compute, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8, help="held-out rows to compute")
    arguments = parser.parse_args()
    rows = held_out_ids(arguments.rows)
    with tempfile.TemporaryDirectory() as scratch:
        lines = measured(Path(scratch), rows)
    positions = sum(map(len, rows))
    print(f"\n{len(rows)} rows, {positions} positions, float32; largest difference of a logit from PEFT")
    print(f"{'adapter':14} {'engine':22} {'difference':>11} {'noise':>9} {'effect':>8} {'same top':>9}")
    for line in lines:
        print(
            f"{line['adapter']:14} {line['engine']:22} {line['difference']:11.1e} {line['noise']:9.1e} "
            f"{line['effect']:8.2f} {line['same_top']:9.2%}"
        )
    result = {"rows": len(rows), "positions": positions, "lines": lines, "machine": platform.machine()}
    result["versions"] = versions()
    target = ROOT / "benchmarks" / "results" / "export_parity.json"
    target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
