"""Where the runs of the fault cases happen: a tiny base, a few rows, and a recipe for each configuration."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tests import tiny

STEPS, SAVE_EVERY = 6, 2
_HEAD = """\
base: {{name: base, {base}}}
data: [{{source: rows.jsonl, format: messages}}]
lora: {{rank: 4, alpha: 8, dropout: 0.1{lora}}}
train: {{batch_size: 4, micro_batch_size: 2, max_length: 64, learning_rate: 1e-3, {train}}}
eval: {{metrics: [loss], {eval}}}
output: out
"""
_SAVES = f"max_steps: {STEPS}, save_every: {SAVE_EVERY}, keep_checkpoints: 2"
CONFIGURATIONS: dict[str, str] = {
    "nf4": _HEAD.format(base="quantize: nf4", lora="", train=_SAVES, eval="hold_out: 4, samples: 0"),
    "float32, 2 epochs": _HEAD.format(
        base="quantize: none, compute_dtype: float32",
        lora="",
        train="epochs: 2, packing: false, neftune_alpha: 5",
        eval="hold_out: 18, samples: 0",
    ),
    "nf4, dora, evaluated, best kept": _HEAD.format(
        base="quantize: nf4, double_quant: false",
        lora=", method: dora",
        train=_SAVES,
        eval="hold_out: 4, every: 1, keep_best: true, samples: 1",
    ),
    "bfloat16, paged 8-bit AdamW, packed": _HEAD.format(
        base="quantize: none, compute_dtype: bfloat16",
        lora="",
        train=_SAVES + ", optimizer: paged_adamw_8bit, packing: true",
        eval="hold_out: 4, samples: 0",
    ),
}
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}


def write_place(folder: Path, configuration: str) -> Path:
    """A case's folder with `work/`, where the run happens and faults strike; returns `folder`."""
    work = folder / "work"
    for name in ("tmp", "cache"):
        (work / name).mkdir(parents=True)
    tiny.write_base(work / "base", config=SMALL)
    turns = [(f"What is {number} and {number + 2}?", f"It is {2 * number + 2}.") for number in range(26)]
    rows = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in turns]
    (work / "rows.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    (work / "recipe.yaml").write_text(CONFIGURATIONS[configuration])
    return folder


def copy_place(source: Path, target: Path) -> Path:
    """A copy of a case as it is now; links stay links."""
    shutil.copytree(source, target, symlinks=True)
    return target
