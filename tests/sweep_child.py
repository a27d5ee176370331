"""A stand-in for `lora-tune run` in tests of sweeps: the same files, exit codes and signals, in a fraction of a second.

The held-out loss after each step is `rate * (1 + 1 / step)`; a rate of 9 fails, 8 is wrong data, one of 0.9 takes
a minute a step. It goes on from the step that it was stopped at.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

STEPS = 6
settings = dict(word.partition("=")[::2] for word in sys.argv[2:] if "=" in word)
folder, rate = Path(settings["output"]), float(settings["train.learning_rate"])
assert "--resume" in sys.argv and "--json" in sys.argv
stopped: list[int] = []
signal.signal(signal.SIGTERM, lambda number, _: stopped.append(number))
(folder / "checkpoints").mkdir(parents=True, exist_ok=True)
with (folder / "starts").open("a") as starts:
    starts.write(f"{os.environ.get('CUDA_VISIBLE_DEVICES')}\n")
metrics, checkpoint = folder / "metrics.jsonl", folder / "checkpoints" / "step"
first = int(checkpoint.read_text()) if checkpoint.exists() else 0
slow = 60.0 if rate == 0.9 else float(os.environ.get("SWEEP_CHILD_STEP_S", "0.005"))


def leave(code: int, reason: str) -> None:
    problem = {"reason": reason, "fix": "", "file": None, "line": None, "column": None, "key": None}
    print(json.dumps({"exit_code": code, "problems": [{**problem, "severity": "error"}]}))
    sys.exit(code)


if rate == 9:
    leave(1, "the loss is not finite")
if rate == 8:
    leave(3, "half of the rows are empty")
for step in range(first + 1, STEPS + 1):
    end = time.monotonic() + (slow if step > 1 else min(slow, 0.2))
    while time.monotonic() < end and not stopped:
        time.sleep(0.005)
    with metrics.open("a") as lines:
        lines.write(json.dumps({"step": step, "loss": 1.0}) + "\n")
        lines.write(json.dumps({"step": step, "eval": {"loss": rate * (1 + 1 / step)}}) + "\n")
    checkpoint.write_text(str(step))
    if stopped:
        leave(143, "stopped by SIGTERM")
(folder / "manifest.json").write_text("{}")
print(json.dumps({"exit_code": 0, "scores": {"loss": {"base": 9.0, "adapter": rate}}, "problems": []}))
