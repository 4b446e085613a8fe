"""What processes hold is compared between generations in which they have the same links."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

from ray_train_geo.chaos.census import Census

WHOLE = [(0, [0, 4]), (1, [0, 4]), (2, [0, 4])]
SPLIT = [(0, [0, 4]), (1, [0, 2]), (1, [2, 4])]


def generation(number: int, stages: list[tuple[int, list[int]]]) -> Any:
    """As a run tells it; this process has rank 0, and the others are gone."""
    pids = [os.getpid(), *range(2**22 + 1, 2**22 + len(stages))]  # Linux gives none of these
    workers = [
        {"pid": pids[rank], "rank": rank, "pipeline": pipeline, "layers": layers}
        for rank, (pipeline, layers) in enumerate(stages)
    ]
    event = {"generation": number, "workers": workers}
    return SimpleNamespace(generation=event, coordinator_pid=None)


def test_another_plan_has_other_links() -> None:
    census = Census()
    for number, plan in enumerate([WHOLE, SPLIT], start=1):
        census.take(generation(number, plan))
    assert census.checks() == [], "the same layers among as many, and yet another number of links"


def test_descriptors_that_stay_are_told() -> None:
    census, opened = Census(), []
    try:
        for number in range(1, 4):
            census.take(generation(number, WHOLE))
            opened += [os.open(os.devnull, os.O_RDONLY) for _ in range(3)]
    finally:
        for descriptor in opened:
            os.close(descriptor)
    threads, descriptors = census.checks()
    assert threads.passed, threads.detail
    assert not descriptors.passed
    assert "+6" in descriptors.detail
    assert "rank 0 of layers 0-4 | 0-4 | 0-4" in descriptors.detail


def test_what_is_under_way_for_a_moment_is_no_growth() -> None:
    census = Census()
    for number in range(1, 10):
        opened = [os.open(os.devnull, os.O_RDONLY) for _ in range(5 if number in (5, 9) else 0)]
        census.take(generation(number, WHOLE))
        for descriptor in opened:
            os.close(descriptor)
    _, descriptors, _ = census.checks()
    assert descriptors.passed, descriptors.detail


def test_a_slow_leak_is_told() -> None:
    census, opened = Census(), []
    try:
        for number in range(1, 13):
            census.take(generation(number, WHOLE))
            if number % 2:
                opened.append(os.open(os.devnull, os.O_RDONLY))
    finally:
        for descriptor in opened:
            os.close(descriptor)
    _, descriptors, _ = census.checks()
    assert not descriptors.passed
    assert "+4" in descriptors.detail
