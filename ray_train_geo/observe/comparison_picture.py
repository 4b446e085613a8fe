"""The picture of a comparison: a bar a system, with what was measured marked on it (level 0)."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ray_train_geo.observe.rendering import BLUE, GRID, INK, MUTED, ORANGE, PAPER
from ray_train_geo.systems.comparison import Compared, Comparison

__all__ = ["comparison_picture"]

_OTHERS = "#9db3cf"
_WIDTH, _ROW, _HEAD = 9.0, 0.32, 1.35  # inches
_LABELS = 0.3  # of the longest bar: room for the figures at its right
_GAP = 0.015  # of the longest bar
_LONGEST_REASON = 80


def comparison_picture(found: Comparison) -> Figure:
    """Predicted seconds a step as bars, the mean of the published ones as diamonds.

    Ours is first and in another colour; systems that can't do it say why.  A bar that would dwarf
    all others is cut off at the chart's edge, with an arrow.
    """
    figure = Figure(figsize=(_WIDTH, _HEAD + _ROW * len(found.rows)), layout="constrained")
    axes = figure.add_subplot()
    for i, row in enumerate(found.rows):
        _draw_row(axes, i, row, found.chart_s)
    axes.set_yticks(range(len(found.rows)), [row.system for row in found.rows], parse_math=False)
    axes.set_ylim(len(found.rows) - 0.4, -0.6)
    axes.set_xlim(0, (1 + _LABELS) * found.chart_s)
    axes.set_title(
        f"{found.model}, {found.global_batch} sequences a step, on {found.place} "
        f"({found.devices} devices)",
        loc="left", fontsize=11, fontweight="bold", color=INK, pad=22, parse_math=False,
    )  # fmt: skip
    axes.set_xlabel("seconds a step", fontsize=8.5, color=MUTED)
    axes.tick_params(labelsize=8, colors=MUTED, length=0)
    axes.tick_params(axis="y", labelsize=9, labelcolor=INK)
    axes.grid(axis="x", color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "left")
        spine.set_color(MUTED)
    _legend(axes, any(row.measured_s for row in found.rows))
    return figure


def _draw_row(axes: Axes, i: int, row: Compared, most_s: float) -> None:
    predicted, measured = row.predicted, row.mean_measured_s
    right_s = 0.0  # of what is drawn; where there is no bar, its place is the reason's
    if predicted is not None:
        right_s = min(predicted.step_s, most_s)
        axes.barh(i, right_s, height=0.62, color=BLUE if row.system == "ours" else _OTHERS)
    if measured is not None and measured <= most_s:
        if predicted is not None:
            right_s = max(right_s, measured)
        axes.plot(
            measured, i, marker="D", markersize=5.5, color=ORANGE, markeredgecolor=PAPER,
            markeredgewidth=0.8, linestyle="none",
        )  # fmt: skip
    axes.text(right_s + _GAP * most_s, i, _label(row, most_s), fontsize=8, va="center",
              color=MUTED if predicted is None else INK, parse_math=False)  # fmt: skip


def _label(row: Compared, most_s: float) -> str:
    if row.predicted is None:
        why = row.why_not
        return why if len(why) <= _LONGEST_REASON else f"{why[: _LONGEST_REASON - 1]}…"
    text = f"{row.predicted.step_s:.1f}"
    if row.predicted.step_s > most_s:
        text = f"\N{RIGHTWARDS ARROW} {text}"
    if row.mean_measured_s is not None and row.prediction_error is not None:
        text += f"   measured {row.mean_measured_s:.1f} ({row.prediction_error:+.0%})"
    return text


def _legend(axes: Axes, any_measured: bool) -> None:
    handles = [Line2D([], [], color=_OTHERS, linewidth=6, label="predicted")]
    if any_measured:
        handles.append(
            Line2D([], [], color=ORANGE, linestyle="none", marker="D", markersize=5.5,
                   label="measured, mean of published runs")
        )  # fmt: skip
    axes.legend(
        handles=handles, loc="lower right", bbox_to_anchor=(1, 1.0), ncols=2, frameon=False,
        fontsize=8, labelcolor=INK, handlelength=1.2, columnspacing=1.2, borderaxespad=0,
    )  # fmt: skip
