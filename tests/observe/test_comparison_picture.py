"""The bar chart of a comparison, read back from the figure."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from ray_train_geo.observe.comparison_picture import comparison_picture
from ray_train_geo.observe.rendering import to_png, to_svg
from ray_train_geo.systems.comparison import Compared, Comparison
from ray_train_geo.systems.simulated import Simulated


def row(system: str, step_s: float | None, *measured_s: float, why_not: str = "") -> Compared:
    predicted = (
        None
        if step_s is None
        else Simulated(system, "x", "m", 8, 4, step_s, 1.0, 0.5, {"compute": step_s}, 1.0, 1.0)
    )
    return Compared(system, "fp16", predicted, why_not, measured_s)


def chart(*rows: Compared) -> Figure:
    return comparison_picture(Comparison("case $5$", 4, "gpt3-xl-24", 1024, rows, ()))


def texts(figure: Figure) -> list[str]:
    return [t.get_text() for t in figure.findobj(Text) if isinstance(t, Text) and t.get_text()]


def test_bars_are_as_long_as_the_steps_and_diamonds_stand_at_the_means() -> None:
    figure = chart(row("ours", 10.0), row("dtfm_scheduled", 22.0, 19.0, 21.0))
    axes = figure.axes[0]
    bars = [p for p in axes.patches if isinstance(p, Rectangle)]
    assert [bar.get_width() for bar in bars] == [10.0, 22.0]
    assert bars[0].get_facecolor() != bars[1].get_facecolor()
    (mark,) = axes.lines
    assert list(mark.get_xdata()) == [20.0]
    assert list(mark.get_ydata()) == [1]
    assert axes.get_ylim()[0] > axes.get_ylim()[1], "the first row on top"
    assert axes.get_xlim()[1] > 22.0


def test_what_it_says() -> None:
    figure = chart(
        row("ours", 10.0),
        row("dtfm_scheduled", 22.0, 20.0),
        row("torch_pipe", None, why_not="it runs on one node " * 10),
    )
    said = texts(figure)
    assert "gpt3-xl-24, 1024 sequences a step, on case $5$ (4 devices)" in said
    assert {"ours", "dtfm_scheduled", "torch_pipe", "10.0"} <= set(said)
    assert "22.0   measured 20.0 (+10%)" in said
    (reason,) = [text for text in said if text.startswith("it runs on one node")]
    assert len(reason) <= 80
    assert reason.endswith("…")


def test_no_diamonds_are_explained_where_there_are_none() -> None:
    assert not any("measured" in text for text in texts(chart(row("ours", 10.0))))


def test_a_bar_that_would_dwarf_the_others_is_cut_off() -> None:
    figure = chart(row("ours", 10.0), row("a", 20.0), row("b", 21.0, 999.0), row("c", 900.0))
    bars = [p for p in figure.axes[0].patches if isinstance(p, Rectangle)]
    assert [bar.get_width() for bar in bars] == [10.0, 20.0, 21.0, 61.5]
    assert not figure.axes[0].lines, "nor is a mark drawn outside"
    assert {"\N{RIGHTWARDS ARROW} 900.0", "21.0   measured 999.0 (-98%)"} <= set(texts(figure))


@pytest.mark.parametrize("rows", [1, 20])
def test_it_can_be_drawn(rows: int) -> None:
    figure = chart(*(row(f"system_{i}", 1.0 + i, 2.0 + i) for i in range(rows)))
    assert to_png(figure).startswith(b"\x89PNG")
    assert ET.fromstring(to_svg(figure)).tag.endswith("svg")
