from __future__ import annotations

from itertools import chain, pairwise

import pytest
from search_cases import job, problem, regions

from ray_train_geo.cluster.topology import Link
from ray_train_geo.planning.geography import distances_s, islands, walk
from ray_train_geo.planning.lines import lines

NEAR, FAR = Link(0.01, 1e9), Link(0.1, 1e8)


def two_continents():
    """a and c are near each other, and so are b and d."""
    topology = regions((2, 2, 2, 2), far=FAR)
    near = {(r, q): NEAR for pair in ("ac", "bd") for r, q in (pair, pair[::-1])}
    return problem(topology.__class__(topology.devices, region_links=topology.region_links | near))


def test_the_walk_crosses_the_ocean_once():
    away = distances_s(two_continents())
    path = walk(away)
    assert sorted(path[:2]) in ([0, 2], [1, 3])
    crossing = [away[a, b] for a, b in pairwise(path)]
    assert sum(x == away.max() for x in crossing) == 1


def test_islands_grow_from_regions_to_all():
    away = distances_s(two_continents())
    found = islands(away, [0, 2, 1, 3])
    assert found == [[[0], [2], [1], [3]], [[0, 2], [1, 3]], [[0, 2, 1, 3]]]


def test_lines_hold_a_device_at_most_once():
    here = problem(regions((3, 2), flops=(5e13, 1e14)))
    found = list(lines(here, range(5), None))
    assert len(found) == len(set(found))
    assert ((0, 1, 2), (3, 4)) in found or ((3, 4), (0, 1, 2)) in found
    for line in found:
        members = list(chain(*line))
        assert len(set(members)) == len(members)
    everyone = [line for line in found if sum(map(len, line)) == 5]
    assert everyone
    assert any(set(chain(*line)) == {3, 4} for line in found), "without the slow ones"


def test_no_more_devices_than_allowed():
    here = problem(regions((3, 2), flops=(5e13, 1e14)))
    first = next(lines(here, range(5), 2))
    assert sorted(chain(*first)) == [3, 4], "the fastest two"


@pytest.mark.parametrize("limit", [5.0, 10.0])
def test_no_more_dollars_than_allowed(limit):
    here = problem(regions((3, 2), flops=(5e13, 1e14)), job(), max_dollars_per_hour=limit)
    first = next(lines(here, range(5), None))
    price = sum(here.topology.devices[d].price_per_hour for d in chain(*first))
    assert 0 < price <= limit
