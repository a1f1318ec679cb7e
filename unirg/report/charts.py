"""Charts of the report page, as SVG in data URIs: learning curves, and arms with their intervals."""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Points = Sequence[tuple[float, float]]
# Okabe & Ito's colours, readable with any colour vision, on light and on dark; matplotlib's text is mid grey for both.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6BB1", "#7F7F7F")
GREY = "#808890"


def learning_curve(title: str, by_stage: Mapping[str, Points], colours: Mapping[str, str]) -> str:
    """One metric over the steps of the stages that log it: faint as logged, and a running mean of a tenth."""
    figure, axes = _figure(3.5, 2.2)
    for stage, points in by_stage.items():
        steps, values = np.array(points, dtype=float).T
        colour = colours[stage]
        if len(points) < 20:
            axes.plot(steps, values, color=colour, marker="o", markersize=3, linewidth=1.2)
            continue
        axes.plot(steps, values, color=colour, alpha=0.3, linewidth=0.8)
        width = max(2, len(points) // 10)
        mean = np.convolve(values, np.ones(width) / width, mode="valid")
        axes.plot(steps[width - 1 :], mean, color=colour, linewidth=1.6)
    axes.set_title(_plain(title), fontsize=9, color=GREY, loc="left")
    axes.set_xlabel("step", fontsize=8)
    return _uri(figure)


def forest(
    title: str,
    figures: Mapping[str, Mapping[str, Any]],
    colours: Mapping[str, str],
    *,
    marks: Mapping[str, float | None],
) -> str:
    """One figure of each arm with its interval, top to bottom; `marks` (name -> value, or None) as dashed lines."""
    shown = [(name, found) for name, found in figures.items() if found.get("mean") is not None]
    figure, axes = _figure(3.5, 0.85 + 0.27 * len(shown))
    for row, (name, found) in enumerate(shown):
        mean, low, high = found["mean"], found.get("low"), found.get("high")
        if low is not None and high is not None:
            axes.plot([low, high], [row, row], color=colours[name], linewidth=2.2, solid_capstyle="butt")
        axes.plot(mean, row, "o", color=colours[name], markersize=5)
    for name, value in marks.items():
        if value is not None:
            axes.axvline(value, color=GREY, linestyle=(0, (3, 2)), linewidth=1)
            axes.annotate(
                name, (value, -0.5), xytext=(0, 1), textcoords="offset points", fontsize=7, color=GREY, ha="center"
            )
    axes.set_yticks(range(len(shown)), [_plain(name) for name, _ in shown])
    axes.set_ylim(len(shown) - 0.5, -0.8)
    axes.margins(x=0.12)
    axes.set_title(_plain(title), fontsize=9, color=GREY, loc="left", pad=8)
    axes.grid(axis="y", visible=False)
    return _uri(figure)


def colours_of(names: Sequence[str]) -> dict[str, str]:
    """A colour for each arm or stage, the same in every chart of the page."""
    return {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(names)}


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.tick_params(colors=GREY, labelsize=8, length=2)
    axes.xaxis.label.set_color(GREY)
    for name, spine in axes.spines.items():
        spine.set_visible(name in ("left", "bottom"))
        spine.set_color(GREY)
    axes.patch.set_alpha(0)
    axes.grid(color=GREY, alpha=0.2, linewidth=0.6)
    return figure, axes


def _plain(text: str) -> str:
    """Names as they are: a dollar sign would start a formula in matplotlib."""
    return text.replace("$", r"\$")


def _uri(figure: Figure) -> str:
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "unirg"}):  # the same figures give the same file
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
