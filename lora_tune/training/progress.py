"""What is seen of a training: a live line, `metrics.jsonl` with one line a step, `loss.png`, and trackers.

The live display is drawn on stderr, and becomes one plain line now and then where stderr is no terminal.
"""

from __future__ import annotations

import importlib.util
import math
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, get_reporting_integration_callbacks

from lora_tune.adapter.claim import RESERVE
from lora_tune.adapter.folder import CHECKPOINTS
from lora_tune.disk import give_back
from lora_tune.errors import Problem, UsageError
from lora_tune.terminal import messages, printable
from lora_tune.training.metrics_file import METRICS as METRICS
from lora_tune.training.metrics_file import MetricsFile, write_whole
from lora_tune.training.metrics_file import read_metrics as read_metrics
from lora_tune.training.schedule import UNLIMITED

PICTURE = "loss.png"
_PLAIN_EVERY_S = 15.0  # seconds between lines where stderr is no terminal
_WINDOW = 50  # steps over which speed is averaged
_STEP_KEYS = ("grad_norm", "learning_rate", "tokens", "trained_tokens", "step_s", "gib", "micro_batch_size", "progress")
# recipe name -> packages of which one must be installed
TRACKERS = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "trackio": ("trackio",),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
}


class TrainingDisplay(TrainerCallback):
    """The live line and `metrics.jsonl` of one training in `folder`; `close` ends the live line after an error.

    `style`: "auto" is live on a terminal and plain lines elsewhere, "none" shows nothing; the file is always written.
    """

    def __init__(self, folder: Path, *, style: Literal["auto", "none"] = "auto") -> None:
        self.path = folder / METRICS
        self.style = style
        self._file: MetricsFile | None = None
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._recent: deque[tuple[int, float]] = deque(maxlen=_WINDOW)
        self._said = 0.0
        self._before: list[dict[str, Any]] = []  # rows of what happened before the file was opened

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the file, cut back to the step at which the training goes on, and start the live line."""
        self._file = MetricsFile(self.path, up_to_step=state.global_step)
        for row in self._before:
            self._write(row)
        self._before = []
        console = messages()
        if self.style == "auto" and console.is_terminal:
            text = TextColumn("{task.description}", markup=False)
            columns = (TextColumn("training"), BarColumn(bar_width=24), MofNCompleteColumn(), text)
            self._bar = Progress(*columns, console=console)
            self._task = self._bar.add_task("", total=_total(state), completed=state.global_step)
            self._bar.start()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Write the numbers of a step, or of an evaluation, and show them."""
        logs = logs or {}
        if "skipped" in logs:
            self._write({"step": state.global_step, "epoch": state.epoch, "skipped": True})
        elif "loss" in logs:
            self._write(step_row(logs, step=state.global_step, epoch=state.epoch))
            self._recent.append((logs["tokens"], logs["step_s"]))
            self._show(self._line(logs, left=state.max_steps - state.global_step), state=state)
        elif any(name.startswith("eval_") for name in logs):
            scores = {name.removeprefix("eval_"): value for name, value in logs.items() if name.startswith("eval_")}
            self._write({"step": state.global_step, "epoch": state.epoch, "eval": _finite(scores)})
            shown = "  ".join(f"{name} {value:.4f}" for name, value in scores.items())
            self._say(f"step {state.global_step}: held out: {shown}")

    def on_answers(self, step: int, answers: Sequence[tuple[str, str]]) -> None:
        """Write and show sample answers of the model as it is at this step."""
        if answers:
            self._write({"step": step, "answers": [list(pair) for pair in answers]})
        for prompt, answer in answers:
            self._say(f"  {_short(prompt)} → {_short(answer)}")

    def on_replan(self, replan: Mapping[str, Any]) -> None:
        """Write that the training goes on with another plan from `replan["step"]` on (0: before it starts)."""
        row = {"step": replan["step"], "replan": dict(replan)}
        if self._file is not None:
            self._write(row)
        else:
            self._before.append(row)

    def text(self) -> str:
        """The lines of `metrics.jsonl` so far, for a checkpoint."""
        return self._file.text() if self._file is not None else ""

    def take_up(self, text: str) -> None:
        """Put the lines that a checkpoint holds in place of the file. Raises: OSError."""
        write_whole(self.path, text)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the live line and the file, which has every line then: on a full disk with the room that was set aside
        for the end. Raises: OSError.
        """
        file, self._file = self._file, None
        self.close()
        if file is None:
            return
        try:
            file.close()
        except OSError:
            give_back(self.path.parent / CHECKPOINTS / RESERVE)
            file.close()

    def close(self) -> None:
        """End the live line and close the file as it is; may be called more than once."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if self._file is not None:
            self._file.leave()
            self._file = None

    def _write(self, row: Mapping[str, Any]) -> None:
        if self._file is not None:
            self._file.write(row)

    def _line(self, logs: Mapping[str, Any], *, left: int) -> str:
        seconds = sum(spent for _, spent in self._recent)
        speed = sum(tokens for tokens, _ in self._recent) / max(seconds, 1e-9)
        remaining = _duration(left * seconds / len(self._recent))
        numbers = f"loss {logs['loss']:.4f}  lr {logs['learning_rate']:.2e}  {speed:,.0f} tokens/s"
        return f"{numbers}  {logs['gib']:.1f} GiB  {remaining} left"

    def _show(self, line: str, *, state: Any) -> None:
        if self._bar is not None:
            self._bar.update(self._task, total=_total(state), completed=state.global_step, description=line)
            return
        now = time.monotonic()
        if now - self._said >= _PLAIN_EVERY_S or state.global_step in (1, state.max_steps):
            self._said = now
            self._say(f"step {state.global_step}/{state.max_steps}  {line}")

    def _say(self, line: str) -> None:
        if self.style != "none":
            (self._bar.console if self._bar is not None else messages()).print(printable(line))


def step_row(logs: Mapping[str, Any], *, step: int, epoch: float) -> dict[str, Any]:
    """The line of `metrics.jsonl` for a step. Both forms of the loss are exact; `loss_hex` is for the eye of a diff."""
    numbers = _finite({name: logs[name] for name in _STEP_KEYS if name in logs})
    return {"step": step, "epoch": epoch, "loss": logs["loss"], "loss_hex": float(logs["loss"]).hex(), **numbers}


def draw_loss(metrics: Path, picture: Path) -> None:
    """Draw the loss over the optimizer steps, and the held-out loss where there is one, as a PNG, whole or not at all.

    On a full disk it takes of the room that was set aside for the end. Raises: OSError.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read_metrics(metrics)
    trained = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    scores = [(row["step"], row["eval"].get("loss")) for row in rows if "eval" in row]
    held_out = [(step, loss) for step, loss in scores if isinstance(loss, float)]
    figure = Figure(figsize=(7, 4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    steps, losses = [step for step, _ in trained], [loss for _, loss in trained]
    axes.plot(steps, losses, color="tab:blue", alpha=0.35, linewidth=1, label="training, each step")
    axes.plot(steps, list(_smoothed(losses)), color="tab:blue", linewidth=1.6, label="training, smoothed")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), color="tab:orange", marker="o", markersize=4, label="held out")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per trained token)")
    axes.grid(alpha=0.3)
    axes.legend()
    drawn = BytesIO()
    figure.savefig(drawn, format="png")
    try:
        write_whole(picture, drawn.getvalue())
    except OSError:
        give_back(picture.parent / CHECKPOINTS / RESERVE)
        write_whole(picture, drawn.getvalue())


def tracker_callbacks(track: Sequence[str], *, folder: Path) -> list[TrainerCallback]:
    """The callbacks of the trackers that the recipe names; TensorBoard writes below `folder/checkpoints`.

    Raises:
        UsageError: the package of a tracker is not installed; every missing one is named.
    """
    missing = [name for name in track if not any(importlib.util.find_spec(package) for package in TRACKERS[name])]
    if missing:
        raise UsageError(
            [Problem(f"{name} is not installed", f"pip install {TRACKERS[name][0]}", key="track") for name in missing]
        )
    callbacks: list[TrainerCallback] = []
    for name in track:
        if name == "tensorboard":  # its file names hold the name of the host, so they stay out of what is shared
            from torch.utils.tensorboard import SummaryWriter

            callbacks.append(TensorBoardCallback(SummaryWriter(log_dir=str(folder / "checkpoints" / "tensorboard"))))
        else:
            callbacks.extend(kind() for kind in get_reporting_integration_callbacks([name]))
    return callbacks


def _finite(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """JSON knows no infinity: a number that is not finite becomes its name."""
    return {name: value if math.isfinite(value) else str(value) for name, value in numbers.items()}


def _smoothed(values: Sequence[float]) -> Iterable[float]:
    """Exponential mean over a thirtieth of the steps, without the pull of its start."""
    keep = 1 - 1 / max(2.0, len(values) / 30)
    mean = weight = 0.0
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        yield mean / weight


def _total(state: Any) -> int | None:
    """The steps of this training as far as they are known; a time budget sets them after its first steps."""
    return None if state.max_steps >= UNLIMITED else state.max_steps


def _short(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= 100 else f"{flat[:99]}…"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
