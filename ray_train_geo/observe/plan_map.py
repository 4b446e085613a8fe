"""The map of a plan: regions where they are, devices in them, pipelines through them (level 0)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, PathPatch, Rectangle
from matplotlib.path import Path

from ray_train_geo.cluster.topology import Topology
from ray_train_geo.observe.map_layout import (
    Box,
    Panel,
    Seat,
    devices_per_square,
    panel_of,
    spread,
    square_size,
)
from ray_train_geo.observe.places import Point, arranged
from ray_train_geo.observe.rendering import GRID, INK, MUTED, PAPER
from ray_train_geo.planning.codecs import CODECS
from ray_train_geo.planning.plan import Plan

__all__ = ["plan_map"]

_HUES = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8c6d1f", "#5b4b8a")
"""Okabe and Ito's palette ("Color Universal Design", 2008), with two darker ones for its yellow
and black, which are lost on paper and beside ink."""

_FILLS = ("solid", "light", "hatched")
_STYLES = len(_HUES) * len(_FILLS)

_ON_DARK, _ON_LIGHT = "#fefefe", "#111417"  # not INK or PAPER: these follow the page's colours
_UNUSED = "#b9bfc7"
_WIDTH, _MARGIN, _HEADER = 11.2, 0.18, 0.62
_SMALL = 0.12
"""Squares up to this size, in inches, have no numbers, and no lines between them."""

_LINES_OF_THEIR_OWN = 4
"""Up to so many pipelines from one region to another have a line each, beside each other."""

_FULL_BITS = 16
"""Of a value that no codec makes smaller."""


@dataclass(frozen=True, slots=True)
class _Crossing:
    """All hops between two regions.

    Args:
        traffic: by pipeline; microbatches a step, less where a codec makes them smaller.
        microbatches: over all its hops.
    """

    traffic: Mapping[int, float]
    microbatches: int


def plan_map(plan: Plan, topology: Topology | None = None) -> Figure:
    """Draw ``plan``: a panel for each region, a square for each device, a line for each hop.

    A square's colour is its pipeline's, its number the stage's.  Lines between regions are dashed;
    a line's width follows what it carries in a step.  With ``topology`` devices that the plan
    leaves out are grey, lines tell latency and bandwidth, and regions whose names say nothing are
    placed by latency.
    """
    there = () if topology is None else topology.devices
    devices = list({d.id: d for d in (*there, *plan.devices)}.values())
    seats = {plan.stage(r).device: (r.pipeline, r.stage) for r in plan.roles()}
    regions = sorted({d.region for d in devices})
    panels = [
        panel_of(r, [d for d in devices if d.region == r], seats, len(devices)) for r in regions
    ]
    size = square_size(len(devices))
    places, how = arranged(regions, topology)
    boxes = [b.moved(_MARGIN, _HEADER) for b in spread(panels, places, _WIDTH - 2 * _MARGIN)]
    width = max(_WIDTH, max(b.x + b.width for b in boxes) + _MARGIN)
    bottom = max(b.y + b.height for b in boxes) + 0.3
    count = min(len(plan.pipelines), _STYLES)
    per_row = int((width - 2 * _MARGIN) // 1.15)
    height = bottom + 0.26 * (-(-count // per_row) + 1) + 0.1

    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    _header(axes, plan, len(devices))
    area = Box(0, _HEADER - 0.2, width, bottom - _HEADER + 0.2)
    _crossings(axes, plan, topology, dict(zip(regions, boxes, strict=True)), area)
    for panel, box in zip(panels, boxes, strict=True):
        _panel(axes, plan, panel, box, size)
    _legend(axes, plan, bottom, per_row, list(_notes(plan, len(devices), how)))
    return figure


def _header(axes: Axes, plan: Plan, devices: int) -> None:
    depths = sorted({len(p.stages) for p in plan.pipelines})
    stages = f"{depths[0]}" if len(depths) == 1 else f"{depths[0]}-{depths[-1]}"
    parts = [
        f"{len(plan.pipelines)} pipeline{'s' * (len(plan.pipelines) != 1)} of {stages} stages",
        f"{plan.layers} layers",
        f"{plan.world_size} of {devices} devices",
        f"{plan.schedule}, {plan.gradient_sync}",
        f"{plan.predicted_step_s:.3g} s a step predicted",
    ]
    _say(axes, (_MARGIN, 0.24), "Plan", size=11, weight="bold", ha="left")
    _say(axes, (_MARGIN + 0.5, 0.245), " · ".join(parts), size=9, colour=MUTED, ha="left")


def _panel(axes: Axes, plan: Plan, panel: Panel, box: Box, size: float) -> None:
    axes.add_patch(
        FancyBboxPatch(
            (box.x, box.y), box.width, box.height, boxstyle="round,pad=0,rounding_size=0.08",
            facecolor=PAPER, edgecolor=MUTED, linewidth=0.8, zorder=3,
        )
    )  # fmt: skip
    middle = box.x + box.width / 2
    _say(axes, (middle, box.y + 0.15), panel.region, size=9, weight="bold", zorder=6)
    _say(axes, (middle, box.y + 0.315), panel.subtitle, size=7.2, colour=MUTED, zorder=6)
    for node in panel.nodes:
        b = node.moved(box.x, box.y)
        axes.add_patch(
            Rectangle(
                (b.x, b.y), b.width, b.height, facecolor="none", edgecolor=GRID,
                linewidth=0.8, zorder=3,
            )
        )  # fmt: skip
    if size > _SMALL:
        _hops_inside(axes, plan, panel, box)
    for cell in panel.cells:
        _square(axes, cell.box.moved(box.x, box.y), cell.seat, numbered=size > _SMALL)


def _hops_inside(axes: Axes, plan: Plan, panel: Panel, box: Box) -> None:
    at = {c.seat: c.box.moved(box.x, box.y).centre for c in panel.cells if c.seat is not None}
    busiest = max(_traffic(plan), default=1.0)
    for (p, s), start in at.items():
        end = at.get((p, s + 1))
        if end is not None:
            carried = plan.pipelines[p].microbatches * _weight(plan.pipelines[p].stages[s].codec)
            axes.plot(
                *zip(start, end, strict=True), color=_hue(p), zorder=4, alpha=0.8,
                linewidth=0.7 + 1.3 * carried / busiest, solid_capstyle="butt",
            )  # fmt: skip


def _square(axes: Axes, box: Box, seat: Seat | None, numbered: bool) -> None:
    inset = 0.09 * box.width
    corner, side = (box.x + inset, box.y + inset), box.width - 2 * inset
    fill = "solid" if seat is None else _FILLS[seat[0] // len(_HUES) % len(_FILLS)]
    hue = _UNUSED if seat is None else _hue(seat[0])
    face = hue if fill == "solid" else _light(hue)
    axes.add_patch(
        Rectangle(
            corner, side, side, facecolor=face, edgecolor=hue, zorder=5,
            linewidth=0.0 if fill == "solid" else 5 * box.width,
            hatch="////" if fill == "hatched" else None,
        )
    )  # fmt: skip
    if seat is not None and numbered:
        dark = fill == "solid" and _luminance(hue) < 0.45
        _say(
            axes, box.centre, str(seat[1]), size=29 * box.width,
            colour=_ON_DARK if dark else _ON_LIGHT, weight="bold", zorder=6,
        )  # fmt: skip


def _crossings(
    axes: Axes,
    plan: Plan,
    topology: Topology | None,
    boxes: Mapping[str, Box],
    area: Box,
) -> None:
    """Dashed lines between regions, the busiest first to get a place for its label."""
    found = _by_regions(plan)
    widest = max((sum(c.traffic.values()) for c in found.values()), default=1.0)
    taken: list[Box] = list(boxes.values())
    order = sorted(found, key=lambda pair: (-sum(found[pair].traffic.values()), pair))
    for pair in order:
        crossing, (a, b) = found[pair], pair
        others = [box for region, box in boxes.items() if region not in pair]
        bend = _bend(boxes[a].centre, boxes[b].centre, others, area)
        own = len(crossing.traffic) <= _LINES_OF_THEIR_OWN
        strands = crossing.traffic if own else {None: sum(crossing.traffic.values())}
        for i, (p, traffic) in enumerate(strands.items()):
            curve = _curve(
                boxes[a].centre, boxes[b].centre, bend, 0.075 * (i - (len(strands) - 1) / 2)
            )
            axes.add_patch(
                PathPatch(
                    Path(curve, [Path.MOVETO, Path.CURVE3, Path.CURVE3]), facecolor="none",
                    edgecolor=MUTED if p is None else _hue(p), linestyle=(0, (3, 1.5)),
                    linewidth=0.8 + 3.2 * traffic / widest, zorder=1, capstyle="butt",
                )
            )  # fmt: skip
        text = f"{crossing.microbatches:,} microbatches"
        if topology is not None:
            text += _link_text(plan, topology, pair)
        curve = _curve(boxes[a].centre, boxes[b].centre, bend, 0.0)
        _label(axes, text, curve, [boxes[a], boxes[b]], taken, area)


def _by_regions(plan: Plan) -> dict[tuple[str, str], _Crossing]:
    region = {d.id: d.region for d in plan.devices}
    traffic: dict[tuple[str, str], dict[int, float]] = {}
    microbatches: dict[tuple[str, str], int] = {}
    for i, p in enumerate(plan.pipelines):
        for a, b in pairwise(p.stages):
            ends = region[a.device], region[b.device]
            if ends[0] == ends[1]:
                continue
            pair = min(ends), max(ends)
            strands = traffic.setdefault(pair, {})
            strands[i] = strands.get(i, 0.0) + p.microbatches * _weight(a.codec)
            microbatches[pair] = microbatches.get(pair, 0) + p.microbatches
    return {pair: _Crossing(traffic[pair], microbatches[pair]) for pair in traffic}


def _traffic(plan: Plan) -> Iterator[float]:
    for p in plan.pipelines:
        for stage in p.stages[:-1]:
            yield p.microbatches * _weight(stage.codec)


def _weight(codec: str) -> float:
    """Size of a message beside one that no codec makes smaller."""
    return (CODECS[codec].bits or _FULL_BITS) / _FULL_BITS


def _link_text(plan: Plan, topology: Topology, pair: tuple[str, str]) -> str:
    first = {d.region: d for d in reversed(plan.devices)}
    link = topology.link(first[pair[0]], first[pair[1]])
    gbit = link.flow_bytes_per_s * 8 / 1e9
    return f"\n{link.latency_s * 1e3:.3g} ms, {gbit:.2g} Gbit/s"


def _bend(a: Point, b: Point, others: Sequence[Box], area: Box) -> float:
    """How much the line from ``a`` to ``b`` must bend to stay clear of ``others``, in ``area``."""

    def hidden(bend: float) -> int:
        points = list(_points(_curve(a, b, bend, 0.0)))
        behind = sum(box.contains(point, margin=0.05) for box in others for point in points)
        return behind + 2 * sum(not area.contains(point) for point in points)

    return min((0.0, 0.15, -0.15, 0.3, -0.3, 0.45, -0.45, 0.65, -0.65), key=hidden)


def _points(curve: Sequence[Point]) -> Iterator[Point]:
    return (_on(curve, i / 40) for i in range(1, 40))


def _curve(a: Point, b: Point, bend: float, shift: float) -> list[Point]:
    """A quadratic Bezier curve from ``a`` to ``b``, moved sideways by ``shift`` inches."""
    (ax, ay), (bx, by) = a, b
    length = math.dist(a, b) or 1.0
    across_x, across_y = (by - ay) / length, (ax - bx) / length
    aside = bend * length + shift
    middle = (ax + bx) / 2 + across_x * aside, (ay + by) / 2 + across_y * aside
    move_x, move_y = across_x * shift, across_y * shift
    return [(ax + move_x, ay + move_y), middle, (bx + move_x, by + move_y)]


def _on(curve: Sequence[Point], t: float) -> Point:
    weights = (1 - t) ** 2, 2 * t * (1 - t), t**2
    x, y = (sum(w * p[i] for w, p in zip(weights, curve, strict=True)) for i in (0, 1))
    return x, y


def _label(
    axes: Axes, text: str, curve: Sequence[Point], ends: Sequence[Box], taken: list[Box], area: Box
) -> None:
    """Write ``text`` on the line, or beside a short one; where there is no room, leave it out."""
    lines = text.split("\n")
    width, height = 0.062 * max(map(len, lines)) + 0.06, 0.125 * len(lines) + 0.04
    (ax, ay), _, (bx, by) = curve
    length = math.dist((ax, ay), (bx, by)) or 1.0
    along = abs(bx - ax) / length, abs(by - ay) / length
    visible = [p for p in _points(curve) if not any(end.contains(p) for end in ends)]
    long = len(visible) / 40 * length > 2 * (along[0] * width + along[1] * height)
    beside = (along[1] * width + along[0] * height) / 2 + 0.06
    # From the middle of what can be seen of the line outwards.
    middle = (len(visible) - 1) / 2
    for _, x, y in sorted((abs(i - middle), *p) for i, p in enumerate(visible)):
        for aside in (0.0,) if long else (beside, -beside):
            box = Box(
                x + aside * (by - ay) / length - width / 2,
                y + aside * (ax - bx) / length - height / 2,
                width,
                height,
            )
            if area.holds(box) and not any(box.touches(other, 0.02) for other in taken):
                taken.append(box)
                corner = box.x, box.y
                axes.add_patch(Rectangle(corner, width, height, facecolor=PAPER, zorder=2))
                _say(axes, box.centre, text, size=6.8, zorder=2.5)
                return


def _legend(axes: Axes, plan: Plan, top: float, per_row: int, notes: Sequence[str]) -> None:
    count = min(len(plan.pipelines), _STYLES)
    for p in range(count):
        x, y = _MARGIN + 1.15 * (p % per_row), top + 0.26 * (p // per_row)
        _square(axes, Box(x, y, 0.2, 0.2), (p, 0), numbered=False)
        _say(axes, (x + 0.27, y + 0.105), f"pipeline {p}", size=8, ha="left")
    y = top + 0.26 * -(-count // per_row) + 0.1
    _say(axes, (_MARGIN, y), " · ".join(notes), size=7.5, colour=MUTED, ha="left")


def _notes(plan: Plan, devices: int, how: str) -> Iterator[str]:
    """How to read the picture."""
    each = devices_per_square(devices)
    if len(plan.pipelines) > _STYLES:
        yield f"colours repeat every {_STYLES} pipelines"
    if each > 1:
        yield f"a square stands for {each} devices"
    elif square_size(devices) > _SMALL:
        yield "numbers are stages"
    if plan.world_size < devices:
        yield "grey devices are not used"
    yield "lines are hops: wider ones carry more, dashed ones cross regions"
    if how:
        yield f"regions stand {how}"


def _hue(pipeline: int) -> str:
    return _HUES[pipeline % len(_HUES)]


def _light(colour: str) -> tuple[float, ...]:
    return tuple(0.28 * c + 0.72 for c in to_rgb(colour))


def _luminance(colour: str) -> float:
    red, green, blue = to_rgb(colour)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def _say(
    axes: Axes,
    where: Point,
    text: str,
    *,
    size: float,
    colour: str = INK,
    weight: str = "normal",
    ha: str = "center",
    zorder: float = 6,
) -> None:
    axes.text(
        *where, text, fontsize=size, color=colour, fontweight=weight, ha=ha, va="center",
        linespacing=1.15, parse_math=False, zorder=zorder,
    )  # fmt: skip
