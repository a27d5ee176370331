"""The picture of a sweep: held-out losses over the steps, and the loss of every run, as an SVG that stands alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lora_tune.evaluation.pictures import COLOURS, WIDTH_IN, as_svg, row_label, rows_axis, steps_axis, styled, thinned
from lora_tune.terminal import number_text

MOST_ROWS = 24  # runs with a row of their own, the best
_ROW_IN, _CURVES_IN = 0.52, 2.3
# the palette of the report's page (evaluation/report_page.jinja), so that both look alike
_PALETTE = (
    "<style>svg{color-scheme:light dark;background:var(--card);--card:#fff;--ink:#1b1f23;--soft:#59616a;--line:#dcdfe3;"
    "--base:#a35200;--adapter:#1a5fb4;--held:#a35200;--better:#176b33;--worse:#b3261e}"
    "@media(prefers-color-scheme:dark){svg{--card:#1b1e23;--ink:#e8eaed;--soft:#a3abb5;--line:#363b43;--base:#f0a35e;"
    "--adapter:#7fb2f5;--held:#f0a35e;--better:#6fcf8f;--worse:#ff8a80}}</style>"
)


@dataclass(frozen=True, slots=True)
class DrawnRun:
    """One run of the picture: what it is called, its last held-out loss, and its losses by step."""

    label: str
    kind: Literal["best", "complete", "pruned"]
    loss: float
    losses: Sequence[tuple[float, float]]


def sweep_picture(runs: Sequence[DrawnRun]) -> str | None:
    """Curves of all runs where there are any, and below a row for each of the best; None without a finite loss.

    `runs` come in the order of the rows. The best run is drawn strong, a pruned one broken.
    """
    from matplotlib.figure import Figure

    runs = [run for run in runs if math.isfinite(run.loss)]
    if not runs:
        return None
    curves = [run for run in runs if len(run.losses) > 1]
    rows = runs[:MOST_ROWS]
    heights = ([_CURVES_IN] if curves else []) + [0.6 + _ROW_IN * len(rows)]
    figure = Figure(figsize=(WIDTH_IN, sum(heights)), layout="constrained", facecolor="none")
    panels = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    if curves:
        axes = styled(panels[0])
        for run in reversed(curves):  # the best on top
            points = thinned([(float(step), loss) for step, loss in run.losses])
            steps, losses = [step for step, _ in points], [loss for _, loss in points]
            colour = COLOURS["adapter" if run.kind == "best" else "soft"]
            width, dashes = (2.2, "-") if run.kind == "best" else (1.1, "--" if run.kind == "pruned" else "-")
            axes.plot(steps, losses, dashes, color=colour, linewidth=width)
            if run.kind == "pruned":
                axes.plot(steps[-1], losses[-1], "x", color=COLOURS["worse"], markersize=6)
        axes.set_ylabel("held-out loss")
        steps_axis(axes, [step for run in curves for step, _ in run.losses])
    axes = styled(panels[-1])
    rows_axis(axes, len(rows))
    for place, run in enumerate(rows):
        colour = COLOURS[{"best": "adapter", "complete": "soft", "pruned": "worse"}[run.kind]]
        face = COLOURS["card"] if run.kind == "pruned" else colour
        axes.plot(run.loss, -place, "o", color=colour, markerfacecolor=face, markersize=8 if run.kind == "best" else 6)
        row_label(axes, f"{run.label} (pruned)" if run.kind == "pruned" else run.label, -place)
    axes.set_xlabel("held-out loss")
    best = next((run for run in runs if run.kind == "best"), runs[0])
    pruned = sum(run.kind == "pruned" for run in runs)
    about = f"{len(runs)} runs by held-out loss, {pruned} of them pruned: the lowest is {number_text(best.loss)}, of "
    return _alone(as_svg(figure, name="sweep", label=f"{about}{best.label}."))


def _alone(svg: str) -> str:
    """The picture as a file of its own, with the colours that a page would give it, light and dark."""
    head = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    start = svg.index(">") + 1
    return f"<svg {head}{svg[len('<svg') : start]}{_PALETTE}{svg[start:]}\n"
