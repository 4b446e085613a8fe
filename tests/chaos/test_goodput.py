"""What is counted of a run under a spot trace."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_train_geo.chaos.goodput import Goodput, Presence, Rates, goodput, phases


def generation(number: int, workers: int) -> dict[str, Any]:
    return {"generation": number, "workers": [{}] * workers}


def steps(first: int, began_s: float, step_s: float, count: int, number: int) -> list[Any]:
    return [
        {
            "step": first + i,
            "time": began_s + (i + 1) * step_s,
            "step_s": step_s,
            "generation": number,
            "tokens": 10,
        }
        for i in range(count)
    ]


def test_who_is_there_when() -> None:
    found = phases([Presence("a", 0), Presence("b", 12, 15), Presence("c", 15, 99)], 10, 20)
    assert found == [
        (10, 12, frozenset("a")),
        (12, 15, frozenset("ab")),
        (15, 20, frozenset("ac")),
    ]


def test_rates_are_medians_and_lines_between() -> None:
    records = [*steps(1, 0, 1.0, 9, 1), *steps(10, 0, 9.0, 1, 1), *steps(11, 0, 0.25, 9, 2)]
    records += steps(20, 0, 0.001, 4, 3)  # too few
    rates = Rates.of(records, [generation(1, 1), generation(2, 3), generation(3, 4)])
    assert rates.measured == {1: 1.0, 3: 4.0}
    assert [rates.at(n) for n in (0, 1, 2, 3, 6)] == [0.0, 1.0, 2.5, 4.0, 8.0]
    assert Rates({}).at(3) == 0


def test_more_devices_are_never_slower() -> None:
    """Two rates that fall share one, by the time that each was trained."""
    records = [*steps(1, 0, 1.0, 10, 1), *steps(1, 0, 2.0, 15, 2), *steps(1, 0, 0.5, 6, 3)]
    rates = Rates.of(records, [generation(n, n) for n in (1, 2, 3)])
    shared = (10 * 1.0 + 30 * 0.5) / 40
    assert rates.measured == pytest.approx({1: shared, 2: shared, 3: 2.0})


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=8))
def test_rates_never_fall_and_keep_what_was_done(times: list[float]) -> None:
    records = [r for n, s in enumerate(times, 1) for r in steps(1, 0, s, 5, n)]
    rates = Rates.of(records, [generation(n, n) for n, _ in enumerate(times, 1)])
    found = list(rates.measured.values())
    assert all(a <= b * (1 + 1e-9) for a, b in pairwise(found))
    done = sum(rate * 5 * s for rate, s in zip(found, times, strict=True))
    assert done == pytest.approx(5 * len(times))


def run(records: list[Any], generations: list[Any], presences: list[Presence], **more: Any) -> Any:
    given = {"until_s": 101.0, "devices_per_node": 1, "started_s": -10.0, "interval": 0, **more}
    return goodput(records, generations, presences, **given)


def test_undisturbed_is_all() -> None:
    found = run(steps(1, 0, 1.0, 101, 1), [generation(1, 2)], [Presence("a", 0), Presence("b", 0)])
    assert found.share == pytest.approx(1.0)
    assert (found.steps, found.tokens, found.seconds) == (100, 1000, 100)
    assert found.mean_devices == 2
    assert (found.stopped_steps, found.unused_steps, found.restarted_steps) == (0, 0, None)
    assert found.restart_s == pytest.approx(11)
    json.dumps(found.to_json(), allow_nan=False)


def test_pauses_and_devices_that_are_not_in_use() -> None:
    """Two devices, then b goes: 10 s pause; then c is up for 20 s before it trains."""
    records = [
        *steps(1, 0, 0.5, 80, 1),  # to 40 s
        *steps(81, 49, 1.0, 31, 2),  # from 49 s to 80 s on one device
        *steps(112, 80, 0.5, 42, 3),  # and to 101 s on two again
    ]
    generations = [generation(1, 2), generation(2, 1), generation(3, 2)]
    presences = [Presence("a", 0), Presence("b", 0, 40.0), Presence("c", 60.0)]
    found = run(records, generations, presences)
    assert found.rates == {1: 1.0, 2: 2.0}
    possible = 2 * 39.5 + 20 + 2 * 41
    assert found.undisturbed_steps == pytest.approx(possible)
    assert found.steps == 152
    assert found.stopped_steps == pytest.approx(9)
    assert found.unused_steps == pytest.approx(20)
    assert found.share == pytest.approx(152 / possible)


def test_nothing_committed_is_no_goodput() -> None:
    assert run([], [], [Presence("a", 0)]) is None
    assert run(steps(1, 0, 1.0, 3, 1), [generation(1, 1)], [Presence("a", 0)]) is None


def restarted(presences: list[Presence], interval: int = 20) -> Goodput:
    """One step a second and device from 1 s to 101 s; a restart takes 11 s."""
    records = [*steps(1, 0, 1.0, 50, 1), *steps(51, 50, 0.5, 102, 2)]
    found = run(records, [generation(1, 1), generation(2, 2)], presences, interval=interval)
    assert isinstance(found, Goodput)
    return found


def test_checkpoint_and_restart_without_a_change() -> None:
    assert restarted([Presence("a", 0)]).restarted_steps == pytest.approx(100)


def test_checkpoint_and_restart_loses_what_is_not_saved() -> None:
    """At 51 s 50 steps on a device are done, 40 of them saved; 11 s later it goes on."""
    found = restarted([Presence("a", 0, 51), Presence("b", 51)])
    assert found.restarted_steps == pytest.approx(40 + 101 - 51 - 11)


def test_checkpoint_and_restart_takes_in_who_pays() -> None:
    long = restarted([Presence("a", 0), Presence("b", 51)])
    assert long.restarted_steps == pytest.approx(50 + 2 * (50 - 11))
    short = restarted([Presence("a", 0), Presence("b", 90)])
    assert short.restarted_steps == pytest.approx(100), "it waits for a better moment"


def test_checkpoint_and_restart_waits_for_nodes() -> None:
    """20 of 30 steps are saved; nobody is there from 31 s to 51 s."""
    found = restarted([Presence("a", 0, 31), Presence("b", 51)])
    assert found.restarted_steps == pytest.approx(20 + 50 - 11)
    joined = restarted([Presence("a", 0, 31), Presence("b", 31), Presence("c", 35)])
    assert joined.restarted_steps == pytest.approx(20 + 2 * (70 - 11)), "c comes as b starts"
