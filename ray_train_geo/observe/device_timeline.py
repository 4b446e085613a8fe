"""Who computed when, in which generation, as a matplotlib figure (level 0).

::

    east a/0   ███ 1 ███   ██ 2 ██████ 3 ███
    west b/0   ███ 1 ██x                            x  something was lost
    east c/0                     ██████ 3 ███
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ray_train_geo.observe.rendering import BLUE, INK, MUTED, ORANGE, PAPER, RED

__all__ = ["DeviceTimeline", "device_timeline", "device_timeline_picture"]

_ENDS = ("failure", "restore", "finish", "error", "generation")
"""Events that say that the generation before them trains no more."""
_WIDTH, _ROW, _FRAME = 11.2, 0.26, 1.0  # inches
_MOST_ROWS = 64
_LONG_S = 600.0
_NAME_CHARACTERS = 28
_LABEL_SHARE = 0.02
"""A bar carries its generation's number if it has this share of the width."""


@dataclass(frozen=True, slots=True)
class DeviceTimeline:
    """What the events of a run say, in seconds since the first.

    Args:
        rows: by device, in the order of their appearance: its region, and when it trained:
            (generation, start, end).
        failures: when something was lost.
        waits: from when to when there were too few devices.
        end_s: of the record.
    """

    rows: Mapping[str, tuple[str, tuple[tuple[int, float, float], ...]]]
    failures: tuple[float, ...]
    waits: tuple[tuple[float, float], ...]
    end_s: float


def device_timeline(events: Sequence[Mapping[str, Any]]) -> DeviceTimeline | None:
    """Read it off the events; None if no generation was ever in force.

    Raises:
        KeyError, TypeError: an event is not in the format of this version.
    """
    timed = [e for e in events if isinstance(e.get("time"), int | float)]
    if not any(e.get("event") == "generation" for e in timed):
        return None
    zero, last = timed[0]["time"], timed[-1]["time"]
    rows: dict[str, tuple[str, list[tuple[int, float, float]]]] = {}
    for event, end in _until(timed, ("generation",), _ENDS, last):
        for worker in event["workers"]:
            _, spans = rows.setdefault(worker["device"], (str(worker.get("region") or ""), []))
            spans.append((int(event["generation"]), event["time"] - zero, end - zero))
    return DeviceTimeline(
        {device: (region, tuple(spans)) for device, (region, spans) in rows.items()},
        tuple(e["time"] - zero for e in timed if e.get("event") == "failure"),
        tuple(
            (e["time"] - zero, end - zero)
            for e, end in _until(timed, ("waiting",), ("generation", "finish", "error"), last)
        ),
        last - zero,
    )


def _until(
    events: Sequence[Mapping[str, Any]],
    kinds: tuple[str, ...],
    ends: tuple[str, ...],
    last: float,
) -> Iterator[tuple[Mapping[str, Any], float]]:
    """Events of ``kinds``, each with the time of the next one of ``ends``."""
    for i, event in enumerate(events):
        if event.get("event") in kinds:
            later = (e["time"] for e in events[i + 1 :] if e.get("event") in ends)
            yield event, next(later, last)


def device_timeline_picture(timeline: DeviceTimeline) -> Figure:
    """A row a device; bars are what it trained, in the colours of odd and even generations."""
    shown = list(timeline.rows.items())[:_MOST_ROWS]
    figure = Figure(figsize=(_WIDTH, _FRAME + _ROW * max(len(shown), 3)), layout="constrained")
    axes = figure.add_subplot()
    minutes = timeline.end_s > _LONG_S
    scale = 1 / 60 if minutes else 1.0
    end = max(timeline.end_s * scale, 1e-9)
    for row, (_, (_, spans)) in enumerate(shown):
        for generation, start_s, end_s in spans:
            _bar(axes, row, generation, start_s * scale, end_s * scale, end)
    for at_s in timeline.failures:
        axes.axvline(at_s * scale, color=RED, linewidth=1, alpha=0.7)
    for start_s, end_s in timeline.waits:
        axes.axvspan(start_s * scale, end_s * scale, color=MUTED, alpha=0.2, linewidth=0)
    axes.set_yticks(range(len(shown)), [_name(device, region) for device, (region, _) in shown])
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlim(0, end)
    axes.xaxis.set_major_locator(MaxNLocator(10))
    axes.tick_params(labelsize=8, colors=MUTED, length=0)
    axes.set_xlabel("minutes" if minutes else "seconds", fontsize=8.5, color=MUTED)
    axes.spines[["top", "left", "right"]].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    axes.set_title("Devices", loc="left", fontsize=11, fontweight="bold", color=INK)
    hidden = len(timeline.rows) - len(shown)
    said = "bars: generations; red: something was lost"
    if timeline.waits:
        said += "; grey: too few devices"
    if hidden:
        said += f"; {hidden} more devices are not shown"
    axes.set_title(said, loc="right", fontsize=8.5, color=MUTED)
    return figure


def _bar(axes: Axes, row: int, generation: int, start: float, end: float, width: float) -> None:
    colour = BLUE if generation % 2 else ORANGE
    axes.barh(row, end - start, left=start, height=0.72, color=colour, linewidth=0)
    if end - start > _LABEL_SHARE * width:
        axes.text(
            (start + end) / 2, row, str(generation), ha="center", va="center", fontsize=7,
            color=PAPER, parse_math=False,
        )  # fmt: skip


def _name(device: str, region: str) -> str:
    """Region and the end of the device's id; ``$`` starts no formula."""
    text = f"{region} {device}".strip()
    return (text if len(text) <= _NAME_CHARACTERS else f"{text[:_NAME_CHARACTERS]}…").replace(
        "$", r"\$"
    )
