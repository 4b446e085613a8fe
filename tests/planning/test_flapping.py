from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from ray_train_geo.planning.flapping import Flapping


def test_the_first_loss_costs_nothing_and_each_further_one_more() -> None:
    nodes, now_s, waits = Flapping(), 0.0, []
    for _ in range(11):
        nodes.came("a", now_s)
        waits.append(nodes.went("a", now_s))
        now_s += waits[-1]
        assert not nodes.kept_out("a", now_s)
        assert waits[-1] == 0 or nodes.kept_out("a", now_s - 0.1)
    assert waits == [0, 1, 3, 7, 15, 31, 63, 127, 255, 300, 300]
    assert not nodes.kept_out("b", 0.0)


def test_a_long_stay_is_forgiveness() -> None:
    nodes = Flapping()
    for _ in range(4):
        nodes.went("a", 0.0)
    nodes.came("a", 100.0)
    nodes.came("a", 9000.0)  # another of its devices
    assert nodes.went("a", 100.0 + 4 * 300.0) == 0.0


def test_losses_are_told_in_order_to_prefer_who_had_none() -> None:
    nodes = Flapping()
    assert nodes.losses("a") == 0
    nodes.went("a", 0.0)
    nodes.went("a", 0.0)
    nodes.went("b", 0.0)
    assert [nodes.losses(node) for node in ("a", "b", "c")] == [2, 1, 0]


@given(st.lists(st.floats(0.0, 20.0), min_size=1, max_size=80))
def test_a_flapping_node_comes_back_less_and_less(stays: list[float]) -> None:
    """However it flaps, it is taken in about log2(T) times, and then every five minutes."""
    nodes, now_s, taken_in = Flapping(), 0.0, 0
    for stay_s in stays:
        nodes.came("a", now_s)
        taken_in += 1
        now_s += stay_s
        now_s += nodes.went("a", now_s)
    assert taken_in <= 3 + 2 * math.log2(1 + now_s + 1) + now_s / 150
