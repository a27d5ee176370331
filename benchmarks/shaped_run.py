"""Peak memory and tokens/s of the whole command on a base of a given shape with random weights.

    python -m benchmarks.shaped_run --shape llama-8b [--data alpaca.json] [--steps 10] [train.batch_size=4 …]

Makes a base folder of that shape on this machine (random bfloat16 weights: speed and memory do not depend on their
values; `--weights` takes those of another folder of that shape), with the tokenizer of `builtin:quickstart` and a
vocabulary of the real size, and sends it through `python -m lora_tune.run recipes/alpaca.yaml`: load in 4 bits, train
on packed rows (the quickstart's without --data), save, verify in a fresh process. Prints and keeps what the run's
manifest says and what it planned. `--shape tiny` runs anywhere in seconds.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.machine import result_file

HERE = Path(__file__).resolve().parent
DATA = HERE.parent / "recipes" / "quickstart" / "train.jsonl"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")

# hidden, intermediate, layers, heads, key-value heads, vocabulary; from the models' published config.json
SHAPES: dict[str, tuple[int, int, int, int, int, int]] = {
    "tiny": (64, 128, 2, 4, 2, 8192),
    "1b": (2048, 8192, 16, 32, 8, 128256),
    "llama-2-7b": (4096, 11008, 32, 32, 32, 32000),
    "llama-8b": (4096, 14336, 32, 32, 8, 128256),
    "llama-8b-4-layers": (4096, 14336, 4, 32, 8, 128256),  # where one layer decides, not their number
}


def tensor_shapes(shape: str) -> Iterator[tuple[str, list[tuple[str, tuple[int, ...]]]]]:
    """Name of each shard file and the (name, shape) of its tensors: one file for each layer, one for the rest."""
    hidden, intermediate, layers, heads, kv_heads, vocabulary = SHAPES[shape]
    kv = hidden // heads * kv_heads
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        yield (
            f"model-layer-{layer:03d}.safetensors",
            [
                (prefix + "self_attn.q_proj.weight", (hidden, hidden)),
                (prefix + "self_attn.k_proj.weight", (kv, hidden)),
                (prefix + "self_attn.v_proj.weight", (kv, hidden)),
                (prefix + "self_attn.o_proj.weight", (hidden, hidden)),
                (prefix + "mlp.gate_proj.weight", (intermediate, hidden)),
                (prefix + "mlp.up_proj.weight", (intermediate, hidden)),
                (prefix + "mlp.down_proj.weight", (hidden, intermediate)),
                (prefix + "input_layernorm.weight", (hidden,)),
                (prefix + "post_attention_layernorm.weight", (hidden,)),
            ],
        )
    yield (
        "model-rest.safetensors",
        [
            ("model.embed_tokens.weight", (vocabulary, hidden)),
            ("lm_head.weight", (vocabulary, hidden)),
            ("model.norm.weight", (hidden,)),
        ],
    )


def write_base(folder: Path, shape: str, *, weights: Path | None = None) -> None:
    """Write a Llama base with random weights (standard deviation 0.02, norms 1), a shard at a time.

    With `weights` its files are links to those of another base of this shape.
    """
    import torch
    from safetensors.torch import save_file

    from lora_tune.model.source import find_base
    from lora_tune.recipe import Base

    quickstart = find_base(Base(name="builtin:quickstart"))
    hidden, intermediate, layers, heads, kv_heads, vocabulary = SHAPES[shape]
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
             "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": hidden // heads,
             "vocab_size": vocabulary, "max_position_embeddings": 8192, "tie_word_embeddings": False}  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**quickstart.config, **sizes}, indent=1))
    for name in TOKENIZER_FILES:
        if (quickstart.folder / name).exists():
            shutil.copy(quickstart.folder / name, folder / name)
    if weights is not None and (files := list(weights.glob("*.safetensors*"))):
        for file in files:
            (folder / file.name).symlink_to(file.resolve())
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    index: dict[str, str] = {}
    for file_name, tensors in tensor_shapes(shape):
        made = {}
        for name, size in tensors:
            empty = torch.empty(size, device=device)
            random = empty.fill_(1) if len(size) == 1 else empty.normal_(0, 0.02, generator=generator)
            made[name] = random.to(torch.bfloat16).cpu()
            index[name] = file_name
        save_file(made, folder / file_name, metadata={"format": "pt"})
    if device == "cuda":
        torch.cuda.empty_cache()  # the run is another process
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def run_command(base: Path, *, data: Path, output: Path, overrides: list[str]) -> tuple[float, list[str]]:
    """Run the recipe on `base`; the wall time in seconds, and what it said of memory and time.

    Raises:
        SystemExit: it ended with another exit code than 0; its last words.
    """
    command = [sys.executable, "-m", "lora_tune.run", str(HERE.parent / "recipes" / "alpaca.yaml"), f"base.name={base}"]
    command += [f"data.0.source={data}", "data.0.format=alpaca", f"output={output}", *overrides]
    start = time.perf_counter()
    found = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(found.stdout, flush=True)
    if found.returncode:
        raise SystemExit(f"the run ended with exit code {found.returncode}: {found.stdout[-1500:]}")
    said = [line.strip() for line in found.stdout.splitlines() if "GiB" in line or "base.attention" in line]
    return time.perf_counter() - start, said


def summary(output: Path, *, shape: str, wall_s: float) -> dict[str, Any]:
    """What the manifest of the run says, with machine and versions."""
    import torch

    manifest = json.loads((output / "manifest.json").read_text())
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {"shape": shape, "device": device, "wall_s": round(wall_s, 1), "versions": manifest["libraries"],
            "training": manifest["training"], "scores": manifest["scores"]}  # fmt: skip


def main() -> None:
    """Make the base, run the command, print and keep the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--data", type=Path, default=DATA, help="a file of alpaca rows")
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps")
    parser.add_argument("--weights", type=Path, help="a base of this shape whose weight files are taken")
    parser.add_argument("--keep", type=result_file, help="write the summary to this JSON file")
    parser.add_argument("overrides", nargs="*", help="section.key=value, as for lora_tune.run")
    given = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as scratch:
        base, output = Path(scratch) / f"random-{given.shape}", Path(scratch) / "adapter"
        write_base(base, given.shape, weights=given.weights)
        overrides = [f"train.max_steps={given.steps}", "eval.max_rows=8", *given.overrides]
        wall_s, said = run_command(base, data=given.data.resolve(), output=output, overrides=overrides)
        result = {**summary(output, shape=given.shape, wall_s=wall_s), "said": said}
    print(json.dumps(result, indent=1))
    if given.keep:
        given.keep.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
