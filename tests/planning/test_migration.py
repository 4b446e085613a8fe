from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_train_geo.cluster.topology import Device, Topology
from ray_train_geo.planning.evaluate import Chain
from ray_train_geo.planning.migration import Horizon, with_least_moves
from ray_train_geo.planning.problem import Problem
from ray_train_geo.spec import parse_job

SECONDS = st.floats(1e-3, 1e4)
JOB = parse_job(
    {
        "model": {"layers": 8, "dim": 128, "heads": 4},
        "data": {"path": "python://stdlib"},
        "training": {"steps": 1, "global_batch": 16, "microbatch": 2, "seq_len": 128},
    }
)


@given(SECONDS, SECONDS, SECONDS)
def test_the_value_is_time_over_progress(value, migration_s, expected_s):
    alone = Horizon(expected_s).value(value, migration_s)
    assert alone == pytest.approx((expected_s + migration_s) / (expected_s / value))
    assert Horizon(math.inf).value(value, migration_s) == value
    assert Horizon(expected_s).value(value, 0.0) == value


@given(SECONDS, SECONDS, SECONDS, SECONDS)
def test_what_trains_on_meanwhile_counts(value, meanwhile, migration_s, expected_s):
    horizon = Horizon(expected_s, meanwhile)
    overlapped = horizon.value(value, migration_s)
    progress = expected_s / value + migration_s / meanwhile
    assert overlapped == pytest.approx((expected_s + migration_s) / progress)
    assert overlapped <= Horizon(expected_s).value(value, migration_s)
    # A mean of both: moving to something better always gains, to something worse never.
    low, high = sorted((value, meanwhile))
    assert low * (1 - 1e-9) <= overlapped <= high * (1 + 1e-9)


def problem(*devices: Device) -> Problem:
    return Problem.of(Topology(devices), JOB, 257)


def test_twins_change_places_so_that_layers_stay():
    p = problem(*(Device(f"n{i}/0", f"n{i}") for i in range(5)))
    wished = Chain((0, 1), (0, 6, 8)), Chain((2, 3), (0, 5, 8))
    held = {0: (5, 8), 1: (0, 6), 4: (0, 5)}
    found = with_least_moves(wished, p, held)
    assert [c.cut for c in found] == [c.cut for c in wished]
    assert found[0].devices[0] == 1
    assert found[1].devices == (4, 0)
    assert len({d for c in found for d in c.devices}) == 4


def test_devices_that_differ_do_not_change_places():
    p = problem(Device("a/0", "a"), Device("b/0", "b", flops_per_s=1e12))
    wished = (Chain((0, 1), (0, 4, 8)),)
    assert with_least_moves(wished, p, {0: (4, 8), 1: (0, 4)}) == wished
