from __future__ import annotations

import numpy as np

from ray_train_geo.planning.certify_reach import Reach
from ray_train_geo.planning.certify_sync import components

# Sites 0 and 1 are near each other, and so are 2 and 3; a message to the other pair takes 0.1 s.
HOPS_S = np.full((4, 4), 0.1)
HOPS_S[:2, :2] = HOPS_S[2:, 2:] = 0.01
np.fill_diagonal(HOPS_S, 0.001)


def islands(message_s, makeup=(0, 0, 0, 0), meet=(True,) * 4, least_s=0.0):
    reach = Reach(components(HOPS_S), makeup, meet, least_s)
    number, sites = reach.islands(np.array(message_s))
    return [(n, tuple(np.flatnonzero(row).tolist())) for n, row in zip(number, sites, strict=True)]


def test_slow_hops_join_sites_only_for_pipelines_of_few_microbatches():
    makeup = (0, 1, 2, 3)
    assert islands([0.005], makeup) == [(0, (0,)), (0, (1,)), (0, (2,)), (0, (3,))]
    assert islands([0.02, 0.5], makeup) == [(0, (0, 1)), (0, (2, 3)), (1, (0, 1, 2, 3))]


def test_islands_of_equal_devices_are_one():
    assert islands([0.005]) == [(0, (0, 1, 2, 3))]
    assert islands([0.02], (0, 1, 1, 0)) == [(0, (0, 1, 2, 3))]
    assert islands([0.02], (0, 1, 0, 0)) == [(0, (0, 1)), (0, (2, 3))]


def test_islands_that_miss_what_all_must_pass_are_out():
    assert islands([0.02], meet=(True, False, False, False)) == [(0, (0, 1))]


def test_who_must_hop_far_needs_time_for_it():
    assert islands([0.05, 0.2], least_s=0.1) == [(1, (0, 1, 2, 3))]
    assert islands([0.05], least_s=0.1) == []


def test_many_kinds_of_islands_are_looked_at_as_one():
    hops_s = np.full((9, 9), 0.1)
    np.fill_diagonal(hops_s, 0.001)
    reach = Reach(components(hops_s), range(9), (True,) * 9)
    assert reach.islands(np.array([0.01]))[1].tolist() == [[True] * 9]
