"""Where everything on the map of a plan goes: a panel for each region, a square for each device.

Pure geometry, in inches; y grows downwards.  `observe.plan_map` draws it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ray_train_geo.cluster.topology import Device
from ray_train_geo.observe.places import Point

__all__ = [
    "Box",
    "Cell",
    "Panel",
    "Seat",
    "devices_per_square",
    "panel_of",
    "spread",
    "square_size",
]

Seat = tuple[int, int]
"""(pipeline, stage)"""

_MOST_SQUARES = 2048
_PADDING, _HEAD = 0.12, 0.44
_MOST_COLUMNS = 4  # of the squares of one node
_ASPECT = 1.35
_NODE_GAP = 0.3  # of a square, between nodes of several devices
_GAP_ACROSS, _GAP_DOWN = 0.5, 0.4  # between panels
_AIR = 1.6  # how much larger than its panels a picture is at first
_PER_CHARACTER = 0.078  # inches of a panel's title


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle by its upper left corner."""

    x: float
    y: float
    width: float
    height: float

    @property
    def centre(self) -> Point:
        return self.x + self.width / 2, self.y + self.height / 2

    def moved(self, x: float, y: float) -> Box:
        return Box(self.x + x, self.y + y, self.width, self.height)

    def overlap(self, other: Box, gap: float = 0.0) -> Point:
        """By how much the two come closer than ``gap``, across and down; none if either is <= 0."""
        across = min(self.x + self.width, other.x + other.width) - max(self.x, other.x)
        down = min(self.y + self.height, other.y + other.height) - max(self.y, other.y)
        return across + gap, down + gap

    def touches(self, other: Box, gap: float = 0.0) -> bool:
        return min(self.overlap(other, gap)) > 0

    def contains(self, point: Point, margin: float = 0.0) -> bool:
        return (
            -margin <= point[0] - self.x <= self.width + margin
            and -margin <= point[1] - self.y <= self.height + margin
        )

    def holds(self, other: Box) -> bool:
        corner = other.x + other.width, other.y + other.height
        return self.contains((other.x, other.y)) and self.contains(corner)


@dataclass(frozen=True, slots=True)
class Cell:
    """One square: a device, or a few alike where there are too many.

    Args:
        seat: None where the device is not used.
    """

    device: str
    seat: Seat | None
    box: Box


@dataclass(frozen=True, slots=True)
class Panel:
    """A region, at the origin until it is placed.

    Args:
        nodes: the frame around each node of several devices.
        subtitle: what is in it.
    """

    region: str
    subtitle: str
    box: Box
    cells: tuple[Cell, ...]
    nodes: tuple[Box, ...]


def square_size(devices: int) -> float:
    """Side of a device's square, in inches, in a picture of so many."""
    return 0.27 if devices <= 96 else 0.18 if devices <= 400 else 0.095


def devices_per_square(devices: int) -> int:
    """How many devices share a square, in a picture of so many."""
    return -(-devices // _MOST_SQUARES)


def panel_of(
    region: str, devices: Sequence[Device], seats: Mapping[str, Seat], total: int
) -> Panel:
    """The panel of ``region``.

    Args:
        devices: of the region, used or not.
        seats: by device id.
        total: devices in the whole picture.
    """
    size, each = square_size(total), devices_per_square(total)
    nodes = _nodes(devices, seats, each)
    most = sum(min(len(node), _MOST_COLUMNS) for node in nodes)
    about = math.sqrt(_ASPECT * sum(map(len, nodes)))
    widths = range(max(1, int(0.6 * about)), 1 + min(most, math.ceil(1.6 * about) + 3))
    flows = [_flow(nodes, columns) for columns in widths]
    cells, frames = min(flows, key=lambda flow: _ugliness(flow, seats))
    across, down = _extent(frames)
    used = sum(d.id in seats for d in devices)
    kinds = Counter(d.type for d in devices)
    subtitle = " + ".join(f"{n} {kind}" for kind, n in sorted(kinds.items()))
    if used < len(devices):
        subtitle += f", {len(devices) - used} unused" if used else ", unused"
    text = _PER_CHARACTER * max(len(region), 0.86 * len(subtitle))
    width = max(across * size, text) + 2 * _PADDING
    left = (width - across * size) / 2
    return Panel(
        region=region,
        subtitle=subtitle,
        box=Box(0, 0, width, _HEAD + down * size + _PADDING),
        cells=tuple(
            Cell(d.id, seats.get(d.id), Box(left + x * size, _HEAD + y * size, size, size))
            for x, y, d in cells
        ),
        nodes=tuple(
            Box(left + f.x * size, _HEAD + f.y * size, f.width * size, f.height * size)
            for f in frames
            if f.width * f.height > 1
        ),
    )


def _nodes(devices: Sequence[Device], seats: Mapping[str, Seat], each: int) -> list[list[Device]]:
    """Devices by node, in the order of what they do, one of ``each`` that stand in a row."""

    def order(device: Device) -> tuple[bool, Seat, str]:
        return device.id not in seats, seats.get(device.id, (0, 0)), device.id

    by_node: dict[str, list[Device]] = {}
    for device in sorted(devices, key=order):
        by_node.setdefault(device.node, []).append(device)
    if each == 1:
        return list(by_node.values())
    together = [d for node in by_node.values() for d in node]
    return [[d] for d in together[::each]]


_Flow = tuple[list[tuple[float, float, Device]], list[Box]]
"""(x, y, device), and the frame of each node, all in squares."""


def _flow(nodes: Sequence[Sequence[Device]], columns: int) -> _Flow:
    """Nodes side by side, in rows of at most ``columns`` squares where they are not wider."""
    gap = _NODE_GAP if any(len(node) > 1 for node in nodes) else 0.0
    cells: list[tuple[float, float, Device]] = []
    frames: list[Box] = []
    x = y = height = 0.0
    taken = 0
    for node in nodes:
        w = min(len(node), _MOST_COLUMNS)
        h = -(-len(node) // w)
        if taken and taken + w > columns:
            x, y, height, taken = 0.0, y + height + gap, 0.0, 0
        cells += [(x + i % w, y + i // w, d) for i, d in enumerate(node)]
        frames.append(Box(x, y, w, h))
        x, height, taken = x + w + gap, max(height, h), taken + w
    return cells, frames


def _extent(frames: Sequence[Box]) -> Point:
    """Width and height."""
    return max(f.x + f.width for f in frames), max(f.y + f.height for f in frames)


def _ugliness(flow: _Flow, seats: Mapping[str, Seat]) -> float:
    """How far from a handsome rectangle, and how long the lines between its stages."""
    cells, frames = flow
    width, height = _extent(frames)
    at = {seats[d.id]: (x, y) for x, y, d in cells if d.id in seats}
    jumps = [math.dist(at[p, s], at[p, s + 1]) for p, s in at if (p, s + 1) in at]
    detour = sum(jumps) / len(jumps) - 1 if jumps else 0.0
    empty = width * height / len(cells) - 1
    return abs(math.log(width / height / _ASPECT)) + 0.5 * detour + empty


def spread(panels: Sequence[Panel], places: Sequence[Point], width: float) -> list[Box]:
    """Boxes about where ``places`` (y upwards) are, moved apart; as low as they can be.

    Args:
        width: of the picture, in inches.
    """
    area = sum((p.box.width + _GAP_ACROSS) * (p.box.height + _GAP_DOWN) for p in panels)
    tallest = max(p.box.height for p in panels)
    widest = max(p.box.width for p in panels)
    width = max(width, widest)
    height = max(tallest, min(area / width * _AIR, 0.62 * width))
    across, down = _blended([x for x, _ in places]), _blended([-y for _, y in places])
    while True:
        boxes = [
            p.box.moved(x * (width - p.box.width), y * (height - p.box.height))
            for p, x, y in zip(panels, across, down, strict=True)
        ]
        if _push_apart(boxes, width, height):
            low = min(b.y for b in boxes)
            return [b.moved(0, -low) for b in boxes]
        height *= 1.12


def _blended(values: Sequence[float]) -> list[float]:
    """Values from 0 to 1, half by size and half by rank: no crowd, and no empty ocean."""
    low, high = min(values), max(values)
    if high - low < 1e-9:
        return [0.5] * len(values)
    ranks = {v: i for i, v in enumerate(sorted(set(values)))}
    return [0.5 * (v - low) / (high - low) + 0.5 * ranks[v] / (len(ranks) - 1) for v in values]


def _push_apart(boxes: list[Box], width: float, height: float) -> bool:
    """Move ``boxes`` until none comes close to another; False if that does not work."""
    for _ in range(400):
        close = False
        for i in range(len(boxes)):
            for j in range(i):
                across = boxes[i].overlap(boxes[j], _GAP_ACROSS)[0]
                down = boxes[i].overlap(boxes[j], _GAP_DOWN)[1]
                if across <= 1e-6 or down <= 1e-6:
                    continue
                close = True
                (xi, yi), (xj, yj) = boxes[i].centre, boxes[j].centre
                if across < down:
                    step = (across / 2 if xi >= xj else -across / 2, 0.0)
                else:
                    step = (0.0, down / 2 if yi >= yj else -down / 2)
                boxes[i] = _inside(boxes[i].moved(*step), width, height)
                boxes[j] = _inside(boxes[j].moved(-step[0], -step[1]), width, height)
        if not close:
            return True
    return False


def _inside(box: Box, width: float, height: float) -> Box:
    return Box(
        min(max(box.x, 0.0), width - box.width),
        min(max(box.y, 0.0), height - box.height),
        box.width,
        box.height,
    )
