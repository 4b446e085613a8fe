from __future__ import annotations

from itertools import chain

import pytest
from search_cases import job, problem, regions

from ray_train_geo.planning.constructions import Sketch, candidates, sketches
from ray_train_geo.planning.evaluate import Evaluator


def test_along_and_across():
    along = Sketch(((0, 1, 2, 3, 4), (5, 6)), (2, 2), False, 0.0)
    assert along.chains() == ([(0, 1), (2, 3), (5, 6)], [4])
    across = Sketch(((0, 1, 2, 3, 4), (5, 6)), (2, 2), True, 0.0)
    assert across.chains() == ([(0, 2), (1, 3), (5, 6)], [4])


def test_across_whole_nodes():
    node = [d // 4 for d in range(12)]
    across = Sketch((tuple(range(12)),), (4,), True, 0.0)
    first, second, *more = across.on_whole_nodes(node)
    assert first == [(3, 0, 4, 8), (7, 1, 5, 9), (11, 2, 6, 10)]
    assert second == [(0, 3, 4, 8), (1, 7, 5, 9), (2, 11, 6, 10)]
    assert len(more) == 2
    fits = Sketch((tuple(range(12)),), (3,), True, 0.0)
    along = Sketch((tuple(range(12)),), (4,), False, 0.0)
    assert not [*fits.on_whole_nodes(node), *along.on_whole_nodes(node)]


def test_left_over_devices_make_pipelines_of_their_own_or_none():
    here = problem(regions((3, 3)))
    sketch = Sketch(((0, 1, 2), (3, 4, 5)), (2, 2), False, 0.0)
    found = [[c.devices for c in plan] for plan in candidates(here, sketch)]
    assert found == [[(0, 1), (3, 4), (2, 5)], [(0, 1), (3, 4)]]


@pytest.mark.parametrize(
    ("wish", "check"),
    [
        ({"stages": 3}, lambda plan: {len(c.devices) for c in plan} == {3}),
        ({"pipelines": 2}, lambda plan: len(plan) == 2),
        ({"layers": [[0, 5, 12]]}, lambda plan: {c.cut for c in plan} == {(0, 5, 12)}),
    ],
)
def test_what_the_job_fixes_is_obeyed(wish, check):
    here = problem(regions((4, 4)), job(**wish))
    found = [
        plan for sketch in sketches(Evaluator(here), range(8)) for plan in candidates(here, sketch)
    ]
    assert found
    assert all(check(plan) for plan in found)


def test_no_device_is_used_twice():
    here = problem(regions((3, 2, 2), flops=(5e13, 1e14)))
    for sketch in sketches(Evaluator(here), range(7)):
        for plan in candidates(here, sketch):
            used = list(chain(*(c.devices for c in plan)))
            assert len(set(used)) == len(used)


def test_the_best_sketch_comes_early():
    here = problem(regions((4, 4)))
    evaluate = Evaluator(here)
    steps = []
    for sketch in sketches(evaluate, range(8)):
        found = [e for plan in candidates(here, sketch) if (e := evaluate(plan)) is not None]
        steps += [e.step_s for e in found]
    assert min(steps[: len(steps) // 3]) <= 1.05 * min(steps)
