from __future__ import annotations

from dataclasses import replace
from itertools import chain

from search_cases import NEAR, job, problem, regions

from ray_train_geo.cluster.topology import Link
from ray_train_geo.planning.evaluate import Chain, Evaluator
from ray_train_geo.planning.local_search import improve, polish


def start(evaluator, *devices):
    found = evaluator(tuple(Chain(d) for d in devices))
    assert found is not None
    return found


def test_it_brings_neighbours_together():
    evaluate = Evaluator(problem(regions((4, 4), far=Link(0.2, 1e7)), job(stages=4, pipelines=1)))
    mixed = start(evaluate, (0, 4, 1, 5))
    found = improve(evaluate, mixed, (2, 3, 6, 7), 300, seed=1)
    devices = evaluate.problem.topology.devices
    assert len({devices[d].region for d in found.pipelines[0].devices}) == 1
    assert found.step_s < 0.5 * mixed.step_s


def test_same_seed_same_plan():
    evaluate = Evaluator(problem(regions((3, 3), flops=(5e13, 8e13))))
    first = start(evaluate, (0, 1), (3, 4))
    runs = [improve(evaluate, first, (2, 5), 150, seed=s) for s in (3, 3)]
    assert runs[0].candidate == runs[1].candidate
    assert runs[0].step_s <= first.step_s


def test_spare_devices_are_used():
    evaluate = Evaluator(problem(regions((6,))))
    one = start(evaluate, (0, 1))
    found = improve(evaluate, one, (2, 3, 4, 5), 300, seed=0)
    used = list(chain(*(p.devices for p in found.pipelines)))
    assert len(set(used)) == len(used) > 2
    assert found.step_s < 0.8 * one.step_s


def test_no_time_no_move():
    evaluate = Evaluator(problem(regions((6,))))
    one = start(evaluate, (0, 1))
    assert improve(evaluate, one, (2, 3), 10**9, 0, expired=lambda: True) is one


def test_polish_moves_layers_and_drops_idle_codecs():
    here = problem(regions((4,), near=Link(1e-5, 1e11)), codecs=("none", "int8"))
    evaluate = Evaluator(here)
    bad = evaluate((Chain((0, 1, 2), (0, 1, 2, 12), ("int8", "int8")),))
    assert bad is not None
    found = polish(evaluate, bad)
    assert found.step_s < 0.7 * bad.step_s
    assert found.pipelines[0].codecs == ("none", "none")


def test_all_are_led_from_the_middle():
    far = {("a", "b"): Link(0.05, 1e8), ("b", "c"): Link(0.05, 1e8), ("a", "c"): Link(0.1, 1e8)}
    both = far | {(b, a): link for (a, b), link in far.items()} | {(r, r): NEAR for r in "abc"}
    topology = replace(regions([2, 2, 2]), region_links=both)
    p = problem(topology, job(stages=2))
    ends_first = Evaluator(p)(tuple(Chain((d, d + 1)) for d in (0, 2, 4)))
    assert topology.devices[polish(Evaluator(p), ends_first).pipelines[0].devices[0]].region == "b"
    fixed = problem(topology, job(stages=2, microbatches=[22, 21, 21]))
    start = Evaluator(fixed)(tuple(Chain((d, d + 1)) for d in (0, 2, 4)))
    assert polish(Evaluator(fixed), start).pipelines[0].devices[0] == 0
