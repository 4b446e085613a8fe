"""Where a new generation's state comes from: the nearest holder, the own island, or afresh."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from local_jobs import VOCAB, make_job, plan_for

from ray_train_geo.cluster.topology import Device, Link, Topology
from ray_train_geo.model.catalog import parameter_shapes
from ray_train_geo.planning.plan import Plan
from ray_train_geo.planning.planner import plan as make_plan
from ray_train_geo.spec import JobSpec
from ray_train_geo.training.buckets import holders_of
from ray_train_geo.training.sources import sources_of


@pytest.fixture
def job(tmp_path: Path) -> JobSpec:
    return make_job(tmp_path)


def three_sites() -> Topology:
    """``near`` is near ``new``, ``far`` is not."""
    devices = tuple(Device(name, node=name, region=name) for name in ("near", "far", "new"))
    slow, fast = Link(0.1, 1e9), Link(0.001, 1e9)
    links = {(a.region, b.region): slow for a in devices for b in devices if a is not b}
    return Topology(devices, region_links=links | {("near", "new"): fast})


def whole_on(device: str, job: JobSpec, where: Topology) -> Plan:
    one = job.parallelism.model_copy(update={"pipelines": 1, "stages": 1})
    only = where.with_devices([where.device(device)])
    return make_plan(only, job.model_copy(update={"parallelism": one}), VOCAB)


def test_the_nearest_holder_is_the_source(job: JobSpec) -> None:
    dims, where = job.dims(VOCAB), three_sites()
    names = parameter_shapes(dims)
    plan = whole_on("new", job, where)
    everywhere = dict.fromkeys(names, ("far", "near"))
    assert sources_of(plan, dims, where, everywhere)["new"].devices == dict.fromkeys(names, "near")
    # What it has itself does not travel; what only the far one has comes from there.
    first, second, *_ = sorted(names)
    some = {**everywhere, first: ("far", "new"), second: ("far",)}
    sources = sources_of(plan, dims, where, some)["new"].devices
    assert first not in sources
    assert sources[second] == "far"


def test_equally_near_holders_share_the_sending(job: JobSpec) -> None:
    dims = job.dims(VOCAB)
    where = replace(three_sites(), region_links={})
    plan = whole_on("new", job, where)
    assert all(holders_of(name, plan, dims) == (0,) for name in parameter_shapes(dims))
    everywhere = dict.fromkeys(parameter_shapes(dims), ("far", "near"))
    sources = sources_of(plan, dims, where, everywhere)["new"].devices
    assert set(sources.values()) == {"far", "near"}


@pytest.mark.parametrize("across", ["pipelines", "regions"])
def test_islands_keep_to_themselves(tmp_path: Path, across: str) -> None:
    """Three pipelines of two; the third one's last stage is new, and so is the whole of none."""
    job = make_job(
        tmp_path, "parallelism.pipelines=3", "parallelism.stages=2", f"local_sgd.across={across}"
    )
    plan, dims = plan_for(job), job.dims(VOCAB)
    a, b, c, d, e, new = (device.id for device in plan.devices)
    deep = [n for n in parameter_shapes(dims) if holders_of(n, plan, dims) == (1, 3, 5)]
    shallow = [n for n in parameter_shapes(dims) if holders_of(n, plan, dims) == (0, 2, 4)]
    holders = dict.fromkeys(shallow, (a, c, e)) | dict.fromkeys(deep, (b, d))
    holders["tokens.weight"] = (a, b, c, d, e)
    found = sources_of(plan, dims, Topology(plan.devices), holders, job.local_sgd)
    if across == "pipelines":
        assert all(not found[x].devices.keys() - {"tokens.weight"} for x in (a, b, c, d, e))
        # Both ends of a pipeline hold the tied tokens, and must hold the same.
        assert [found[x].devices.get("tokens.weight") for x in (a, b, c, d, e, new)] == [
            None, a, None, c, None, e,
        ]  # fmt: skip
        assert found[new].devices.keys() == {*deep, "tokens.weight"}
        assert found[new].restarts == set(deep)
    else:  # all in one region: the first who has a layer gives it to all
        assert found[a].devices == {}
        assert found[b].devices == {"tokens.weight": a}
        assert found[c].devices == dict.fromkeys([*shallow, "tokens.weight"], a)
        assert found[new].devices == dict.fromkeys(deep, b) | {"tokens.weight": a}
        assert not any(sources.restarts for sources in found.values())
