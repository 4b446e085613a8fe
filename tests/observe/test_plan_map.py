"""The map of a plan: what is drawn, read back from the figure; and that nothing overlaps."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, PathPatch
from matplotlib.text import Text

from ray_train_geo.cluster.topology import Device, Link, Topology
from ray_train_geo.observe.map_layout import Box, Panel, panel_of, spread
from ray_train_geo.observe.places import arranged, known_place
from ray_train_geo.observe.plan_map import plan_map
from ray_train_geo.observe.rendering import to_png, to_svg
from ray_train_geo.planning.plan import Certificate, PipelinePlan, Plan, StagePlan

WORLD = ("oregon", "virginia", "ohio", "tokyo", "seoul", "london", "frankfurt", "ireland")


def cluster(regions: tuple[str, ...], each: int, gpus: int = 1) -> Topology:
    devices = tuple(
        Device(f"{r}-{n}/{g}", f"{r}-{n}", r, type="V100", memory_bytes=16 * 2**30)
        for r in regions
        for n in range(each // gpus)
        for g in range(gpus)
    )
    links = {
        (a, b): Link(0.01 * (1 + abs(i - j)), 1e8)
        for i, a in enumerate(regions)
        for j, b in enumerate(regions)
        if i != j
    }
    return Topology(devices, region_links=links)


def plan_on(where: Topology, pipelines: int, stages: int, codec: str = "none") -> Plan:
    """Pipeline p's stages on every ``pipelines``-th device, so that most hops cross regions."""
    made = tuple(
        PipelinePlan(
            tuple(
                StagePlan(where.devices[p + s * pipelines].id, (s, s + 1), 1, 2**30, codec)
                for s in range(stages)
            ),
            4,
            4 * p,
        )
        for p in range(pipelines)
    )
    used = where.devices[: pipelines * stages]
    return Plan(stages, made, "1f1b", "allreduce", used, 1.5, Certificate("step-time", 1.5, 1.2))


def texts(figure: Figure) -> list[str]:
    return [t.get_text() for t in figure.findobj(Text) if t.get_text()]


def overlaps(boxes: list[Box]) -> list[tuple[Box, Box]]:
    return [(a, b) for a, b in combinations(boxes, 2) if min(a.overlap(b)) > 1]


def drawn(figure: Figure, kind: type[Text] | type[FancyBboxPatch]) -> list[Box]:
    """Where these are drawn, in pixels."""
    figure.draw_without_rendering()
    extents = [artist.get_window_extent() for artist in figure.findobj(kind)]
    return [Box(e.x0, e.y0, e.width, e.height) for e in extents if e.width > 0]


def test_every_region_and_stage_is_named() -> None:
    where = cluster(WORLD, 8)
    figure = plan_map(plan_on(where, 8, 8), where)
    found = texts(figure)
    assert set(WORLD) <= set(found)
    assert found.count("8 V100") == 8
    for stage in range(8):
        assert found.count(str(stage)) == 8
    assert sum(t.startswith("pipeline ") for t in found) == 8
    assert any("64 of 64 devices" in t and "1.5 s a step predicted" in t for t in found)


def test_hops_between_regions_are_dashed_and_tell_their_link() -> None:
    where = cluster(("oregon", "tokyo"), 2)
    figure = plan_map(plan_on(where, 2, 2), where)
    dashed = [p for p in figure.findobj(PathPatch) if p.get_linestyle() != "-"]
    assert len(dashed) == 2, "a line for each of a few pipelines"
    assert len({p.get_edgecolor() for p in dashed}) == 2
    assert any(re.fullmatch(r"8 microbatches\n20 ms, 0\.8 Gbit/s", t) for t in texts(figure))
    many = cluster(("oregon", "tokyo"), 8)
    (line,) = [
        p for p in plan_map(plan_on(many, 8, 2), many).findobj(PathPatch)
        if p.get_linestyle() != "-"
    ]  # fmt: skip
    assert line.get_linewidth() > 3


def test_a_codec_makes_a_line_thinner() -> None:
    """Beside one that has none."""
    where = cluster(("oregon", "tokyo"), 2)
    made = plan_on(where, 2, 2)
    first = made.pipelines[0]
    coded = replace(first, stages=(replace(first.stages[0], codec="int8"), first.stages[1]))
    figure = plan_map(replace(made, pipelines=(coded, made.pipelines[1])))
    thin, thick = (p.get_linewidth() for p in figure.findobj(PathPatch))
    assert thin < thick


def test_unused_devices_are_grey_if_the_topology_is_given() -> None:
    where = cluster(("oregon", "tokyo"), 4)
    made = plan_on(where, 2, 2)
    found = texts(plan_map(made, where))
    assert "4 V100, unused" in found
    assert any("4 of 8 devices" in t for t in found)
    assert any("grey devices are not used" in t for t in found)
    assert not any("grey" in t for t in texts(plan_map(made)))


@pytest.mark.parametrize(
    ("regions", "each", "gpus", "pipelines", "stages"),
    [
        (WORLD, 8, 1, 8, 8),
        (WORLD, 8, 4, 16, 4),
        (("east",), 64, 8, 8, 8),
        (("a region with a long name", "another such region", "c"), 3, 1, 3, 3),
        (tuple(f"r{i}" for i in range(16)), 64, 8, 32, 30),
    ],
)
def test_nothing_overlaps(
    regions: tuple[str, ...], each: int, gpus: int, pipelines: int, stages: int
) -> None:
    where = cluster(regions, each, gpus)
    figure = plan_map(plan_on(where, pipelines, stages), where)
    panels = drawn(figure, FancyBboxPatch)
    assert len(panels) == len(regions)
    assert not overlaps(panels)
    assert not overlaps(drawn(figure, Text))
    page = figure.bbox
    for box in (*panels, *drawn(figure, Text)):
        assert box.x >= 0
        assert box.y >= 0
        assert box.x + box.width <= page.width + 1
        assert box.y + box.height <= page.height + 1


def test_a_thousand_devices_are_one_picture_of_bearable_size() -> None:
    where = cluster(tuple(f"r{i}" for i in range(16)), 64, 8)
    figure = plan_map(plan_on(where, 32, 30), where)
    assert "0" not in texts(figure), "too small for numbers"
    assert any("colours repeat every 24 pipelines" in t for t in texts(figure))
    assert len(to_svg(figure)) < 1_000_000


def test_ten_thousand_devices_share_squares() -> None:
    devices = [Device(f"n{i}/0", f"n{i}", "r") for i in range(10_000)]
    panel = panel_of("r", devices, {}, 10_000)
    assert 1_000 < len(panel.cells) <= 2_048
    assert panel.subtitle == "10000 cpu, unused"


def test_both_formats() -> None:
    where = cluster(("oregon", "tokyo"), 2)
    figure = plan_map(plan_on(where, 2, 2), where)
    assert to_png(figure).startswith(b"\x89PNG")
    svg = to_svg(figure)
    assert ET.fromstring(svg).tag.endswith("svg")
    assert "oregon" in svg
    assert svg == to_svg(plan_map(plan_on(where, 2, 2), where)), "the same each time"


def test_a_notebook_shows_map_and_table() -> None:
    where = cluster(("oregon", "<b>tokyo"), 2)
    html = plan_on(where, 2, 2)._repr_html_()
    root = ET.fromstring(html)
    assert root.find("{http://www.w3.org/2000/svg}svg") is not None
    assert "&lt;b&gt;tokyo" in html
    assert len(root.findall(".//tbody/tr")) == 4
    assert "gap 25.0%" in html


# ------------------------------------------------------------------ where regions stand


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("us-east-1", "Virginia"),
        ("us-east4", "N. Virginia"),
        ("eastus", "virginia"),
        ("asia-northeast1", "Tokyo"),
        ("eu-central-1", "FRANKFURT"),
        ("US West 2", "oregon"),
        ("ap_southeast_2", "sydney"),
    ],
)
def test_names_of_one_place(name: str, place: str) -> None:
    assert known_place(name) is not None
    assert known_place(name) == known_place(place)


def test_known_regions_stand_where_they_are() -> None:
    places, how = arranged(("oregon", "london", "tokyo", "sydney"), None)
    assert how == "where they are"
    west_to_east = [x for x, _ in places]
    assert west_to_east[:3] == sorted(west_to_east[:3])
    assert places[3][1] < 0 < places[1][1]


def test_unknown_regions_stand_by_latency() -> None:
    at = {"p": (0.0, 0.0), "q": (3.0, 0.0), "r": (3.0, 4.0), "s": (0.0, 1.0)}
    names = tuple(at)
    devices = tuple(Device(f"{n}/0", n, n) for n in names)
    links = {
        (a, b): Link(math.dist(at[a], at[b]) / 100, 1e8) for a in names for b in names if a != b
    }
    places, how = arranged(names, Topology(devices, region_links=links))
    assert how == "by latency"
    for a, b in combinations(range(4), 2):
        expected = math.dist(at[names[a]], at[names[b]]) / 100
        assert math.dist(places[a], places[b]) == pytest.approx(expected)


def test_without_links_they_stand_on_a_circle() -> None:
    places, how = arranged(("p", "q", "r"), None)
    assert how == "on a circle"
    assert [math.hypot(*p) for p in places] == pytest.approx([1, 1, 1])
    assert len(set(places)) == 3
    one_way = Topology((Device("p/0", "p", "p"), Device("q/0", "q", "q")), default_link=None)
    assert arranged(("p", "q"), one_way)[1] == "on a circle"
    assert arranged(("p",), None) == ([(0.0, 0.0)], "")


@settings(max_examples=15, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(-180, 180), st.floats(-60, 70), st.floats(0.8, 4), st.floats(0.6, 3)),
        min_size=1,
        max_size=9,
    )
)
def test_panels_never_overlap(given_panels: list[tuple[float, float, float, float]]) -> None:
    panels = [Panel("r", "", Box(0, 0, w, h), (), ()) for _, _, w, h in given_panels]
    boxes = spread(panels, [(x, y) for x, y, _, _ in given_panels], 10.8)
    assert not any(a.touches(b) for a, b in combinations(boxes, 2))
    assert min(b.x for b in boxes) >= -1e-9
    assert min(b.y for b in boxes) == pytest.approx(0)
    assert [(b.width, b.height) for b in boxes] == [(p.box.width, p.box.height) for p in panels]
