from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_train_geo.simulation.fair_share import max_min_rates


@pytest.mark.parametrize(
    ("counts", "limits", "uses", "capacities", "rates"),
    [
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
    ],
)
def test_by_hand(counts, limits, uses, capacities, rates):
    assert max_min_rates(counts, limits, uses, capacities)[0] == pytest.approx(rates)


@given(st.data())
def test_every_flow_has_a_bottleneck(data):
    """The definition: a flow is at its limit, or is a largest one of something that is full."""
    resources, classes = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 8))
    positive = st.floats(0.01, 100)
    counts = data.draw(st.lists(st.integers(1, 4), min_size=classes, max_size=classes))
    limits = data.draw(st.lists(positive, min_size=classes, max_size=classes))
    used = st.sets(st.integers(0, resources - 1)).map(sorted)
    uses = data.draw(st.lists(used, min_size=classes, max_size=classes))
    capacities = data.draw(st.lists(positive, min_size=resources, max_size=resources))
    rates, held_by = max_min_rates(counts, limits, uses, capacities)

    users = [[c for c in range(classes) if r in uses[c]] for r in range(resources)]
    loads = [sum(counts[c] * rates[c] for c in sharers) for sharers in users]
    for load, capacity in zip(loads, capacities, strict=True):
        assert load <= capacity * (1 + 1e-9)
    for c, r in enumerate(held_by):
        assert 0 < rates[c] <= limits[c]
        if r is None:
            assert rates[c] == limits[c]
        else:
            assert r in uses[c]
            assert loads[r] >= capacities[r] * (1 - 1e-9)
            assert rates[c] >= max(rates[d] for d in users[r]) * (1 - 1e-9)
