from __future__ import annotations

import random

import pytest
from search_cases import job, problem, regions

from ray_train_geo.cluster.topology import Link
from ray_train_geo.planning.draft import draft
from ray_train_geo.planning.evaluate import Chain, Evaluator
from ray_train_geo.spec import CodecSpec


def chains(*devices):
    return tuple(Chain(d) for d in devices)


def test_the_closed_form_is_near_the_engine():
    rng = random.Random(7)
    ratios = []
    for trial in range(12):
        far = Link(rng.uniform(0.0, 0.1), rng.uniform(5e7, 1e9))
        here = problem(regions((4, 4), far=far), job(batch=64), codecs=("none", "int8"))
        order = rng.sample(range(8), 8)
        depth = (2, 4, 8)[trial % 3]
        plan = chains(*(tuple(order[i : i + depth]) for i in range(0, 8, depth)))
        found = Evaluator(here)(plan)
        assert found is not None
        ratios.append(draft(here, found).predicted_step_s / found.step_s)
    assert sorted(ratios)[6] == pytest.approx(1, abs=0.03)
    assert min(ratios) > 0.9
    assert max(ratios) < 1.25


def test_fast_pipelines_get_more_microbatches():
    here = problem(regions((1, 1), flops=(5e13, 1e14)))
    found = Evaluator(here)(chains((0,), (1,)))
    assert found is not None
    assert sum(found.microbatches) == 64
    assert found.microbatches[1] > 1.8 * found.microbatches[0]


def test_what_does_not_fit_is_none():
    here = problem(regions((2,)), job("gpt3-6.7b"))
    assert Evaluator(here)(chains((0, 1))) is None
    here = problem(regions((4,)), job(batch=2))
    assert Evaluator(here)(chains((0,), (1,), (2,))) is None
    here = problem(regions((2,)), max_dollars_per_hour=1.0)
    assert Evaluator(here)(chains((0, 1))) is None


def test_dollars_count_every_device():
    cheap = problem(regions((2,)), objective="dollars")
    one, two = Evaluator(cheap)(chains((0,))), Evaluator(cheap)(chains((0,), (1,)))
    assert one is not None
    assert two is not None
    tokens = 64 * 1024
    assert one.value == pytest.approx(2.5 / 3600 * one.step_s / (tokens / 1e6))
    assert two.value == pytest.approx(5.0 / 3600 * two.step_s / (tokens / 1e6))
    assert two.step_s < one.step_s


def test_a_slow_hop_gets_a_codec_and_a_fast_one_none():
    here = problem(regions((1, 2), far=Link(0.001, 2e7)), codecs=("none", "int8", "int4"))
    found = Evaluator(here)(chains((0, 1, 2)))
    assert found is not None
    assert found.pipelines[0].codecs[0] != "none"
    assert found.pipelines[0].codecs[1] == "none"


def test_pipelines_alike_are_computed_once():
    here = problem(regions((8,)))
    evaluate = Evaluator(here)
    found = evaluate(chains((0, 1), (2, 3), (4, 5)))
    assert found is not None
    assert [p.devices for p in found.pipelines] == [(0, 1), (2, 3), (4, 5)]
    assert len({p.lines for p in found.pipelines}) == 1


def test_encoded_gradients_take_less_time_and_one_holder_a_sum():
    far = Link(0.01, 1e8)
    plain = job(batch=64)
    coded = plain.model_copy(update={"codecs": CodecSpec(gradients="int8")})
    steps = []
    for asked in (plain, coded):
        here = problem(regions((1, 1), far=far), asked)
        found = Evaluator(here)((Chain((0,)), Chain((1,))))
        assert found is not None
        steps.append(found.step_s)
    assert steps[1] < steps[0]
    assert here.modes == ("sharded_ps", "central_ps")
