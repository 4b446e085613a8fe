from __future__ import annotations

import time
from contextlib import nullcontext
from pathlib import Path

import torch
from generations import Generations
from local_jobs import make_job, plan_for

from ray_train_geo.planning.slow_links import Traffic
from ray_train_geo.training.gauge import Gauge, Observed, carried_between
from ray_train_geo.training.runtime import StageRuntime


def test_a_microbatch_is_its_forward_and_its_backward_on_average() -> None:
    gauge = Gauge(torch.device("cpu"), lambda kind: nullcontext())
    for kind, seconds in (("F", 0.02), ("F", 0.04), ("B", 0.06)):
        assert gauge.microbatch_s() is None, "no backward yet: nothing is forgotten"
        with gauge(kind):
            time.sleep(seconds)
    seconds = gauge.microbatch_s()
    assert seconds is not None
    assert 0.09 <= seconds < 0.3
    assert gauge.microbatch_s() is None, "it was handed out"


def test_a_microbatch_is_all_its_parts() -> None:
    gauge = Gauge(torch.device("cpu"), lambda kind: nullcontext(), kinds={"F", "B", "W"})
    for kind in ("F", "B", "W"):
        assert gauge.microbatch_s() is None
        with gauge(kind):
            time.sleep(0.01)
    seconds = gauge.microbatch_s()
    assert seconds is not None
    assert seconds >= 0.03


def test_what_a_computation_runs_inside_of_stays_around_it() -> None:
    inside: list[str] = []

    class Around:
        def __init__(self, kind: str) -> None:
            self.kind = kind

        def __enter__(self) -> None:
            inside.append(self.kind)

        def __exit__(self, *_: object) -> None:
            inside.append(f"/{self.kind}")

    gauge = Gauge(torch.device("cpu"), Around)
    with gauge("F"):
        inside.append("work")
    assert inside == ["F", "work", "/F"]


def test_traffic_is_that_of_node_pairs() -> None:
    places = {"a/0": ("a", "1"), "a/1": ("a", "1"), "b/0": ("b", "2"), "c/0": ("c", "2")}
    one, two = Traffic(100, 1.0), Traffic(10, 2.0)
    seen = {
        "a/0": Observed(1, None, shaped={"b": one, "a": one}),
        "a/1": Observed(1, None, shaped={"b": two}),
        "b/0": Observed(1, None, addresses={"1": one, "2": one, "9": one}),
        "c/0": Observed(1, None),
    }
    assert carried_between(seen, places) == {("a", "b"): one + two, ("b", "a"): one}


def test_workers_measure_themselves_while_steps_run(tmp_path: Path) -> None:
    job = make_job(tmp_path, "training.steps=3")
    runtimes: dict[int, StageRuntime] = {}
    generations = Generations(job)
    generations.run(plan_for(job, 2), 3, before=runtimes.update)
    generations.close()
    for runtime in runtimes.values():
        observed = runtime.observe()
        assert observed.generation == 1
        assert observed.microbatch_s is not None
        assert 0 < observed.microbatch_s < 5
        assert runtime.observe().microbatch_s is None
