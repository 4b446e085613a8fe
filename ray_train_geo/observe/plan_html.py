"""A plan as a piece of HTML, for notebooks (level 0)."""

from __future__ import annotations

from html import escape

from ray_train_geo.observe.plan_map import plan_map
from ray_train_geo.observe.rendering import to_svg
from ray_train_geo.planning.plan import Certificate, Plan

__all__ = ["plan_html"]

_COLUMNS = ("pipeline", "microbatches", "stage", "device", "region", "type", "layers", "memory GiB")
_MOST_ROWS = 256
_STYLE = "max-height: 24em; overflow: auto"


def plan_html(plan: Plan) -> str:
    """The map of ``plan`` as inline SVG, what it reaches, and a table with a row for each stage."""
    head = "".join(f"<th>{name}</th>" for name in _COLUMNS)
    rows = _rows(plan)
    body = "".join(rows[:_MOST_ROWS])
    if len(rows) > _MOST_ROWS:
        more = len(rows) - _MOST_ROWS
        body += f'<tr><td colspan="{len(_COLUMNS)}">and {more} more stages</td></tr>'
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return (
        f"<div>{to_svg(plan_map(plan))}<p>{escape(_summary(plan))}</p>"
        f'<div style="{_STYLE}">{table}</div></div>'
    )


def _summary(plan: Plan) -> str:
    said = f"{plan.predicted_step_s:.4g} s a step predicted"
    bound: Certificate | None = plan.certificate
    if bound is not None and bound.lower_bound > 0:
        said += (
            f"; {bound.objective} {bound.value:.4g}, lower bound {bound.lower_bound:.4g}, "
            f"gap {bound.gap:.1%}"
        )
    return said


def _rows(plan: Plan) -> list[str]:
    devices = {d.id: d for d in plan.devices}
    rows = []
    for role in plan.roles():
        stage, pipeline = plan.stage(role), plan.pipelines[role.pipeline]
        device = devices[stage.device]
        first, last = stage.layers[0], stage.layers[1] - 1
        cells = (
            role.pipeline,
            pipeline.microbatches,
            role.stage,
            device.id,
            device.region,
            device.type,
            f"{first}-{last}" if last > first else first,
            f"{stage.memory_bytes / 2**30:.1f} of {device.memory_bytes / 2**30:.1f}",
        )
        rows.append("<tr>" + "".join(f"<td>{escape(str(c))}</td>" for c in cells) + "</tr>")
    return rows
