"""The picture of a plan: which layers run where (level 0)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from ray_train_geo.observe.rendering import BLUE, GRID, INK, MUTED, ORANGE

__all__ = ["plan_picture"]

_REGIONS = (BLUE, ORANGE, "#2a9d8f", "#7a5bb5", "#c2528b", "#6f8f1f", "#b08d18", "#5c7a99")

_BAR = 0.45  # length of the memory bar; its text stands right of it


def plan_picture(plan: Mapping[str, Any]) -> Figure:
    """A plan (``Plan.to_json()``): a row per pipeline, a box per stage, coloured by region.

    A bar in each box shows how much of the device's memory the plan fills.  Links that cross
    regions are dashed.
    """
    devices = {d["id"]: d for d in plan["devices"]}
    pipelines = plan["pipelines"]
    used = [devices.get(s["device"], {}) for p in pipelines for s in p["stages"]]
    regions = list(dict.fromkeys(str(d.get("region", "unknown")) for d in used))
    colours = {region: _REGIONS[i % len(_REGIONS)] for i, region in enumerate(regions)}
    # One data unit is one inch, and y grows downwards.
    box_w, box_h, gap, left, head, row_h = 1.75, 1.04, 0.34, 1.35, 0.86, 1.26
    longest = max((len(p["stages"]) for p in pipelines), default=1)
    legend = sum(0.5 + 0.085 * len(region) for region in regions)
    width = max(left + longest * (box_w + gap), legend, 7.0)
    height = head + row_h * len(pipelines)
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    _say(axes, 0.1, 0.2, "Plan", size=11, weight="bold")
    bound = plan.get("lower_bound") or 0.0
    _say(axes, 0.62, 0.2,
         f"{plan['schedule']} · {plan['gradient_sync']} · {plan['layers']} layers · predicted "
         f"{_seconds(plan['predicted_step_s'])} a step"
         + (f" (lower bound {_seconds(bound)})" if bound > 0 else ""),
         colour=MUTED, size=9)  # fmt: skip
    x = 0.1
    for region, colour in colours.items():
        axes.add_patch(Rectangle((x, 0.48), 0.14, 0.14, facecolor=colour))
        _say(axes, x + 0.2, 0.55, region, size=8.5)
        x += 0.5 + 0.085 * len(region)
    for p, pipeline in enumerate(pipelines):
        middle = head + row_h * p + box_h / 2
        first, count = pipeline["first_microbatch"], pipeline["microbatches"]
        _say(axes, 0.1, middle - 0.2, f"pipeline {p}", size=9.5, weight="bold")
        _say(axes, 0.1, middle + 0.02, f"{count} microbatch{'es' * (count != 1)}", size=8.5)
        numbers = f"{first}-{first + count - 1}" if count > 1 else f"{first}"
        _say(axes, 0.1, middle + 0.22, f"no. {numbers}", size=8, colour=MUTED)
        before = None
        for s, stage in enumerate(pipeline["stages"]):
            device = devices.get(stage["device"], {})
            region = str(device.get("region", "unknown"))
            corner = (left + s * (box_w + gap), middle - box_h / 2)
            _stage_box(axes, corner, (box_w, box_h), stage, device, colours[region])
            if before is not None:
                far = before != region
                axes.add_patch(
                    FancyArrowPatch(
                        (corner[0] - gap + 0.02, middle), (corner[0] - 0.02, middle),
                        arrowstyle="-|>", mutation_scale=9, shrinkA=0, shrinkB=0, linewidth=1.3,
                        color=INK if far else MUTED, linestyle=(0, (2, 1.2)) if far else "-",
                    )
                )  # fmt: skip
            before = region
    return figure


def _stage_box(
    axes: Axes,
    corner: tuple[float, float],
    size: tuple[float, float],
    stage: Mapping[str, Any],
    device: Mapping[str, Any],
    colour: str,
) -> None:
    (x, y), (w, h) = corner, size
    for face, alpha, edge in ((colour, 0.14, "none"), ("none", 1.0, colour)):
        axes.add_patch(
            FancyBboxPatch(
                (x, y), w, h, boxstyle="round,pad=0,rounding_size=0.06",
                facecolor=face, alpha=alpha, edgecolor=edge, linewidth=1.2,
            )
        )  # fmt: skip
    first, last = stage["layers"][0], stage["layers"][1] - 1
    held = f"layer {first}" if first == last else f"layers {first}-{last}"
    _say(axes, x + 0.09, y + 0.16, held, size=9.5, weight="bold")
    _say(
        axes, x + w - 0.09, y + 0.16, f"warmup {stage['warmup']}", size=7, colour=MUTED, ha="right"
    )
    where = [str(device.get("region", "unknown"))]
    if device.get("market_type") == "spot":
        where.append("spot")
    for i, text in enumerate(
        (str(stage["device"]), str(device.get("type", "")), " · ".join(where))
    ):
        colour_of_line = MUTED if i else INK
        _say(
            axes, x + 0.09, y + 0.36 + 0.175 * i, _short(text, 27), size=7.5, colour=colour_of_line
        )
    need, have = stage.get("memory_bytes") or 0, device.get("memory_bytes") or 0
    if need and have:
        axes.add_patch(Rectangle((x + 0.09, y + 0.88), _BAR, 0.07, facecolor=GRID))
        fill = _BAR * min(need / have, 1.0)
        axes.add_patch(Rectangle((x + 0.09, y + 0.88), fill, 0.07, facecolor=colour))
        text = f"{_size(need)} of {_size(have)}"
        _say(axes, x + w - 0.09, y + 0.915, text, size=7, colour=MUTED, ha="right")


def _say(axes: Axes, x: float, y: float, text: str, size: float, colour: str = INK,
         weight: str = "normal", ha: str = "left") -> None:  # fmt: skip
    axes.text(x, y, text, fontsize=size, color=colour, fontweight=weight, ha=ha, va="center",
              parse_math=False)  # fmt: skip


def _short(text: str, most: int) -> str:
    """``text`` in at most ``most`` characters; Ray's 56-digit node ids keep their first 8."""
    text = re.sub(r"[0-9a-f]{32,}", lambda m: m[0][:8], text)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def _size(size_bytes: float) -> str:
    unit, name = (2**30, "GiB") if size_bytes >= 2**30 else (2**20, "MiB")
    return f"{size_bytes / unit:.3g} {name}"
