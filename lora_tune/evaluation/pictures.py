"""Pictures of the report as SVG to stand in a page: colours by the page's CSS variables, letters as outlines.

Drawn by matplotlib in stand-in colours that become `var(--…)`, so that one picture suits a light and a dark page. A
picture is 360 units wide, which is a phone's width in pixels, with letters 10 units high.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lora_tune.terminal import number_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lora_tune.evaluation.scores import Score

POINTS = 400  # of a line; more steps are drawn as the lowest and highest value of neighbours
LABEL_LETTERS = 60  # of a row's label
WIDTH_IN = 5.0
_LABEL_UNITS = 335  # width of a label, in letters of 10 units
COLOURS = {
    name: f"#0{number:x}f0f{number:x}"
    for number, name in enumerate(("ink", "soft", "line", "card", "base", "adapter", "better", "worse", "held"), 1)
}
Verdict = Literal["better", "worse", "same"]


@dataclass(frozen=True, slots=True)
class Picture:
    """An inline SVG, its title, and what it shows in words (for readers who do not see it)."""

    title: str
    about: str
    svg: str


@dataclass(frozen=True, slots=True)
class Strip:
    """One row of a dot-and-interval picture; `low` and `high` are ends of the interval, `base` a second, hollow dot."""

    label: str
    value: float
    low: float
    high: float
    verdict: Verdict
    base: float | None = None


@dataclass(frozen=True, slots=True)
class Cloud:
    """The scores of one task's templates, by side."""

    label: str
    base: Sequence[float]
    adapter: Sequence[float]


def curve(
    title: str,
    points: Sequence[tuple[float, float]],
    *,
    name: str,
    smooth: Literal["smoothed", "as it is"] = "as it is",
    held_out: Sequence[tuple[float, float]] = (),
    scale: Literal["from zero", "free"] = "free",
) -> Picture | None:
    """A number over the optimizer steps; None without a finite point. `name` makes the ids of the picture its own."""
    points = [(step, value) for step, value in points if math.isfinite(value)]
    held_out = [(step, value) for step, value in held_out if math.isfinite(value)]
    if not points:
        return None
    figure, axes = _figure(2.5)
    if smooth == "smoothed":
        axes.plot(*_columns(thinned(points)), color=COLOURS["adapter"], alpha=0.3, linewidth=1)
        line = list(zip([step for step, _ in points], _smoothed([value for _, value in points]), strict=True))
        axes.plot(*_columns(thinned(line)), color=COLOURS["adapter"], linewidth=1.8)
    else:
        axes.plot(*_columns(thinned(points)), color=COLOURS["adapter"], linewidth=1.4)
    if len(points) == 1:
        axes.plot(*_columns(points), "o", color=COLOURS["adapter"], markersize=5)
    if held_out:
        axes.plot(*_columns(thinned(held_out)), "o-", color=COLOURS["held"], markersize=4, linewidth=1.4)
    if scale == "from zero":
        axes.set_ylim(bottom=0)
    steps_axis(axes, [step for step, _ in (*points, *held_out)])
    about = _in_words(title, points)
    if held_out:
        about += f" Held out: from {number_text(held_out[0][1])} to {number_text(held_out[-1][1])}."
    return Picture(title, about, as_svg(figure, name=name, label=about))


def scores_picture(title: str, strips: Sequence[Strip], *, name: str, bounds: tuple[float, float] | None) -> Picture:
    """Base (hollow) and adapter (filled, with the interval of its difference) of metrics that share an axis."""
    figure, axes = _strip_axes(len(strips))
    for place, strip in enumerate(strips):
        y = -place
        if strip.base is not None:
            axes.plot([strip.base, strip.value], [y, y], color=COLOURS["line"], linewidth=2.5, zorder=1)
            axes.plot(strip.base, y, "o", markersize=8, markeredgewidth=1.8, zorder=4,
                      markerfacecolor=COLOURS["card"], markeredgecolor=COLOURS["base"])  # fmt: skip
        _interval(axes, strip, y)
    if bounds is not None:
        room = 0.03 * (bounds[1] - bounds[0])
        axes.set_xlim(bounds[0] - room, bounds[1] + room)
    about = f"{title[:LABEL_LETTERS]}. " + " ".join(
        f"{strip.label[:LABEL_LETTERS]}: base {number_text(strip.base)}, adapter {number_text(strip.value)}."
        for strip in strips[:12]
    )
    return Picture(title, about, as_svg(figure, name=name, label=about))


def differences_picture(title: str, strips: Sequence[Strip], *, name: str) -> Picture:
    """Differences adapter - base with their intervals, one a row, beside a line at zero."""
    figure, axes = _strip_axes(len(strips))
    axes.axvline(0, color=COLOURS["soft"], linewidth=1, linestyle=(0, (3, 3)), zorder=0)
    for place, strip in enumerate(strips):
        _interval(axes, strip, -place)
    counts = {word: sum(strip.verdict == word for strip in strips) for word in ("better", "worse", "same")}
    about = (
        f"{title}: of {len(strips)}, {counts['better']} better, {counts['worse']} worse, {counts['same']} undecided."
    )
    return Picture(title, about, as_svg(figure, name=name, label=about))


def clouds_picture(title: str, clouds: Sequence[Cloud], *, name: str) -> Picture:
    """The scores of many templates as dots, base (hollow) above adapter, with a stroke at each median."""
    figure, axes = _strip_axes(len(clouds), row_in=0.64)
    for place, cloud in enumerate(clouds):
        for values, colour, y in ((cloud.base, "base", -place + 0.1), (cloud.adapter, "adapter", -place - 0.16)):
            face = COLOURS["card"] if colour == "base" else COLOURS[colour]
            axes.plot(values, [y] * len(values), "o", markersize=5, markerfacecolor=face, markeredgewidth=1.3,
                      markeredgecolor=COLOURS[colour])  # fmt: skip
            middle = float(np.median(values))
            axes.plot([middle, middle], [y - 0.13, y + 0.13], color=COLOURS["ink"], linewidth=1.8, zorder=5)
        row_label(axes, cloud.label, -place + 0.08)
    words = [
        f"{cloud.label[:LABEL_LETTERS]}: median of the base {number_text(float(np.median(cloud.base)))}, "
        f"of the adapter {number_text(float(np.median(cloud.adapter)))}."
        for cloud in clouds[:12]
    ]
    about = f"{title[:LABEL_LETTERS]} of every template. {' '.join(words)}"
    return Picture(f"{title}, a dot a template", about, as_svg(figure, name=name, label=about))


def histogram(title: str, values: Sequence[float], *, name: str, marked: float) -> Picture | None:
    """How many rows have which loss; values from `marked` on stand out. None without values."""
    values = [value for value in values if math.isfinite(value)]
    if not values:
        return None
    figure, axes = _figure(2.1)
    counts, edges = np.histogram(values, bins=min(40, max(8, int(len(values) ** 0.5) + 1)))
    colours = [COLOURS["worse"] if edge >= marked else COLOURS["adapter"] for edge in edges[1:]]
    axes.bar(edges[:-1], counts, width=np.diff(edges) * 0.9, align="edge", color=colours)
    axes.set_xlabel("loss of a row (nats per token)")
    axes.set_ylabel("rows (logarithmic)")
    axes.set_yscale("log")  # so that a single hard row is seen beside thousands of easy ones
    axes.set_ylim(bottom=0.7)
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    middle, highest = number_text(float(np.median(values))), number_text(max(values))
    about = f"{title}: {len(values):,} rows, median {middle}, highest {highest}."
    return Picture(title, about, as_svg(figure, name=name, label=about))


def thinned(points: Sequence[tuple[float, float]], most: int = POINTS) -> list[tuple[float, float]]:
    """At most `most` points: the first and last, and of neighbours the lowest and the highest, so that spikes stay."""
    if len(points) <= most:
        return list(points)
    edges = np.linspace(0, len(points), (most - 2) // 2 + 1).astype(int)
    values = np.array([value for _, value in points])
    kept = {0, len(points) - 1}
    for start, end in pairwise(edges.tolist()):
        kept |= {start + int(values[start:end].argmin()), start + int(values[start:end].argmax())}
    return [points[place] for place in sorted(kept)]


def finite(strips: Iterable[Strip]) -> list[Strip]:
    """The rows that can be drawn."""
    return [
        strip for strip in strips if all(map(math.isfinite, (strip.value, strip.low, strip.high, strip.base or 0.0)))
    ]


def strips_of(scores: Mapping[str, Score], verdicts: Mapping[str, Verdict]) -> list[Strip]:
    """Scores as rows of `scores_picture`: the interval of the difference stands around the adapter's value."""
    return [
        Strip(name, score.adapter, score.base + score.low, score.base + score.high, verdicts[name], score.base)
        for name, score in scores.items()
    ]


def _figure(height_in: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained", facecolor="none")
    return figure, styled(figure.subplots())


def styled(axes: Axes) -> Axes:
    """The axes without a frame, with a quiet grid and numbers as the report writes them."""
    axes.set_facecolor("none")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("bottom", "left"):
        axes.spines[side].set_color(COLOURS["line"])
    axes.tick_params(colors=COLOURS["line"], labelcolor=COLOURS["soft"], labelsize=10)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=COLOURS["soft"], fontsize=10)
    axes.grid(axis="y", color=COLOURS["line"], linewidth=0.7)
    axes.set_axisbelow(True)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}".replace("-", "−").replace("e−0", "e−"))
    axes.locator_params(axis="y", nbins=5)
    axes.locator_params(axis="x", nbins=5)
    return axes


def _strip_axes(rows: int, *, row_in: float = 0.52) -> tuple[Figure, Axes]:
    """Axes with room for a label above each of the rows, which stand at y = 0, -1, …"""
    figure, axes = _figure(0.45 + row_in * rows)
    rows_axis(axes, rows)
    return figure, axes


def rows_axis(axes: Axes, rows: int) -> None:
    """Room for a label above each of the rows, which stand at y = 0, -1, …"""
    axes.set_ylim(-rows + 0.55, 0.85)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.grid(visible=False, axis="y")
    axes.grid(axis="x", color=COLOURS["line"], linewidth=0.7)


def _interval(axes: Axes, strip: Strip, y: float) -> None:
    """A filled dot with a whisker, and the label above it at the left edge."""
    colour = COLOURS["soft" if strip.verdict == "same" else strip.verdict]
    axes.plot([strip.low, strip.high], [y, y], color=colour, linewidth=2.2, solid_capstyle="butt", zorder=2)
    for end in (strip.low, strip.high):
        axes.plot([end, end], [y - 0.13, y + 0.13], color=colour, linewidth=1.6, zorder=2)
    axes.plot(strip.value, y, "o", color=colour, markersize=7, zorder=3)
    row_label(axes, strip.label, y)


def row_label(axes: Axes, text: str, y: float) -> None:
    """A row's label above it, at the left edge."""
    shown = _fitting(text).replace("$", r"\$")  # else matplotlib reads mathematics
    axes.text(0, y + 0.3, shown, transform=axes.get_yaxis_transform(), fontsize=10, color=COLOURS["ink"], va="bottom")


def _fitting(label: str) -> str:
    """The label, shortened to the width of a picture by the widths of letters in DejaVu Sans, rounded up."""
    width = 0.0
    for place, letter in enumerate(label):
        wide = not letter.isascii() or letter in "mwMW@%"
        width += 10.5 if wide else 8.0 if letter.isupper() else 6.5
        if width > _LABEL_UNITS:
            return f"{label[: place - 1]}…"
    return label


def steps_axis(axes: Axes, steps: Sequence[float]) -> None:
    """Whole optimizer steps along the bottom."""
    axes.set_xlabel("optimizer step")
    axes.locator_params(axis="x", nbins=5, integer=True)
    if min(steps) == max(steps):
        axes.set_xlim(steps[0] - 1, steps[0] + 1)


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [step for step, _ in points], [value for _, value in points]


def _smoothed(values: Sequence[float]) -> Iterable[float]:
    """Exponential mean over a thirtieth of the steps, without the pull of its start."""
    keep = 1 - 1 / max(2.0, len(values) / 30)
    mean = weight = 0.0
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        yield mean / weight


def _in_words(title: str, points: Sequence[tuple[float, float]]) -> str:
    (first_step, first), (last_step, last) = points[0], points[-1]
    values = [value for _, value in points]
    return (
        f"{title}, steps {first_step:,.0f} to {last_step:,.0f}: from {number_text(first)} to {number_text(last)}, "
        f"lowest {number_text(min(values))}, highest {number_text(max(values))}."
    )


def as_svg(figure: Any, *, name: str, label: str) -> str:
    """The figure as an `<svg>` element for a page: no size of its own, own ids, CSS variables for colours."""
    import matplotlib

    stream = io.StringIO()
    settings = {"svg.fonttype": "path", "svg.hashsalt": "lora_tune", "font.family": "DejaVu Sans"}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # a box stands in its place
        figure.savefig(stream, format="svg", facecolor="none", metadata={"Date": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    box = re.search(r'viewBox="([-\d. ]+)"', text)
    head = f'<svg viewBox="{box[1] if box else "0 0 360 200"}" role="img" aria-label="{escape(label)}">'
    text = head + f"<title>{escape(label)}</title>" + text[text.index(">") + 1 :]
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'xlink:href="#', f'href="#{name}-', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    for colour, code in COLOURS.items():
        text = text.replace(code, f"var(--{colour})")
    return re.sub(r">\s+<", "><", text)
