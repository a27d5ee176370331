"""Peak memory and tokens/s of the whole command on a base of a given shape with random weights.

    python -m benchmarks.shaped_run --shape llama-8b --data alpaca.json --steps 30

Makes a base folder of that shape on this machine (random bfloat16 weights: speed and memory do not depend on their
values), with the tokenizer of `builtin:quickstart` and a vocabulary of the real size, and sends it through
`python -m lora_tune.run recipes/alpaca.yaml`: load in 4 bits, train, save, verify in a fresh process. Prints and keeps
what the run's manifest says. `--shape tiny` runs anywhere in seconds.
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

HERE = Path(__file__).resolve().parent
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


def write_base(folder: Path, shape: str) -> None:
    """Write a Llama base with random weights (standard deviation 0.02, norms 1), a shard at a time."""
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
    generator = torch.Generator().manual_seed(0)
    index: dict[str, str] = {}
    for file, tensors in tensor_shapes(shape):
        weights = {}
        for name, size in tensors:
            ones = len(size) == 1
            random = torch.ones(size) if ones else torch.empty(size).normal_(0, 0.02, generator=generator)
            weights[name] = random.to(torch.bfloat16)
            index[name] = file
        save_file(weights, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def run_command(base: Path, *, data: Path, output: Path, overrides: list[str]) -> float:
    """Run the recipe on `base`; returns the wall time in seconds."""
    command = [sys.executable, "-m", "lora_tune.run", str(HERE.parent / "recipes" / "alpaca.yaml"), f"base.name={base}"]
    command += [f"data.0.source={data}", "data.0.format=alpaca", f"output={output}", *overrides]
    start = time.perf_counter()
    subprocess.run(command, check=True)
    return time.perf_counter() - start


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
    parser.add_argument("--data", type=Path, required=True, help="a file of alpaca rows")
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps")
    parser.add_argument("--keep", type=Path, help="write the summary to this JSON file")
    parser.add_argument("overrides", nargs="*", help="section.key=value, as for lora_tune.run")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        base, output = Path(scratch) / f"random-{arguments.shape}", Path(scratch) / "adapter"
        write_base(base, arguments.shape)
        overrides = [f"train.max_steps={arguments.steps}", "eval.max_rows=8", *arguments.overrides]
        wall_s = run_command(base, data=arguments.data.resolve(), output=output, overrides=overrides)
        result = summary(output, shape=arguments.shape, wall_s=wall_s)
    print(json.dumps(result, indent=1))
    if arguments.keep:
        arguments.keep.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
