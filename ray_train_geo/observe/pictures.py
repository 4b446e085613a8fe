"""Pictures of a run, as matplotlib figures (level 0).

All are made of ``Figure`` objects: no pyplot, so no global state and no display.  Whatever users
have named (devices, regions, nodes) is drawn as it is: ``$`` starts no formula.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from ray_train_geo.observe.plan_picture import plan_picture
from ray_train_geo.observe.rendering import (
    BLUE,
    GRID,
    INK,
    MUTED,
    ORANGE,
    PAPER,
    RED,
    to_png,
    to_svg,
)

__all__ = [
    "loss_curve",
    "pipeline_timeline",
    "plan_picture",
    "step_time_picture",
    "to_png",
    "to_svg",
]

Records = Sequence[Mapping[str, Any]]

_ON_COLOUR = "#fefefe"
_KINDS = {
    "forward": BLUE,
    "backward": ORANGE,
    "weights": "#8c5a2b",
    "optimizer": "#7a5bb5",
    "codec": "#b09b2e",
    "receive": "#2a9d8f",
    "send": "#8fbf3f",
    "sync": "#c2528b",
}
_COMPUTE = ("forward", "backward", "weights", "codec", "optimizer")
_THIN = ("receive", "send", "sync")
_MOST_POINTS = 1500
_MOST_TIMES = 12
_WIDTH = 11.2  # inches, of all charts: they stand below each other in the report


def loss_curve(records: Records, events: Records = ()) -> Figure:
    """Training loss by step, in nats a token, with bits per byte on the right where known.

    Changes of generation are dotted verticals.  Of ``events``: checkpoints are triangles at the
    bottom; at the top, the first steps after a loss are red triangles, those after a node came or
    was drained grey ones, with the seconds that it took.  Steps that were skipped for an overflow
    are red crosses at the top.
    """
    figure, axes = _chart("Loss", "step", "loss (nats per token)", (_WIDTH, 3.7))
    steps, losses = _series(records, "loss")
    if not steps:
        return _nothing(axes, "no step has been recorded")
    x, y = _downsampled(steps, losses)
    smooth = _smoothed(y)
    width, alpha, marker = (0.8, 0.35, "") if smooth else (1.6, 1.0, "o" if len(x) < 30 else "")
    axes.plot(x, y, color=BLUE, linewidth=width, alpha=alpha, marker=marker, markersize=3,
              label="loss")  # fmt: skip
    if smooth:
        axes.plot(x, smooth, color=BLUE, linewidth=1.8, label="loss, running mean")
    _bits_per_byte(axes, records)
    _margins(axes, steps)
    _generation_marks(axes, records)
    saved = _steps_of(e for e in events if e.get("event") == "checkpoint")
    bottom, top = axes.get_ylim()
    height = top - bottom
    if saved:
        at = [bottom + 0.03 * height] * len(saved)
        axes.plot(saved, at, "^", color=MUTED, markersize=5, label="checkpoint")
    skipped = _steps_of(r for r in records if r.get("skipped"))
    if skipped:
        at = [top - 0.03 * height] * len(skipped)
        axes.plot(skipped, at, "x", color=RED, markersize=5, label="skipped (overflow)")
    for kind, colour, label in (
        ("recovery", RED, "first step after a loss"),
        ("reshape", MUTED, "first step after nodes came or went"),
    ):
        _change_marks(axes, [e for e in events if e.get("event") == kind], colour, label, height)
    axes.set_ylim(bottom, top)
    _legend(axes)
    return figure


def step_time_picture(records: Records) -> Figure:
    """Measured step time by step beside the predicted one, in seconds.

    The axis is cut above what 95% of the steps took, so that a slow first step does not flatten
    the rest; steps above it are triangles at the top.
    """
    figure, axes = _chart("Step time, predicted beside measured", "step", "seconds", (_WIDTH, 3.0))
    steps, measured = _series(records, "step_s")
    if not steps:
        return _nothing(axes, "no step has been recorded")
    px, py = _series(records, "predicted_step_s")
    usual = sorted(measured)[int(0.95 * (len(measured) - 1))]
    top = 1.25 * max(usual, *py, 1e-9)
    inside = [(s, v) for s, v in zip(steps, measured, strict=True) if v <= top]
    x, y = _downsampled([s for s, _ in inside], [v for _, v in inside])
    axes.plot(x, y, "o", color=BLUE, markersize=3 if len(x) < 150 else 1.6, label="measured")
    if px:
        axes.plot(px, py, color=ORANGE, linewidth=1.6, drawstyle="steps-post", label="predicted")
    above = [s for s, v in zip(steps, measured, strict=True) if v > top]
    if above:
        label = f"above the axis (up to {max(measured):.3g} s)"
        axes.plot(above, [0.96 * top] * len(above), "^", color=RED, markersize=5, label=label)
    _margins(axes, steps)
    axes.set_ylim(0, top)
    _generation_marks(axes, records)
    _legend(axes)
    return figure


def pipeline_timeline(trace: Mapping[str, Any], step: int | None = None) -> Figure:
    """Who did what, when, in one step of a Chrome trace (see ``observe.trace``).

    A row is a rank: its compute as a bar (forward, backward and weight gradients with the
    microbatch's number where there is room), and under it thin lanes for receive, send and sync.

    Args:
        step: the step to draw; by default the last one that all ranks have traced.
    """
    events = [e for e in trace.get("traceEvents", ()) if isinstance(e, Mapping)]
    names = {e["pid"]: str(e["args"]["name"]) for e in events if e.get("name") == "process_name"}
    spans = [e for e in events if e.get("ph") == "X" and e.get("cat") in _KINDS]
    step = _last_whole_step(spans) if step is None else step
    spans = [e for e in spans if e["args"].get("step") == step]
    if not spans:
        what = "no step has been traced" if step is None else f"step {step} has not been traced"
        return _nothing(_chart("Pipeline timeline", "", "", (_WIDTH, 1.2))[1], what)
    ranks = sorted({e["pid"] for e in spans})
    start = min(e["ts"] for e in spans)
    length = max(e["ts"] + e["dur"] for e in spans) - start
    unit, scale = ("ms", 1e-3) if length < 2e6 else ("s", 1e-6)
    rows = list(_timeline_rows(ranks, names))
    height = 1.15 + 0.52 * (rows[-1][1] + 1)
    figure, axes = _chart(f"Pipeline timeline, step {step}", f"{unit} from the step's start", "",
                          (_WIDTH, height))  # fmt: skip
    inches_per_us = (_WIDTH - 2.9) / max(length, 1)
    for rank, y, _ in rows:
        mine = [e for e in spans if e["pid"] == rank]
        for kind in _KINDS:
            of_kind = [e for e in mine if e["cat"] == kind]
            lane = (
                (y - 0.36, 0.44) if kind in _COMPUTE else (y + 0.11 + 0.1 * _THIN.index(kind), 0.08)
            )
            bars = [((e["ts"] - start) * scale, e["dur"] * scale) for e in of_kind]
            edge = 0.6 if kind in _COMPUTE else 0.2
            axes.broken_barh(bars, lane, facecolor=_KINDS[kind], edgecolor=PAPER, linewidth=edge)
            for e in of_kind:
                microbatch = e["args"].get("microbatch")
                needed = 0.05 + 0.07 * len(str(microbatch))
                if (
                    kind in _COMPUTE
                    and microbatch is not None
                    and e["dur"] * inches_per_us > needed
                ):
                    centre = (e["ts"] - start + e["dur"] / 2) * scale
                    axes.text(centre, y - 0.14, str(microbatch), ha="center", va="center",
                              fontsize=7, color=_ON_COLOUR, clip_on=True)  # fmt: skip
        busy = sum(e["dur"] for e in mine if e["cat"] in _COMPUTE) / max(length, 1)
        axes.text(1.012, y - 0.14, f"{min(busy, 1):.0%}", transform=axes.get_yaxis_transform(),
                  fontsize=8, va="center", color=INK)  # fmt: skip
    axes.text(1.012, rows[0][1] - 0.62, "busy", transform=axes.get_yaxis_transform(), fontsize=8,
              va="center", color=MUTED)  # fmt: skip
    axes.set_yticks([y - 0.14 for _, y, _ in rows], [label for _, _, label in rows])
    for tick in axes.get_yticklabels():
        tick.set_parse_math(False)
        tick.set_color(INK)
    axes.set_xlim(0, max(length * scale, 1e-9))
    axes.set_ylim(rows[-1][1] + 0.5, rows[0][1] - 0.5)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0, pad=8)
    used = [k for k in _KINDS if any(e["cat"] == k for e in spans)]
    _legend(axes, [Patch(facecolor=_KINDS[k], label=k) for k in used])
    return figure


def _timeline_rows(
    ranks: Sequence[int], names: Mapping[int, str]
) -> Iterator[tuple[int, float, str]]:
    """(rank, y, label) of each rank; pipelines stand apart by half a row."""
    placed = []
    for rank in ranks:
        found = re.search(
            r"pipeline (\d+), stage (\d+)(?:, (layers? [\d-]+))?", names.get(rank, "")
        )
        where = (int(found[1]), int(found[2])) if found else (math.inf, rank)
        label = f"rank {rank}"
        if found:
            label = f"pipeline {found[1]}, stage {found[2]}\nrank {rank}"
            label += f", {found[3]}" if found[3] else ""
        placed.append((where, rank, label))
    y, before = -1.0, None
    for where, rank, label in sorted(placed):
        y += 1.0 if before in (None, where[0]) else 1.4
        before = where[0]
        yield rank, y, label


def _last_whole_step(spans: Sequence[Mapping[str, Any]]) -> int | None:
    ranks_of: dict[int, set[int]] = {}
    for e in spans:
        ranks_of.setdefault(e["args"]["step"], set()).add(e["pid"])
    if not ranks_of:
        return None
    most = max(len(ranks) for ranks in ranks_of.values())
    return max(step for step, ranks in ranks_of.items() if len(ranks) == most)


def _bits_per_byte(axes: Axes, records: Records) -> None:
    """A right axis in bits per byte; it is the same quantity, so both axes share one scale."""
    both = [
        (r["step"], r["loss"], r["bits_per_byte"])
        for r in records
        if all(_is(r.get(k)) for k in ("step", "loss", "bits_per_byte")) and r["loss"] > 0
    ]
    ratios = [b / loss for _, loss, b in both if b > 0]
    if not ratios:
        return
    ratio = statistics.median(ratios)
    right = axes.secondary_yaxis("right", functions=(lambda v: v * ratio, lambda v: v / ratio))
    right.set_ylabel("bits per byte", fontsize=8.5, color=MUTED)
    right.tick_params(labelsize=8, colors=MUTED, length=0)
    right.spines["right"].set_visible(False)
    if max(ratios) - min(ratios) > 0.01 * ratio:  # bytes per token differ from step to step
        x, y = _downsampled([s for s, _, _ in both], [b / ratio for _, _, b in both])
        axes.plot(x, y, color=ORANGE, linewidth=1, label="bits per byte (right)")


def _generation_marks(axes: Axes, records: Records) -> None:
    known = [r for r in records if _is(r.get("step")) and r.get("generation") is not None]
    changes = [
        (now["step"], now["generation"])
        for before, now in pairwise(known)
        if now["generation"] != before["generation"]
    ]
    for step, generation in changes:
        axes.axvline(step - 0.5, color=MUTED, linewidth=1, linestyle=(0, (1, 2)))
        if len(changes) <= 12:
            axes.text(step - 0.5, 1.01, f"gen {generation}", transform=axes.get_xaxis_transform(),
                      fontsize=7, color=MUTED, ha="center", va="bottom")  # fmt: skip


def _change_marks(axes: Axes, changes: Records, colour: str, label: str, height: float) -> None:
    """Triangles below the upper edge, with how long training was interrupted if they are few."""
    steps = _steps_of(changes)
    if not steps:
        return
    at = axes.get_ylim()[1] - 0.05 * height
    axes.plot(steps, [at] * len(steps), "v", color=colour, markersize=6, label=label)
    if len(changes) > _MOST_TIMES:
        return
    for change in changes:
        if _is(change.get("step")) and _is(change.get("first_commit_s")):
            axes.annotate(
                f"{change['first_commit_s']:.1f} s", (change["step"], at), xytext=(5, -2),
                textcoords="offset points", fontsize=7, color=colour, va="center",
            )  # fmt: skip


def _chart(title: str, x: str, y: str, size: tuple[float, float]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK, pad=22)
    axes.set_xlabel(x, fontsize=8.5, color=MUTED)
    axes.set_ylabel(y, fontsize=8.5, color=MUTED)
    axes.tick_params(labelsize=8, colors=MUTED, length=0)
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(MUTED)
    return figure, axes


def _nothing(axes: Axes, why: str) -> Figure:
    axes.set_axis_off()
    axes.text(0.5, 0.5, why, transform=axes.transAxes, ha="center", va="center", color=MUTED)
    figure = axes.figure
    assert isinstance(figure, Figure)
    figure.set_size_inches(_WIDTH, 1.2)
    return figure


def _legend(axes: Axes, handles: Sequence[Patch] | None = None) -> None:
    axes.legend(
        handles=handles, loc="lower right", bbox_to_anchor=(1, 1.05), ncols=8, frameon=False,
        fontsize=8, labelcolor=INK, handlelength=1.2, columnspacing=1.2, borderaxespad=0,
    )  # fmt: skip


def _margins(axes: Axes, steps: Sequence[float]) -> None:
    low, high = min(steps), max(steps)
    pad = max(0.02 * (high - low), 0.5)
    axes.set_xlim(low - pad, high + pad)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _is(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _steps_of(records: Iterable[Mapping[str, Any]]) -> list[float]:
    return sorted({r["step"] for r in records if _is(r.get("step"))})


def _series(records: Records, key: str) -> tuple[list[float], list[float]]:
    """Steps and values of ``key``, where both are numbers."""
    pairs = [(r["step"], r[key]) for r in records if _is(r.get("step")) and _is(r.get(key))]
    return [s for s, _ in pairs], [v for _, v in pairs]


def _downsampled(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """Means over equal runs of points, so that a long run's picture stays small."""
    size = -(-len(x) // _MOST_POINTS) or 1
    starts = range(0, len(x), size)
    return (
        [statistics.fmean(x[i : i + size]) for i in starts],
        [statistics.fmean(y[i : i + size]) for i in starts],
    )


def _smoothed(y: Sequence[float]) -> list[float]:
    """Centred running mean over a twentieth of the run; empty when there are few points."""
    half = len(y) // 40
    if len(y) < 100:
        return []
    return [statistics.fmean(y[max(0, i - half) : i + half + 1]) for i in range(len(y))]
