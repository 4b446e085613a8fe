from __future__ import annotations

from itertools import chain

from search_cases import job, problem, regions

from ray_train_geo.planning.mixed_kinds import mixed_kinds


def test_devices_of_one_kind_are_not_mixed():
    assert list(mixed_kinds(problem(regions((4, 4))), range(8))) == []


def test_a_mix_uses_devices_once_all_together_or_region_by_region():
    here = problem(regions((4, 4), flops=(5e13, 1e14)))
    everyone, apart = mixed_kinds(here, range(8))
    for plan in (everyone, apart):
        used = list(chain(*(c.devices for c in plan)))
        assert len(set(used)) == len(used) >= 7
    assert all(len({here.table.region[d] for d in c.devices}) == 1 for c in apart)


def test_a_fixed_number_of_pipelines_is_kept_or_nothing_is_mixed():
    here = problem(regions((4, 4), flops=(5e13, 1e14)), job(pipelines=3))
    assert all(len(plan) == 3 for plan in mixed_kinds(here, range(8)))
