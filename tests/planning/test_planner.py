from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_train_geo.cluster.topology import Device, Link, Topology
from ray_train_geo.errors import PlanError
from ray_train_geo.planning.memory import stage_memory_bytes
from ray_train_geo.planning.plan import Plan
from ray_train_geo.planning.planner import plan
from ray_train_geo.planning.predict import predict_plan
from ray_train_geo.planning.validate import validate_plan
from ray_train_geo.spec import GradientSyncName, JobSpec, parse_job

MB = 10**6


def job(parallelism=None, *, layers=4, scaling=None, **training) -> JobSpec:
    return parse_job(
        {
            "model": {"layers": layers, "dim": 128, "heads": 4},
            "data": {"path": "python://stdlib"},
            "training": {"steps": 1, "global_batch": 16, "microbatch": 2, "seq_len": 128}
            | training,
            "parallelism": parallelism or {},
            "scaling": scaling or {},
        }
    )


def machines(count, **changes) -> tuple[Device, ...]:
    return tuple(Device(**({"id": f"n{i}/0", "node": f"n{i}"} | changes)) for i in range(count))


def cuts(p: Plan):
    return [[stage.layers for stage in pipeline.stages] for pipeline in p.pipelines]


def counts(p: Plan):
    return [pipeline.microbatches for pipeline in p.pipelines]


def test_auto_uses_equal_devices_on_a_fast_network_as_replicas():
    # A small model: no bubble, and little to sum.
    topology = Topology(machines(4))
    p = plan(topology, job())
    assert cuts(p) == [[(0, 4)]] * 4
    assert counts(p) == [2, 2, 2, 2]
    assert [x.first_microbatch for x in p.pipelines] == [0, 2, 4, 6]
    bound = p.certificate.lower_bound
    assert 0 < bound < p.predicted_step_s < 1.1 * bound
    assert p.search_s == 0.0


@pytest.mark.parametrize("apart", ["nodes", "regions"])
def test_auto_stays_on_near_devices_when_the_network_is_too_slow(apart):
    slow = Link(1.0, 1e5)
    if apart == "nodes":
        devices = Device("near/0", "near"), Device("near/1", "near"), Device("far/0", "far")
    else:
        devices = (
            Device("near/0", "n0", region="near"),
            Device("near/1", "n1", region="near"),
            Device("far/0", "f0", region="far"),
        )
    links = {("near", "far"): slow, ("far", "near"): slow}
    p = plan(Topology(devices, **{f"{apart[:-1]}_links": links}), job())
    assert [d.id for d in p.devices] == ["near/0", "near/1"]


def test_auto_cuts_a_model_that_does_not_fit_on_one_device():
    whole = plan(Topology(machines(1)), job()).pipelines[0].stages[0].memory_bytes
    p = plan(Topology(machines(4, memory_bytes=whole - 1)), job())
    assert all(len(x.stages) > 1 for x in p.pipelines)
    assert all(s.memory_bytes < whole for x in p.pipelines for s in x.stages)


def test_the_chosen_shape_is_the_fastest_of_all():
    topology = Topology(
        (*machines(3), *(Device(f"f{i}", f"f{i}", flops_per_s=4e10) for i in range(3))),
        node_links={("n0", "n1"): Link(0.05, 1e7), ("n1", "n0"): Link(0.05, 1e7)},
    )
    best = plan(topology, job())
    for pipelines in range(1, 7):
        for stages in range(1, min(4, 6 // pipelines) + 1):
            other = plan(topology, job({"pipelines": pipelines, "stages": stages}))
            assert best.predicted_step_s <= other.predicted_step_s * (1 + 1e-9)


def test_fixed_fields_are_obeyed():
    wish = {
        "pipelines": 2,
        "stages": 2,
        "layers": [[0, 3, 4], [1]],
        "microbatches": [3, 5],
        "schedule": "1f1b",
        "extra_warmup": 1,
        "gradient_sync": "sharded_ps",
    }
    p = plan(Topology(machines(4)), job(wish))
    assert cuts(p) == [[(0, 3), (3, 4)], [(0, 1), (1, 4)]]
    assert counts(p) == [3, 5]
    assert [[s.warmup for s in x.stages] for x in p.pipelines] == [[2, 0], [2, 0]]
    assert (p.schedule, p.gradient_sync) == ("1f1b", "sharded_ps")
    assert [(r.rank, r.pipeline, r.stage) for r in p.roles()] == [
        (0, 0, 0),
        (1, 0, 1),
        (2, 1, 0),
        (3, 1, 1),
    ]
    assert [d.id for d in p.devices] == [p.stage(r).device for r in p.roles()]


def test_pipelines_of_different_depth():
    p = plan(Topology(machines(3)), job({"layers": [[0, 2, 4], [0, 4]]}))
    assert cuts(p) == [[(0, 2), (2, 4)], [(0, 4)]]
    # The two-stage one is about twice as fast and gets about twice the work.
    assert counts(p) == [5, 3]


def test_one_list_of_layers_serves_all_pipelines():
    p = plan(Topology(machines(4)), job({"layers": [1], "pipelines": 2}))
    assert cuts(p) == [[(0, 1), (1, 4)]] * 2


def test_gpipe_holds_all_microbatches():
    p = plan(Topology(machines(2)), job({"stages": 2, "schedule": "gpipe"}))
    assert [s.warmup for s in p.pipelines[0].stages] == [8, 8]


def test_faster_devices_get_more_layers_and_faster_pipelines_more_microbatches():
    fast, slow = Device("f", "f", flops_per_s=6e10), Device("s", "s", flops_per_s=2e10)
    p = plan(Topology((slow, fast)), job({"pipelines": 1, "stages": 2}, layers=8))
    by_device = {s.device: s.layers[1] - s.layers[0] for s in p.pipelines[0].stages}
    assert by_device == {"f": 6, "s": 2}
    p = plan(Topology((slow, fast)), job({"pipelines": 2, "stages": 1}))
    assert {x.stages[0].device: x.microbatches for x in p.pipelines} == {"f": 6, "s": 2}


def test_microbatches_that_do_not_divide():
    p = plan(Topology(machines(3)), job({"pipelines": 3, "stages": 1}))
    assert counts(p) == [3, 3, 2]


def test_slow_hops_get_extra_warmup():
    link = Link(0.05, 1e9)
    topology = Topology(machines(2), node_links={("n0", "n1"): link, ("n1", "n0"): link})
    usual = plan(topology, job({"stages": 2, "pipelines": 1, "extra_warmup": 0}))
    more = plan(topology, job({"stages": 2, "pipelines": 1}))
    assert usual.pipelines[0].stages[0].warmup == 1
    assert more.pipelines[0].stages[0].warmup > 1
    assert more.predicted_step_s < usual.predicted_step_s


def far(latency_s, **changes):
    link = Link(latency_s, 1e9)
    return Topology(machines(4, **changes), default_link=link)


def test_zero_bubble_puts_weight_gradients_off_where_others_wait():
    wish = {"stages": 4, "pipelines": 1}
    usual = plan(far(0.005), job(wish, layers=8, global_batch=32))
    split = plan(far(0.005), job(wish | {"schedule": "zero-bubble"}, layers=8, global_batch=32))
    deferred = [s.deferred for s in split.pipelines[0].stages]
    assert deferred[0] == 0
    assert deferred == sorted(deferred)
    assert deferred[-1] > 0
    assert split.predicted_step_s < 0.9 * usual.predicted_step_s
    assert split.certificate.lower_bound <= split.predicted_step_s


def test_auto_is_the_faster_schedule_that_fits():
    wish = {"layers": [2, 4, 6], "pipelines": 1}

    def chosen(topology, schedule="auto", **training):
        return plan(topology, job(wish | {"schedule": schedule}, layers=8, **training))

    assert chosen(far(0.005)) == replace(
        chosen(far(0.005), "zero-bubble"), certificate=chosen(far(0.005)).certificate
    )
    assert chosen(far(0.005), compile=True).schedule == "1f1b"
    whole = chosen(far(0.005), "1f1b", recompute=True)
    split = chosen(far(0.005), "zero-bubble", recompute=True)
    needs = [[s.memory_bytes for s in p.pipelines[0].stages] for p in (whole, split)]
    assert max(needs[0]) < max(needs[1])
    tight = chosen(far(0.005, memory_bytes=max(needs[0])), recompute=True)
    assert max(s.memory_bytes for s in tight.pipelines[0].stages) <= max(needs[0])
    # One stage has nobody to wait for.
    alone = plan(Topology(machines(1)), job({"schedule": "auto"}))
    assert alone.schedule == "1f1b"


def test_memory_limits_warmup_and_says_so():
    link = Link(0.5, 1e9)
    wish = job({"layers": [2], "pipelines": 1}, global_batch=64, microbatch=4)
    links = {("n0", "n1"): link, ("n1", "n0"): link}
    free = plan(Topology(machines(2), node_links=links), wish)
    wanted = free.pipelines[0].stages[0]
    assert free.notes == ()
    room = stage_memory_bytes(
        wish.dims(257),
        wish.training,
        (0, 2),
        4,
        cpu=True,
        sync_bucket_bytes=wish.parallelism.bucket_bytes,
        memory_copies=True,
    ).total
    assert room < wanted.memory_bytes
    tight = plan(Topology(machines(2, memory_bytes=room), node_links=links), wish)
    assert [s.warmup for s in tight.pipelines[0].stages] == [3, 0]
    assert tight.notes == (f"pipeline 0: memory limits warmup to [3, 0], not [{wanted.warmup}, 0]",)


def test_max_devices():
    p = plan(Topology(machines(4)), job(scaling={"max_devices": 2}))
    assert p.world_size == 2


def test_devices_too_small_for_any_layer_are_left_out():
    topology = Topology((Device("tiny", "a", flops_per_s=1e15, memory_bytes=MB), *machines(2)))
    p = plan(topology, job())
    assert [d.id for d in p.devices] == ["n0/0", "n1/0"]
    assert p.notes == ("too little memory for any layer: tiny",)


@pytest.mark.parametrize(
    ("parallelism", "scaling", "message"),
    [
        ({"pipelines": 2, "stages": 2}, {}, r"2 pipeline\(s\) of 2 stage\(s\) need 4, but 3 may"),
        ({"layers": [1, 2, 3]}, {}, r"1 pipeline\(s\) of 4 stage\(s\) need 4, but 3 may"),
        ({"layers": [[2], [1]]}, {}, r"2 pipeline\(s\) of 2 stage\(s\) need 4, but 3 may"),
        ({"stages": 4}, {}, r"of 4 stage\(s\) need 4, but 3 may"),
        ({"pipelines": 3}, {"max_devices": 2}, r"2 may be used \(scaling.max_devices; 3 are"),
        ({}, {"min_devices": 4}, "scaling.min_devices is 4, but there are 3"),
    ],
)
def test_too_few_devices(parallelism, scaling, message):
    with pytest.raises(PlanError, match=message) as e:
        plan(Topology(machines(3)), job(parallelism, scaling=scaling))
    assert "too few devices" in str(e.value)


def test_no_devices_at_all():
    with pytest.raises(PlanError, match="too few devices"):
        plan(Topology(()), job())


def test_a_stage_that_does_not_fit_is_named_with_what_it_needs():
    topology = Topology(machines(2, memory_bytes=320 * MB))
    wish = job({"pipelines": 1, "layers": [1], "schedule": "gpipe"})
    with pytest.raises(PlanError) as e:
        plan(topology, wish)
    message = str(e.value)
    assert "pipeline 0 stage 1 (layers 1-3) on device n1/0 needs 0." in message
    assert "parameters 0.0" in message
    assert "but the device has 0.32 GB" in message
    for advice in ("more stages", "training.microbatch", "training.recompute: true", "1f1b"):
        assert advice in message


def test_advice_leaves_out_what_is_done_already():
    topology = Topology(machines(1, memory_bytes=MB))
    with pytest.raises(PlanError) as e:
        plan(topology, job({"stages": 1}, layers=1, recompute=True, microbatch=1))
    assert str(e.value).endswith("Use devices with more memory.")


def test_no_auto_plan_fits():
    with pytest.raises(PlanError, match="no plan fits; nearest: pipeline 0 stage"):
        plan(Topology(machines(3, memory_bytes=MB)), job())


def test_gpipe_is_refused_where_1f1b_fits():
    wish = {"pipelines": 1, "stages": 2}
    topology = Topology(machines(2, memory_bytes=420 * MB))
    assert plan(topology, job(wish, global_batch=128)).world_size == 2
    with pytest.raises(PlanError, match=r"Use .*parallelism.schedule: 1f1b"):
        plan(topology, job(wish | {"schedule": "gpipe"}, global_batch=128))


REGIONS = ("a", "b", "c")


@st.composite
def topologies(draw):
    devices = []
    for i in range(draw(st.integers(0, 7))):
        region = draw(st.sampled_from(REGIONS))
        devices.append(
            Device(
                f"d{i}",
                f"{region}{draw(st.integers(0, 2))}",
                region=region,
                type=draw(st.sampled_from(["cpu", "A100"])),
                flops_per_s=draw(st.sampled_from([1e9, 2e10, 1e14])),
                memory_bytes=draw(st.sampled_from([100, 310, 330, 1600, 4000])) * MB,
            )
        )
    link = st.builds(Link, st.floats(0, 0.5), st.floats(1e5, 1e11))
    pairs = st.tuples(st.sampled_from(REGIONS), st.sampled_from(REGIONS))
    named = draw(st.dictionaries(pairs, st.tuples(link, link), max_size=5))
    links = {p[::way]: both[way < 0] for p, both in named.items() for way in (1, -1)}
    return Topology(tuple(devices), region_links=links)


@st.composite
def jobs(draw):
    microbatch = draw(st.integers(1, 2))
    total = draw(st.integers(1, 12))
    layers = draw(st.integers(1, 6))
    return job(
        {
            "pipelines": draw(st.none() | st.integers(1, min(3, total))),
            "stages": draw(st.none() | st.integers(1, min(3, layers))),
            "schedule": draw(st.sampled_from(["gpipe", "1f1b", "zero-bubble", "auto"])),
            "extra_warmup": draw(st.none() | st.integers(0, 3)),
            "gradient_sync": draw(st.sampled_from(get_args(GradientSyncName))),
        },
        layers=layers,
        global_batch=total * microbatch,
        microbatch=microbatch,
        precision=draw(st.sampled_from(["fp32", "bf16", "fp16"])),
        recompute=draw(st.booleans()),
    )


@settings(deadline=None, max_examples=60)
@given(topologies(), jobs(), st.randoms(use_true_random=False))
def test_any_job_on_any_topology_is_planned_or_refused(topology, wish, random):
    try:
        p = plan(topology, wish)
    except PlanError:
        return
    validate_plan(p, topology, wish)
    par = wish.parallelism
    assert par.pipelines in (None, len(p.pipelines))
    assert all(par.stages in (None, len(x.stages)) for x in p.pipelines)
    assert 0 < p.certificate.lower_bound <= p.predicted_step_s * (1 + 1e-9)
    assert predict_plan(p, topology, wish).step_s == pytest.approx(p.predicted_step_s)
    assert Plan.from_json(p.to_json()) == p
    # The same again, and whatever order the devices are listed in.
    assert plan(topology, wish) == p
    shuffled = list(topology.devices)
    random.shuffle(shuffled)
    again = plan(replace(topology, devices=tuple(shuffled)), wish)
    assert replace(again, notes=()) == replace(p, notes=())
