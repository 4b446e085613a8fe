"""Whole replays: what must hold for every policy on every trace, and what is refused."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from replay_cases import BATCH, asked, fleet, small_job

from ray_train_geo.cluster.topology import Device, Topology
from ray_train_geo.cluster.traces import SpotTrace, TraceEvent
from ray_train_geo.errors import PlanError, SpecError
from ray_train_geo.replay.fleet import Fleet, Hardware, fleet_of
from ray_train_geo.replay.outcome import Outcome
from ray_train_geo.replay.run import POLICIES, PolicyName, Replay, replay_fleet, replay_trace


def random_fleet(seed: int) -> Fleet:
    """Two nodes that stay, and others that come, are warned, go, and come again."""
    rng = random.Random(seed)
    events = [TraceEvent(0.0, "add", name) for name in ("x", "y")]
    there: list[str] = []
    now_s, made = 0.0, 0
    for _ in range(rng.randint(1, 16)):
        now_s += rng.choice([0, 1, 7, 60, 300, 900]) * rng.random()
        if there and rng.random() < 0.45:
            gone = there.pop(rng.randrange(len(there)))
            if rng.random() < 0.3:
                events.append(TraceEvent(now_s, "notice", gone))
                now_s += rng.choice([0, 1, 60])
            events.append(TraceEvent(now_s, "remove", gone))
            if rng.random() < 0.2:
                there.append(gone)
                events.append(TraceEvent(now_s, "add", gone))
        else:
            made += 1
            there.append(f"n{made}")
            events.append(TraceEvent(now_s, "add", f"n{made}"))
    regions = rng.choice([("here",), ("Ohio", "Virginia")])
    trace = SpotTrace("random", tuple(events), now_s + rng.choice([20, 500]))
    return fleet_of(trace, Hardware("T4", rng.choice([1, 2]), regions))


def check(found: Outcome, there: Fleet) -> None:
    """What holds for every policy."""
    total = there.device_s(0, there.end_s)
    parts = (
        found.productive_device_s,
        found.lost_device_s,
        found.downtime_device_s,
        found.idle_device_s,
    )
    assert sum(parts) == pytest.approx(total), "every device-second is in exactly one of them"
    assert min(parts) >= -1e-6 * total
    assert 0 <= found.goodput <= 1 + 1e-9
    # Samples count once: what was undone had been done, and is not among them.
    done = [s.done_by(s.end_s) for s in found.spans]
    assert all(0 <= s.undone <= steps for s, steps in zip(found.spans, done, strict=True))
    assert found.samples == BATCH * (sum(done) - found.undone_steps)
    # Time has no gaps.
    assert [s.start_s for s in found.spans] == [0.0, *(s.end_s for s in found.spans[:-1])]
    assert found.spans[-1].end_s == there.end_s
    assert found.downtime_s + found.waiting_s <= there.end_s


@given(st.integers(0, 10**6))
@settings(max_examples=6, deadline=None, derandomize=True)
def test_what_holds_for_every_policy_on_every_trace(seed: int) -> None:
    there = random_fleet(seed)
    found = dict(zip(POLICIES, replay_fleet(there, asked(there)), strict=True))
    for name, outcome in found.items():
        assert outcome.policy == name
        check(outcome, there.steady() if name == "on-demand" else there)
    ours, checkpoints = found["ours"], found["checkpoint-restart"]
    assert ours.samples >= checkpoints.samples
    assert found["on-demand"].undone_steps == 0
    joined = {c.time_s for c in there.changes if c.joined and c.time_s > 0}
    assert ours.joins >= len(joined)


@pytest.mark.parametrize("policy", POLICIES)
def test_without_events_little_is_lost(policy: PolicyName) -> None:
    there = fleet("0+a 0+b 0+c 0+d", 2000.0)
    (found,) = replay_fleet(there, asked(there), [policy])
    check(found, there)
    saving_s = found.spans[0].saving_s
    assert found.goodput == pytest.approx(1 - saving_s / 2000, abs=1e-3)
    assert found.goodput > 0.98
    assert (found.undone_steps, found.replans) == (0, 1)


def test_the_same_request_gives_the_same_answer() -> None:
    def once() -> list[object]:
        found = replay_trace("gcp-a100", small_job(), gpu="T4", until_h=1.5, max_nodes=6, seed=3)
        return found.to_json()["policies"]

    assert once() == once()


def test_dollars_by_market() -> None:
    there = fleet("0+a 0+b", 3600.0)
    ours, on_demand = replay_fleet(there, asked(there), ["ours", "on-demand"])
    assert ours.usd_spot == pytest.approx(2 * 0.158)
    assert on_demand.usd_on_demand == pytest.approx(2 * 0.526)
    price = ours.usd_per_million_tokens("spot")
    assert price == pytest.approx(2 * 0.158 / (ours.samples * 512 / 1e6))


def test_no_price_is_no_price() -> None:
    devices = tuple(Device(f"{n}/0", n, type="own", flops_per_s=1e13) for n in "ab")
    where = Topology(devices)
    found = replay_trace_on(where)
    assert found.outcomes[0].usd_spot is None
    assert found.outcomes[0].usd_per_million_tokens("spot") is None
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["policies"][0]["usd"] == {
        "spot": None,
        "on-demand": None,
    }


def replay_trace_on(where: Topology) -> Replay:
    return replay_trace("aws-p3", small_job(), topology=where, until_h=0.2, policies=["ours"])


def test_the_topology_s_own_prices() -> None:
    devices = tuple(
        Device(f"{n}/0", n, type="own", flops_per_s=1e13, market_type="spot", price_per_hour=0.5)
        for n in "ab"
    )
    found = replay_trace_on(Topology(devices))
    assert found.outcomes[0].usd_spot == pytest.approx(0.5 * 2 * 0.2)
    assert found.outcomes[0].usd_on_demand is None


def test_json_has_everything() -> None:
    found = replay_trace("aws-p3", small_job(), gpu="T4", until_h=0.5, max_nodes=3)
    told = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert [p["policy"] for p in told["policies"]] == list(POLICIES)
    assert told["seconds"] == 1800
    assert told["devices"][-1]["end_s"] == 1800
    for p in told["policies"]:
        assert {"goodput", "samples_per_s", "tokens_per_s", "usd_per_million_tokens"} <= p.keys()
        assert p["tokens"] == p["samples"] * 512
        assert p["timeline"][-1]["end_s"] == 1800


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"policies": ["our"]}, SpecError, "unknown policy 'our': choose of ours, checkpoint"),
        ({"policies": []}, SpecError, "no policy: choose of"),
        ({"until_h": 0.0}, SpecError, "until_h is 0.0: give a number above 0"),
        ({"max_nodes": -1}, SpecError, "max_nodes is -1"),
        ({"notice_s": float("nan")}, SpecError, "notice_s is nan"),
        ({"assume": ["x=1"]}, SpecError, "no assumption 'x=1'"),
        ({"gpu": None}, SpecError, "give the GPU type of its nodes"),
        ({"topology": Topology(())}, SpecError, "a topology says what its nodes are"),
        ({"trace": "nothing.csv"}, SpecError, "can't read the trace nothing.csv"),
        ({"job": None}, SpecError, "nothing to plan"),
        ({"job": small_job({"stages": 4}), "max_nodes": 3}, PlanError, "too few devices"),
    ],
)
def test_refused(arguments: dict[str, Any], error: type[Exception], says: str) -> None:
    usual: dict[str, Any] = {"trace": "aws-p3", "job": small_job(), "gpu": "T4", "until_h": 0.1}
    with pytest.raises(error) as refused:
        replay_trace(**usual | arguments)
    assert says in str(refused.value)


def test_a_trace_file_and_a_job_file(tmp_path: Path) -> None:
    trace, job = tmp_path / "trace.yaml", tmp_path / "job.yaml"
    trace.write_text(
        "- {time_s: 0, op: add, node: a, gpu: T4}\n- {time_s: 0, op: add, node: b, gpu: T4}\n"
        "- {time_s: 60, op: notice, node: b}\n- {time_s: 180, op: remove, node: b}\n"
    )
    job.write_text(small_job().to_yaml())
    found = replay_trace(trace, job, until_h=0.1, policies=["on-demand", "ours"])
    assert [o.policy for o in found.outcomes] == ["ours", "on-demand"]
    assert found.outcomes[0].notices == 1
    assert found.outcomes[0].lost_device_s < 0.1
