from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_train_geo.cluster.topology import Device, Link, Topology, Uplink
from ray_train_geo.errors import PlanError
from ray_train_geo.model.catalog import CATALOG, layer_parameters, total_parameters
from ray_train_geo.planning.memory import STATE_BYTES_PER_PARAMETER
from ray_train_geo.planning.plan import PipelinePlan, Plan, StagePlan
from ray_train_geo.planning.transition import (
    Move,
    Transition,
    transition,
)

TIED = replace(CATALOG["gpt3-xl-24"], layers=6, tied_embeddings=True)
DIMS = replace(TIED, tied_embeddings=False)
LAYER = STATE_BYTES_PER_PARAMETER * layer_parameters(DIMS)
TOKENS = STATE_BYTES_PER_PARAMETER * DIMS.vocab_size * DIMS.dim


def device(name: str) -> Device:
    """``node/number`` or ``region.node/number``."""
    node = name.rsplit("/", 1)[0]
    return Device(name, node, region=node.split(".")[0] if "." in node else "here")


def plan(*pipelines: dict[str, tuple[int, int]]) -> Plan:
    """Pipelines, each by device and layers."""
    return Plan(
        layers=DIMS.layers,
        pipelines=tuple(
            PipelinePlan(tuple(StagePlan(d, run, 0) for d, run in p.items()), 1, i)
            for i, p in enumerate(pipelines)
        ),
        schedule="1f1b",
        gradient_sync="allreduce",
        devices=tuple(device(d) for p in pipelines for d in p),
        predicted_step_s=1.0,
    )


def topology(*names: str, **more) -> Topology:
    return Topology(tuple(device(n) for n in names), **more)


def moved(t: Transition) -> list[tuple[str | None, str, tuple[int, int] | None]]:
    return [(m.source, m.target, m.layers) for m in t.moves]


def test_nothing_moves_between_equal_plans():
    p = plan({"a/0": (0, 3), "b/0": (3, 6)})
    t = transition(p, p, topology("a/0", "b/0"), DIMS)
    assert t == Transition((), {}, {}, {}, 0)
    assert (t.size_bytes, t.layers_moved, t.devices_touched) == (0, 0, ())


def test_a_new_stage_takes_from_both_neighbours_and_those_who_shrink_receive_nothing():
    old = plan({"a/0": (0, 3), "b/0": (3, 6)})
    new = plan({"a/0": (0, 2), "c/0": (2, 4), "b/0": (4, 6)})
    t = transition(old, new, topology("a/0", "b/0", "c/0"), DIMS)
    assert t.moves == (
        Move("a/0", "c/0", (2, 3), LAYER),
        Move("b/0", "c/0", (3, 4), LAYER),
    )
    assert t.out_bytes == {"a": LAYER, "b": LAYER}
    assert t.in_bytes == {"c": 2 * LAYER}
    assert (t.layers_moved, t.devices_touched, t.layers_restored) == (2, ("c/0",), ())


def test_the_ends_go_with_the_outer_layers():
    old, new = plan({"a/0": (0, 6)}), plan({"b/0": (0, 6)})
    t = transition(old, new, topology("a/0", "b/0"), DIMS)
    assert t.size_bytes == STATE_BYTES_PER_PARAMETER * total_parameters(DIMS)
    assert moved(t) == [("a/0", "b/0", (0, 6))]


def test_a_tied_matrix_moves_to_whoever_becomes_an_end_and_had_none():
    there = topology("a/0", "b/0", "c/0")
    old = plan({"a/0": (0, 2), "b/0": (2, 4), "c/0": (4, 6)})
    t = transition(old, plan({"a/0": (0, 2), "b/0": (2, 6)}), there, TIED)
    assert [m for m in t.moves if m.layers is None] == [Move("a/0", "b/0", None, TOKENS)]
    turned = transition(old, plan({"c/0": (0, 4), "a/0": (4, 6)}), there, TIED)
    assert None not in [m.layers for m in turned.moves]
    assert transition(old, plan({"a/0": (0, 6)}), there, TIED).layers_moved == 4


def test_the_same_node_comes_before_the_fastest_link():
    old = plan({"far/0": (0, 6)}, {"near/0": (0, 6)})
    new = plan({"far/0": (0, 6)}, {"near/1": (0, 6)})
    slow_inside = {("near", "near"): Link(1.0, 1e6)}
    t = transition(old, new, topology("far/0", "near/0", "near/1", node_links=slow_inside), DIMS)
    assert moved(t) == [("near/0", "near/1", (0, 6))]
    assert t.out_bytes == {}


def test_without_a_holder_on_the_node_the_nearest_sends():
    old = plan({"x.a/0": (0, 6)}, {"y.b/0": (0, 6)})
    new = plan({"x.a/0": (0, 6)}, {"y.c/0": (0, 6)})
    wan = {(a, b): Link(0.1, 1e7) for a, b in (("x", "y"), ("y", "x"))}
    t = transition(old, new, topology("x.a/0", "y.b/0", "y.c/0", region_links=wan), DIMS)
    assert moved(t) == [("y.b/0", "y.c/0", (0, 6))]
    assert t.between_bytes == {}


def test_equal_sources_share_the_sending():
    replicas = [{f"r{i}/0": (0, 6)} for i in range(3)]
    names = "r0/0", "r1/0", "r2/0", "new/0"
    t = transition(plan(*replicas), plan(*replicas, {"new/0": (1, 5)}), topology(*names), DIMS)
    assert sorted(t.out_bytes) == ["r0", "r1", "r2"]
    assert max(t.out_bytes.values()) == 2 * LAYER


@pytest.mark.parametrize(
    ("there", "lost"), [(["b/0", "c/0"], []), (["a/0", "b/0", "c/0"], ["a/0"])]
)
def test_what_no_live_device_holds_comes_from_the_checkpoint(there, lost):
    old = plan({"a/0": (0, 3), "b/0": (3, 6)})
    t = transition(old, plan({"c/0": (0, 3), "b/0": (3, 6)}), topology(*there), DIMS, lost)
    assert moved(t) == [(None, "c/0", (0, 3))]
    assert t.layers_restored == (0, 1, 2)
    assert t.out_bytes == {}
    assert t.in_bytes == {"c": t.size_bytes}
    assert t.seconds > 0


def test_a_restarted_device_is_filled_again_where_it_stands():
    p = plan({"a/0": (0, 3), "b/0": (3, 6)}, {"c/0": (0, 3), "d/0": (3, 6)})
    t = transition(p, p, topology("a/0", "b/0", "c/0", "d/0"), DIMS, lost=["d/0"])
    assert moved(t) == [("b/0", "d/0", (3, 6))]


def test_one_who_leaves_can_still_give_its_state_away():
    old = plan({"a/0": (0, 3), "b/0": (3, 6)})
    t = transition(old, plan({"a/0": (0, 6)}), topology("a/0", "b/0"), DIMS)
    assert moved(t) == [("b/0", "a/0", (3, 6))]
    assert t.layers_restored == ()


def test_seconds_of_one_stream():
    link = Link(0.05, 1e8, 16.6e6)
    old, new = plan({"a/0": (0, 6)}), plan({"a/0": (0, 3), "b/0": (3, 6)})
    t = transition(old, new, topology("a/0", "b/0", node_links={("a", "b"): link}), DIMS)
    assert t.seconds == pytest.approx(link.transfer_s(t.size_bytes) + link.ramp_s(t.size_bytes))


@pytest.mark.parametrize("shared", ["out", "in", "between"])
def test_streams_share_nics_and_uplinks(shared):
    rate, link = 1e8, Link(0.0, 1e8)
    wan = dict.fromkeys((("x", "y"), ("y", "x")), link)
    names = "x.a/0", "x.b/0", "y.c/0", "y.c/1", "y.d/0"
    wide, narrow = Uplink(1e12, 1e12), Uplink(rate, rate)
    targets = ("y.c/0", "y.c/1") if shared == "in" else ("y.c/0", "y.d/0")
    old = plan({"x.a/0": (0, 3), "x.b/0": (3, 6)})
    if shared == "out":
        old = plan({"x.a/0": (0, 6)})
    uplinks = dict.fromkeys(("x.a", "x.b", "y.c", "y.d"), wide)
    more = {"region_uplinks": {("x", "y"): rate}} if shared == "between" else {}
    if shared != "between":
        uplinks["x.a" if shared == "out" else "y.c"] = narrow
    new = plan({targets[0]: (0, 3), targets[1]: (3, 6)})
    t = transition(old, new, topology(*names, region_links=wan, node_uplinks=uplinks, **more), DIMS)
    assert len(t.moves) == 2
    assert t.seconds == pytest.approx(t.size_bytes / rate)
    assert t.between_bytes == {("x", "y"): t.size_bytes}


def test_a_plan_on_devices_that_are_not_there_is_refused():
    old = plan({"a/0": (0, 6)})
    with pytest.raises(PlanError, match=r"\['b/0'\]; plan again"):
        transition(old, plan({"b/0": (0, 6)}), topology("a/0"), DIMS)


DEVICES = [f"{r}.{n}/{i}" for r in "xy" for n in "mno" for i in range(2)]


@st.composite
def plans(draw) -> Plan:
    order = draw(st.permutations(DEVICES))
    pipelines = []
    for _ in range(draw(st.integers(1, 3))):
        inner = sorted(draw(st.sets(st.integers(1, DIMS.layers - 1), max_size=3)))
        cut = [0, *inner, DIMS.layers]
        pipelines.append({order.pop(): run for run in pairwise(cut)})
    return plan(*pipelines)


@given(plans(), plans(), st.sets(st.sampled_from(DEVICES), max_size=6), st.booleans())
def test_exactly_what_is_missing_moves_from_live_holders(old, new, dead, tied):
    dims = TIED if tied else DIMS
    used = {d.id for d in new.devices}
    there = topology(*(d for d in DEVICES if d not in dead or d in used))
    t = transition(old, new, there, dims, lost=sorted(dead & used))

    def pieces(p: Plan) -> dict[str, set[object]]:
        return {
            s.device: {*range(*s.layers)}
            | ({"tokens"} if tied and (s.layers[0] == 0 or s.layers[1] == dims.layers) else set())
            for pipeline in p.pipelines
            for s in pipeline.stages
        }

    held = {d: got for d, got in pieces(old).items() if d not in dead}
    missing = {d: need - held.get(d, set()) for d, need in pieces(new).items()}
    received: dict[str, set[object]] = {d: set() for d in missing}
    for m in t.moves:
        what = {"tokens"} if m.layers is None else {*range(*m.layers)}
        assert not what & received[m.target]
        received[m.target] |= what
        if m.source is None:
            assert not any(what & got for got in held.values())
        else:
            assert what <= held[m.source]
    assert received == missing
    node = {d.id: d.node for d in there.devices}
    across = [m for m in t.moves if m.source is None or node[m.source] != node[m.target]]
    assert sum(t.in_bytes.values()) == sum(m.size_bytes for m in across)
    assert sum(t.out_bytes.values()) == sum(m.size_bytes for m in across if m.source is not None)
    assert math.isfinite(t.seconds)
    assert (t.seconds > 0) == bool(t.moves)
