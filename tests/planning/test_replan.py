from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_train_geo.cluster.topology import Device, Link, Topology, Uplink
from ray_train_geo.errors import PlanError
from ray_train_geo.planning.budget import Budget
from ray_train_geo.planning.plan import Plan
from ray_train_geo.planning.planner import search
from ray_train_geo.planning.problem import PlanOptions, Problem
from ray_train_geo.planning.replan import ReplanResult, replan
from ray_train_geo.planning.transition import transition
from ray_train_geo.planning.validate import validate_plan
from ray_train_geo.spec import JobSpec, parse_job

LAYERS = 8
FAST = PlanOptions(moves=0)
GB = 10**9


def job(parallelism=None, scaling=None, **training) -> JobSpec:
    return parse_job(
        {
            "model": {"layers": LAYERS, "dim": 512, "heads": 8},
            "data": {"path": "python://stdlib"},
            "training": {"steps": 1, "global_batch": 24, "microbatch": 1, "seq_len": 512}
            | training,
            "parallelism": parallelism or {},
            "scaling": scaling or {},
            "failure": {"memory_copies": 0},  # memory is for layers: what fits is easy to see
        }
    )


SLOW = {("here", "here"): Link(0.01, 2e7)}
QUICK = {("here", "here"): Link(1e-4, 1e9)}


def machines(count: int, first: int = 0, **changes) -> tuple[Device, ...]:
    usual = {"region": "here", "flops_per_s": 1e12, "memory_bytes": 2 * GB}
    return tuple(
        Device(f"n{i}/0", f"n{i}", **(usual | changes)) for i in range(first, first + count)
    )


def geography(seed: int) -> Topology:
    """4 to 10 devices of three kinds in up to three regions."""
    rng = random.Random(seed)
    kinds = {"fast": (4e12, 4 * GB), "usual": (1e12, 2 * GB), "small": (1e12, 6 * GB // 10)}
    devices: list[Device] = []
    regions = "abc"[: rng.randint(1, 3)]
    for n in range(rng.randint(3, 5)):
        region, kind = rng.choice(regions), rng.choice(sorted(kinds))
        flops, memory = kinds[kind]
        devices += (
            Device(
                f"{region}{n}/{i}",
                f"{region}{n}",
                region=region,
                type=f"cpu-{kind}",
                flops_per_s=flops,
                memory_bytes=memory,
            )
            for i in range(rng.randint(1, 2))
        )
    links = {
        (a, b): Link(rng.uniform(0.005, 0.1), rng.uniform(2e7, 2e8), 16.6e6)
        for a in regions
        for b in regions
        if a != b
    }
    inside = {(r, r): Link(1e-3, 2.5e8) for r in regions}
    nics = {d.node: Uplink(5e8, 5e8) for d in devices}
    return Topology(tuple(devices), region_links=links | inside, node_uplinks=nics)


def without(topology: Topology, *names: str) -> Topology:
    return topology.with_devices(d for d in topology.devices if d.id not in names)


def plan(topology: Topology, spec: JobSpec, options: PlanOptions = FAST) -> Plan:
    return search(Problem.of(topology, spec, 257, options), Budget())


def stages(p: Plan):
    return [[(s.device, s.layers) for s in pipeline.stages] for pipeline in p.pipelines]


def check(old: Plan, found: ReplanResult, now: Topology, spec: JobSpec) -> None:
    """All that holds of every new plan."""
    validate_plan(found.plan, now, spec)  # cover, batch, memory, one stage a device, all there
    assert found.transition == transition(old, found.plan, now, spec.dims(257))
    if not found.reason.startswith("planned from scratch"):
        there, known = {d.id for d in now.devices}, {d.id for d in old.devices}
        left, taken_in = len(known - there), len({d.id for d in found.plan.devices} - known)
        assert found.transition.layers_moved <= LAYERS * max(1, left, taken_in)


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10**6))
def test_histories_of_joins_and_leaves(seed):
    rng, everyone, spec = random.Random(seed), geography(seed), job()
    names = [d.id for d in everyone.devices]
    big = next((d.id for d in everyone.devices if d.memory_bytes >= GB), None)
    if big is None:
        return  # the model fits nowhere alone
    there = {big, *rng.sample(names, len(names) // 2)}
    current = plan(without(everyone, *set(names) - there), spec)
    for _ in range(rng.randint(5, 8)):
        away, can_leave = sorted(set(names) - there), sorted(there - {big})
        if away and (not can_leave or rng.random() < 0.5):
            there |= set(rng.sample(away, min(len(away), rng.randint(1, 3))))
        else:
            there -= set(rng.sample(can_leave, min(len(can_leave), rng.randint(1, 3))))
        now = without(everyone, *set(names) - there)
        found = replan(current, now, spec, expected_s=1e6)
        check(current, found, now, spec)
        anew = plan(now, spec)
        assert found.plan.predicted_step_s <= 1.5 * anew.predicted_step_s
        current = found.plan


@pytest.mark.parametrize("seed", [0, 1, 5])
def test_the_same_whatever_the_order_of_the_devices_and_however_often(seed):
    everyone, spec = geography(seed), job()
    old = plan(everyone, spec)
    now = without(everyone, old.devices[-1].id)
    turned = now.with_devices(reversed(now.devices))
    first = replan(old, now, spec, moves=50)
    assert first == replan(old, now, spec, moves=50)
    assert first == replan(old, turned, spec, moves=50)


@pytest.mark.parametrize("seed", range(4))
def test_nothing_changes_when_nothing_changed(seed):
    everyone, spec = geography(seed), job()
    old = plan(everyone, spec)
    found = replan(old, everyone, spec)
    assert found.plan is old
    assert found.transition.moves == ()
    assert found.reason.startswith("the plan in force stays")


def test_the_plan_that_stays_says_what_is_predicted_now():
    devices = machines(4)
    old = plan(Topology(devices, region_links=SLOW), job())
    slower = Topology(
        tuple(replace(d, flops_per_s=d.flops_per_s / 2) for d in devices), region_links=SLOW
    )
    found = replan(old, slower, job())
    assert stages(found.plan) == stages(old)
    assert found.plan.predicted_step_s > 1.5 * old.predicted_step_s
    assert found.plan.certificate is not None
    assert found.plan.certificate.value == found.plan.predicted_step_s


def pipelined(count: int, spare: int = 0, **parallelism) -> tuple[Plan, Topology, JobSpec]:
    """Devices that hold four layers each, in pipelines of two or more."""
    everyone = Topology(machines(count + spare, memory_bytes=105 * GB // 100), region_links=QUICK)
    first = everyone.with_devices(everyone.devices[:count])
    spec = job(parallelism)
    return plan(first, spec), everyone, spec


def test_a_spare_device_takes_the_place_of_one_that_left():
    old, everyone, spec = pipelined(4, spare=1, pipelines=2, stages=2)
    gone = old.pipelines[0].stages[1]
    now = without(everyone, gone.device)
    found = replan(old, now, spec)
    check(old, found, now, spec)
    assert stages(found.plan)[1] == stages(old)[1]
    assert stages(found.plan)[0] == [stages(old)[0][0], ("n4/0", gone.layers)]
    assert {m.target for m in found.transition.moves} == {"n4/0"}


def test_neighbours_absorb_the_layers_of_one_that_left():
    spec = job({"pipelines": 1})
    everyone = Topology(machines(4), region_links=QUICK)
    old = plan(everyone, spec)
    assert len(old.pipelines[0].stages) == 4
    gone = old.pipelines[0].stages[1]
    now = without(everyone, gone.device)
    found = replan(old, now, spec)
    check(old, found, now, spec)
    order = [s.device for s in old.pipelines[0].stages if s is not gone]
    assert [s.device for s in found.plan.pipelines[0].stages] == order
    assert found.transition.layers_restored == tuple(range(*gone.layers))


def test_what_is_left_of_a_pipeline_is_dissolved_where_it_can_not_go_on():
    old, everyone, spec = pipelined(6, stages=2)
    assert len(old.pipelines) == 3
    now = without(everyone, old.pipelines[1].stages[0].device)
    found = replan(old, now, spec)
    check(old, found, now, spec)
    assert stages(found.plan) == [stages(old)[0], stages(old)[2]]
    assert found.transition.moves == ()
    assert sum(p.microbatches for p in found.plan.pipelines) == 24


def test_a_new_pipeline_is_founded_of_those_who_join():
    old, everyone, spec = pipelined(4, spare=2, stages=2)
    found = replan(old, everyone, spec)
    check(old, found, everyone, spec)
    assert stages(found.plan)[:2] == stages(old)
    assert {s.device for s in found.plan.pipelines[2].stages} == {"n4/0", "n5/0"}
    assert found.transition.layers_moved == LAYERS


def test_one_who_joins_deepens_a_pipeline_or_takes_the_place_of_a_slow_one():
    devices = (*machines(2), *machines(1, first=2, flops_per_s=1e11))
    old = plan(Topology(devices, region_links=QUICK), job({"pipelines": 1}))
    for more in (machines(1, first=3), machines(1, first=3, flops_per_s=4e12)):
        now = Topology((*devices, *more), region_links=QUICK)
        found = replan(old, now, job({"pipelines": 1}))
        check(old, found, now, job())
        assert "n3/0" in {d.id for d in found.plan.devices}
        assert found.plan.predicted_step_s < 0.9 * old.predicted_step_s


def test_several_leave_and_join_at_once():
    old, everyone, spec = pipelined(8, spare=2, stages=2)
    gone = old.pipelines[0].stages[0].device, old.pipelines[2].stages[1].device
    now = without(everyone, *gone)
    found = replan(old, now, spec)
    check(old, found, now, spec)
    assert found.plan.world_size == 8
    kept = [p for i, p in enumerate(stages(old)) if i in (1, 3)]
    assert all(p in stages(found.plan) for p in kept)


def test_when_all_are_gone_all_comes_from_the_checkpoint():
    old = plan(Topology(machines(2)), job())
    now = Topology(machines(2, first=5))
    found = replan(old, now, job())
    assert "2 left, 2 taken in, 8 layers move" in found.reason
    assert found.transition.layers_restored == tuple(range(LAYERS))
    validate_plan(found.plan, now, job())


def test_one_under_notice_is_not_used_but_gives_its_layers_away():
    old, everyone, spec = pipelined(2, spare=1, pipelines=1, stages=2)
    going = old.pipelines[0].stages[0].device
    found = replan(old, everyone, spec, leaving=[going])
    assert going not in {d.id for d in found.plan.devices}
    assert {m.source for m in found.transition.moves if m.layers is not None} == {going}
    assert found.transition.layers_restored == ()
    dead = replan(old, without(everyone, going), spec)
    assert stages(dead.plan) == stages(found.plan)
    assert dead.transition.layers_restored == tuple(range(*old.pipelines[0].stages[0].layers))


def test_one_that_lost_its_state_is_filled_again_from_another_pipeline():
    old, everyone, spec = pipelined(4, pipelines=2, stages=2)
    empty = old.pipelines[0].stages[1]
    found = replan(old, everyone, spec, lost=[empty.device])
    assert found.plan is old
    assert found.transition.devices_touched == (empty.device,)
    assert found.transition.layers_moved == empty.layers[1] - empty.layers[0]
    assert found.transition.layers_restored == ()


def test_a_move_must_pay_before_the_next_change():
    old, everyone, spec = pipelined(4, spare=2, stages=2)
    soon = replan(old, everyone, spec, expected_s=0.1)
    assert soon.plan is old
    late = replan(old, everyone, spec, expected_s=1e6)
    assert late.plan.world_size == 6
    share = late.transition.seconds / 1e6
    assert late.value == pytest.approx(late.plan.predicted_step_s * (1 + share))
    # While the plan in force trains on, a move to a better one costs nothing.
    meanwhile = replan(old, everyone, spec, expected_s=0.1, overlapped=True)
    assert meanwhile.plan.world_size == 6
    assert late.plan.predicted_step_s < meanwhile.value < old.predicted_step_s


@pytest.mark.parametrize("seed", [1, 5])
def test_more_moves_never_find_worse(seed):
    everyone, spec = geography(seed), job()
    old = plan(everyone, spec)
    now = without(everyone, old.devices[0].id)
    quick = replan(old, now, spec)
    slow = replan(old, now, spec, moves=100)
    assert slow.value <= quick.value * (1 + 1e-9)
    assert slow.considered > quick.considered
    validate_plan(slow.plan, now, spec)


@pytest.mark.parametrize(
    ("parallelism", "scaling"),
    [
        ({"layers": [[0, 3, 8]]}, {}),
        ({"layers": [[0, 3, 8], [0, 5, 8]]}, {}),
        ({"pipelines": 2, "microbatches": [10, 14]}, {}),
        ({"pipelines": 2}, {"max_devices": 4}),
        ({"stages": 2, "schedule": "gpipe", "gradient_sync": "central_ps"}, {}),
    ],
)
def test_what_the_job_fixes_is_obeyed(parallelism, scaling):
    spec = job(parallelism, scaling, global_batch=24)
    everyone = Topology(machines(6, memory_bytes=4 * GB), region_links=SLOW)
    old = plan(everyone, spec)
    current = old
    for gone in (old.devices[0].id, old.devices[-1].id):
        now = without(everyone, gone)
        found = replan(current, now, spec)
        validate_plan(found.plan, now, spec)
        current = found.plan
        cuts = [[0, *(s.layers[1] for s in p.stages)] for p in current.pipelines]
        if "layers" in parallelism:
            given = parallelism["layers"]
            assert all(cut == given[i % len(given)] for i, cut in enumerate(cuts))
        assert len(cuts) == parallelism.get("pipelines", len(cuts))
        if "microbatches" in parallelism:
            assert [p.microbatches for p in current.pipelines] == parallelism["microbatches"]
        assert current.world_size <= scaling.get("max_devices", 6)
        if "stages" in parallelism:
            assert {len(cut) for cut in cuts} == {3}
            assert (current.schedule, current.gradient_sync) == ("gpipe", "central_ps")


def test_a_job_that_changed_replaces_the_plan():
    everyone = Topology(machines(4), region_links=SLOW)
    old = plan(everyone, job({"gradient_sync": "allreduce"}))
    other = job({"gradient_sync": "sharded_ps"}, global_batch=48)
    found = replan(old, everyone, other)
    assert found.plan.gradient_sync == "sharded_ps"
    validate_plan(found.plan, everyone, other)


def test_dollars_are_weighed_as_seconds_are():
    devices = (*machines(2, price_per_hour=1.0), *machines(2, first=2, price_per_hour=50.0))
    options = PlanOptions(objective="dollars", moves=0)
    cheap = plan(Topology(devices[:2]), job(), options=options)
    found = replan(cheap, Topology(devices), job(), options=options)
    assert found.plan is cheap
    assert replan(cheap, Topology(devices), job()).plan.world_size == 4


def test_wrong_input_is_refused():
    old = plan(Topology(machines(2)), job())
    here = Topology(machines(2))
    for seconds in (0.0, -1.0, float("nan")):
        with pytest.raises(PlanError, match="expected_s is"):
            replan(old, here, job(), expected_s=seconds)
    with pytest.raises(PlanError, match="in force has 9 layers, but the model 8"):
        replan(replace(old, layers=9), here, job())
    with pytest.raises(PlanError, match="too few devices"):
        replan(old, Topology(()), job())
    with pytest.raises(PlanError, match=r"Use .*more stages"):
        replan(old, Topology(machines(1, first=7, memory_bytes=3 * 10**8)), job())
