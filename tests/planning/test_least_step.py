from __future__ import annotations

from certify_cases import MODES, SCHEDULES, plans, problem, topologies
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_train_geo.planning.least_step import least_step_s
from ray_train_geo.planning.predict import predict


@settings(max_examples=40)
@given(st.data(), topologies(), st.sampled_from(SCHEDULES), st.sampled_from(MODES))
def test_the_engine_never_predicts_less(data, topology, schedule, mode):
    p = problem(topology, tied=data.draw(st.booleans()), parallelism={"schedule": schedule})
    found = data.draw(plans(p))
    least_s = least_step_s(p, found, mode)
    assert 0 < least_s <= predict(p, found, schedule, mode).step_s * (1 + 1e-9)
