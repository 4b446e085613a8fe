from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_train_geo.simulation.fair_share import FlowClass, Resource, share_anew


def shared(counts, limits, uses, capacities, seed=None):
    """Resources and classes with rates shared: all at once, or class by class in random order."""
    resources = [Resource(capacity) for capacity in capacities]
    classes = [
        FlowClass(number, limit, [resources[r] for r in used])
        for number, (limit, used) in enumerate(zip(limits, uses, strict=True))
    ]
    order = [[c] for c in range(len(classes))]
    if seed is None:
        order = [list(range(len(classes)))]
    else:
        random.Random(seed).shuffle(order)
    for some in order:
        moved: dict[Resource, None] = {}
        for c in some:
            classes[c].under_way = [(1.0, flow) for flow in range(counts[c])]
            classes[c].recount(moved)
        share_anew(moved, 0.0, {})
        assert not moved
    return resources, classes


CASES = [
    # The docstring's picture.
    ([2, 1, 1], [9.0, 2.0, 4.0], [[0], [0, 1], [1]], [10.0, 6.0], [4.0, 2.0, 4.0]),
    # Equal shares, whatever the limits allow.
    ([4], [10.0], [[0]], [10.0], [2.5]),
    # A flow limited by its own link leaves the rest to the other.
    ([1, 1], [2.0, 10.0], [[0], [0]], [10.0], [2.0, 8.0]),
    # A long flow over two links shares each with a short one (the textbook's chain).
    ([1, 1, 1], [9.0, 9.0, 9.0], [[0, 1], [0], [1]], [2.0, 6.0], [1.0, 1.0, 5.0]),
    # Nothing to share.
    ([1, 3], [2.0, 5.0], [[], []], [], [2.0, 5.0]),
    # A resource that nobody uses.
    ([1], [2.0], [[1]], [1.0, 1.0], [1.0]),
]


@pytest.mark.parametrize("seed", [None, 0, 1])
@pytest.mark.parametrize(("counts", "limits", "uses", "capacities", "rates"), CASES)
def test_by_hand(counts, limits, uses, capacities, rates, seed):
    _, classes = shared(counts, limits, uses, capacities, seed)
    assert [c.rate for c in classes] == pytest.approx(rates)


def test_a_level_is_what_those_get_who_are_held_back():
    resources, _ = shared(*CASES[0][:4])
    assert [r.level for r in resources] == pytest.approx([4.0, math.inf])
    resources, _ = shared(*CASES[3][:4])
    assert [r.level for r in resources] == pytest.approx([1.0, 5.0])


def test_who_leaves_gives_back_what_it_had():
    resources, classes = shared(*CASES[3][:4])
    moved: dict[Resource, None] = {}
    touched: dict[FlowClass, None] = {}
    classes[1].under_way = []
    classes[1].recount(moved)
    share_anew(moved, 4.0, touched)
    assert [classes[0].rate, classes[2].rate] == pytest.approx([2.0, 4.0])
    assert [r.load for r in resources] == pytest.approx([2.0, 6.0])
    # Served at the old rates until then.
    assert list(touched) == [classes[0], classes[2]]
    assert [c.served for c in touched] == pytest.approx([4.0, 20.0])


@given(st.data())
def test_every_flow_has_a_bottleneck(data):
    """The definition: a flow is at its limit, or is a largest one of something that is full."""
    resources, classes = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 8))
    # Round numbers too: levels that are equal must not chase each other.
    positive = st.floats(0.01, 100) | st.sampled_from([0.3, 1.0, 3.0])
    counts = data.draw(st.lists(st.integers(1, 4), min_size=classes, max_size=classes))
    limits = data.draw(st.lists(positive, min_size=classes, max_size=classes))
    used = st.sets(st.integers(0, resources - 1)).map(sorted)
    uses = data.draw(st.lists(used, min_size=classes, max_size=classes))
    capacities = data.draw(st.lists(positive, min_size=resources, max_size=resources))
    _, found = shared(counts, limits, uses, capacities, data.draw(st.none() | st.integers(0, 9)))
    rates = [c.rate for c in found]

    users = [[c for c in range(classes) if r in uses[c]] for r in range(resources)]
    loads = [sum(counts[c] * rates[c] for c in sharers) for sharers in users]
    for load, capacity in zip(loads, capacities, strict=True):
        assert load <= capacity * (1 + 1e-8)
    for c, rate in enumerate(rates):
        assert 0 < rate <= limits[c]
        assert rate == limits[c] or any(
            loads[r] >= capacities[r] * (1 - 1e-8)
            and rate >= max(rates[d] for d in users[r]) * (1 - 1e-8)
            for r in uses[c]
        )
