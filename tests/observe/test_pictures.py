"""What the pictures show: read back from the figures, and from the SVG."""

from __future__ import annotations

import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from typing import Any

import observe_example as example
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.text import Text

from ray_train_geo.observe.pictures import (
    loss_curve,
    pipeline_timeline,
    plan_picture,
    step_time_picture,
    to_png,
    to_svg,
)


def texts(figure: Figure) -> list[str]:
    return [t.get_text() for t in figure.findobj(Text) if t.get_text()]


def lines(figure: Figure) -> dict[str, tuple[list[float], list[float]]]:
    found = figure.axes[0].get_lines()
    return {str(x.get_label()): (list(x.get_xdata()), list(x.get_ydata())) for x in found}


def test_loss_curve_draws_what_was_measured_and_nothing_else() -> None:
    records = [
        {"step": 0, "loss": 3.0, "generation": 0},
        {"step": 1, "loss": None, "generation": 0, "skipped": True},
        {"step": 2, "loss": 2.0, "generation": 1},
        {"step": 3, "generation": 1},
    ]
    figure = loss_curve(records, [{"event": "checkpoint", "step": 2}, {"event": "stop", "step": 3}])
    drawn = lines(figure)
    assert drawn["loss"] == ([0, 2], [3.0, 2.0])
    assert drawn["checkpoint"][0] == [2]
    assert drawn["skipped (overflow)"][0] == [1]
    assert "gen 1" in texts(figure)
    assert "bits per byte" not in texts(figure)


def test_bits_per_byte_stand_on_the_right_at_their_own_scale() -> None:
    figure = loss_curve(
        [{"step": s, "loss": 4.0 - s, "bits_per_byte": 2.0 - s / 2} for s in (0, 1)]
    )
    figure.draw_without_rendering()
    (right,) = figure.axes[0].child_axes
    assert right.get_ylabel() == "bits per byte"
    low, high = figure.axes[0].get_ylim()
    assert right.get_ylim() == pytest.approx((low / 2, high / 2))
    assert set(lines(figure)) == {"loss"}, "a second line would lie on the first"


def test_bits_per_byte_are_a_line_where_they_do_not_follow_the_loss() -> None:
    bits = (2.0, 1.0, 0.5)
    figure = loss_curve([{"step": s, "loss": 2.0, "bits_per_byte": b} for s, b in enumerate(bits)])
    assert lines(figure)["bits per byte (right)"][1] == pytest.approx([4.0, 2.0, 1.0])


def test_a_long_run_is_thinned_but_keeps_its_ends_and_mean() -> None:
    records = [{"step": s, "loss": float(s)} for s in range(10_000)]
    x, y = lines(loss_curve(records))["loss"]
    assert len(x) <= 1500
    assert x[0] < 10
    assert x[-1] > 9990
    assert x == y


def test_a_slow_first_step_does_not_flatten_the_rest() -> None:
    figure = step_time_picture(example.records())
    drawn = lines(figure)
    assert figure.axes[0].get_ylim()[1] < 1.0
    assert drawn["above the axis (up to 3.1 s)"][0] == [0]
    assert len(drawn["measured"][0]) == 299
    assert drawn["predicted"][1][0] == 0.41


@pytest.mark.parametrize("picture", [loss_curve, step_time_picture])
@pytest.mark.parametrize("records", [[], [{"step": 0, "loss": None}], [{"loss": 1.0}]])
def test_no_steps_say_so(picture: Any, records: list[dict[str, Any]]) -> None:
    assert "no step has been recorded" in texts(picture(records))


def test_one_step_and_zeros_can_be_drawn() -> None:
    records = [{"step": 0, "loss": 0.0, "step_s": 0.0, "predicted_step_s": 0.0}]
    for figure in (loss_curve(records), step_time_picture(records)):
        assert to_svg(figure).startswith("<svg")


def test_timeline_has_a_row_a_rank_and_a_number_a_microbatch() -> None:
    figure = pipeline_timeline(example.trace())
    axes = figure.axes[0]
    assert axes.get_title(loc="left") == "Pipeline timeline, step 3"
    assert [t.get_text() for t in axes.get_yticklabels()] == [
        "pipeline 0, stage 0\nrank 0, layers 0-5",
        "pipeline 0, stage 1\nrank 1, layers 6-11",
        "pipeline 1, stage 0\nrank 2, layers 0-5",
        "pipeline 1, stage 1\nrank 3, layers 6-11",
    ]
    numbers = [t.get_text() for t in axes.texts if t.get_text().isdigit()]
    # Each microbatch: forward and backward, on the two stages of its pipeline.
    assert sorted(numbers) == sorted(str(m) for m in range(8) for _ in range(4))


def test_timeline_draws_the_step_asked_for() -> None:
    trace = example.trace()
    title = pipeline_timeline(trace, step=1).axes[0].get_title(loc="left")
    assert title == "Pipeline timeline, step 1"
    assert "step 9 has not been traced" in texts(pipeline_timeline(trace, step=9))
    assert "no step has been traced" in texts(pipeline_timeline({"traceEvents": []}))


def test_timeline_prefers_the_last_step_that_all_ranks_have() -> None:
    trace = example.trace()
    events = [e for e in trace["traceEvents"] if e["pid"] != 2 or e["args"].get("step") != 3]
    title = pipeline_timeline({"traceEvents": events}).axes[0].get_title(loc="left")
    assert title == "Pipeline timeline, step 2"


def test_busy_is_compute_time_over_step_time() -> None:
    events = [
        {"ph": "X", "cat": "forward", "pid": 0, "tid": 0, "ts": 0, "dur": 250, "name": "F0",
         "args": {"step": 0, "microbatch": 0}},
        {"ph": "X", "cat": "sync", "pid": 0, "tid": 300, "ts": 250, "dur": 750, "name": "s",
         "args": {"step": 0}},
    ]  # fmt: skip
    assert "25%" in texts(pipeline_timeline({"traceEvents": events}))


def test_plan_picture_has_a_box_a_stage_and_dashes_between_regions() -> None:
    figure = plan_picture(example.plan().to_json())
    boxes = [b for b in figure.findobj(FancyBboxPatch) if b.get_facecolor()[3] > 0]
    assert len(boxes) == 4
    arrows = figure.findobj(FancyArrowPatch)
    assert [a.get_linestyle() == "-" for a in arrows] == [True, False]
    said = texts(figure)
    assert said.count("layers 0-5") == 2
    assert said.count("4 microbatches") == 2
    assert {"no. 0-3", "no. 4-7", "us-east", "eu-west", "29 GiB of 80 GiB", "warmup 2"} <= set(said)
    assert any("predicted 410 ms a step (lower bound 380 ms)" in t for t in said)


def test_names_that_users_chose_are_drawn_as_they_are() -> None:
    plan = example.plan()
    region = "$x^2$ <b>&amp; #1f2328 \u5317\u4eac -->"
    odd = replace(plan, devices=tuple(replace(d, region=region) for d in plan.devices))
    svg = to_svg(plan_picture(odd.to_json()))
    said = {"".join(e.itertext()) for e in ET.fromstring(svg).iter() if e.tag.endswith("}text")}
    assert region in said


def pictures() -> list[Figure]:
    records = example.records()
    return [
        loss_curve(records, example.events()),
        step_time_picture(records),
        pipeline_timeline(example.trace()),
        plan_picture(example.plan().to_json()),
    ]


def test_svgs_stand_together_in_one_page() -> None:
    svgs = [to_svg(figure) for figure in pictures()]
    assert svgs == [to_svg(figure) for figure in pictures()], "the same run, the same report"
    page = "<div>" + "".join(svgs) + "</div>"
    ET.fromstring(page)
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids)) > 0
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', page)) == set(ids)
    urls = set(re.findall(r"https?://[^\"' ]+", page))
    assert urls == {"http://www.w3.org/1999/xlink", "http://www.w3.org/2000/svg"}
    assert "currentColor" in page
    assert "var(--muted" in page


def test_png() -> None:
    data = to_png(loss_curve([]), dots_per_inch=50)
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(data[16:20], "big") == 560


def test_no_global_figure_state_and_nothing_heavy() -> None:
    code = (
        "import sys, ray_train_geo.observe.report as r; "
        "print([m for m in ('matplotlib.pyplot', 'torch', 'ray') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_changes_stand_on_the_loss_curve_with_what_they_took() -> None:
    records = [{"step": s, "loss": 3.0 - s / 10, "generation": s // 4} for s in range(10)]
    figure = loss_curve(
        records,
        [
            {"event": "failure", "step": 3},
            {"event": "recovery", "step": 4, "first_commit_s": 1.26},
            {"event": "reshape", "step": 8, "first_commit_s": 0.4},
        ],
    )
    drawn = lines(figure)
    assert drawn["first step after a loss"][0] == [4]
    assert drawn["first step after nodes came or went"][0] == [8]
    assert {"1.3 s", "0.4 s"} <= set(texts(figure))
