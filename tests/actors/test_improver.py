"""What the improver makes of what workers measured; no Ray runs here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest

from ray_train_geo.actors import improver as module
from ray_train_geo.actors.improver import Improver
from ray_train_geo.actors.offers import Change, Offers, Situation
from ray_train_geo.cluster.topology import Device, Link, Topology
from ray_train_geo.planning.background import Question, answer
from ray_train_geo.planning.corrections import Corrections
from ray_train_geo.planning.cost import backward_s, forward_s
from ray_train_geo.planning.planner import plan
from ray_train_geo.planning.policy import ChangeHistory
from ray_train_geo.planning.slow_links import Traffic
from ray_train_geo.spec import parse_job
from ray_train_geo.training.gauge import Observed

VOCAB = 257
JOB = parse_job(
    {
        "model": {"layers": 12, "dim": 256, "heads": 8, "tied_embeddings": False},
        "data": {"path": "python://stdlib"},
        "training": {"steps": 1, "global_batch": 32, "microbatch": 1, "seq_len": 256},
        "parallelism": {"pipelines": 1, "stages": 3},
    }
)
DIMS = JOB.dims(VOCAB)
FAST = Link(0.001, 1e8)
NODES = ("a", "b", "c")
MEASURED = Topology(
    tuple(Device(f"{n}/0", n, region=n, flops_per_s=1e11) for n in NODES),
    node_links={(a, b): FAST for a in NODES for b in NODES if a != b},
)


@dataclass
class Cluster:
    """A crew that measures what the test says, and a run that takes what it is offered."""

    slower: dict[str, float] = field(default_factory=dict)
    rate: dict[tuple[str, str], float] = field(default_factory=dict)
    now_s: float = 0.0
    events: list[dict[str, Any]] = field(default_factory=list)
    change: Change | None = None
    reconsidered: int = 0

    def __post_init__(self) -> None:
        self.history = ChangeHistory()
        self.situation = Situation(
            1, "start", None, MEASURED, plan(MEASURED, JOB, VOCAB), {}, self, False
        )
        self.offers = Offers(lambda: self.situation, self._take)
        self.improver = Improver(
            SimpleNamespace(job=JOB, dims=DIMS, vocab_size=VOCAB),
            self,
            self.offers,
            self.history,
            Corrections(),
            self._reconsider,
            lambda: self.now_s,
        )

    def _take(self, change: Change) -> None:
        self.change = change

    def _reconsider(self) -> None:
        self.reconsidered += 1

    def event(self, event: str, **fields: Any) -> None:
        self.events.append({"event": event, "at_s": self.now_s, **fields})

    def told(self, kind: str) -> list[dict[str, Any]]:
        return [e for e in self.events if e["event"] == kind]

    def info(self, device: str) -> Any:
        return SimpleNamespace(node_id=device[0], address=f"10.0.0.{device[0]}")

    def observed(self) -> dict[str, Observed]:
        found = {}
        for pipeline in self.situation.plan.pipelines:
            for stage in pipeline.stages:
                device = MEASURED.device(stage.device)
                usual_s = sum(
                    way(DIMS, JOB.training, stage.layers, device) for way in (forward_s, backward_s)
                )
                addresses = {
                    f"10.0.0.{n}": Traffic(self.rate.get((device.node, n), 1e7), 1.0)
                    for n in NODES
                    if n != device.node
                }
                found[device.id] = Observed(
                    self.situation.generation,
                    usual_s * self.slower.get(device.id, 1.0),
                    addresses=addresses,
                )
        return found

    def train(self, seconds: float) -> None:
        """Look twice a second, until something is to change."""
        until_s = self.now_s + seconds
        while self.now_s < until_s and self.change is None:
            self.improver.attend(self.situation)
            self.now_s += 0.5

    def adopt(self) -> None:
        assert self.change is not None
        assert self.change.plan is not None
        number, cause = self.situation.generation + 1, self.change.cause
        self.situation = replace(
            self.situation, generation=number, cause=cause, pause_s=0.5, plan=self.change.plan
        )
        self.change = None
        self.offers.resume()


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    def here(question: Question, given_up: Callable[[], bool]) -> Any:
        return None if given_up() else answer(question)

    monkeypatch.setattr(module, "search_aside", here)
    return Cluster()


def layers_of(change: Change, device: str) -> int:
    assert change.plan is not None
    stages = [s for p in change.plan.pipelines for s in p.stages if s.device == device]
    return sum(s.layers[1] - s.layers[0] for s in stages)


def test_nothing_happens_while_nothing_changes(cluster: Cluster) -> None:
    cluster.train(600)
    assert cluster.events == []
    assert cluster.reconsidered == 0


def test_a_straggler_gets_fewer_layers_and_when_it_recovers_as_many_as_before(
    cluster: Cluster,
) -> None:
    cluster.train(60)
    cluster.slower["b/0"] = 3.0
    cluster.train(60)
    (told,) = cluster.told("straggler")
    assert told["device"] == "b/0"
    assert told["slower"] == pytest.approx(3.0)
    assert 70 <= told["at_s"] <= 80
    assert cluster.reconsidered == 1
    change = cluster.change
    assert change is not None
    assert change.cause == "straggler"
    assert layers_of(change, "b/0") == 2
    assert change.figures["better_step_s"] < 0.6 * change.figures["step_s"]
    (search,) = cluster.told("search")
    assert search["adopted"]
    cluster.adopt()
    cluster.train(60)
    assert cluster.change is None, "what is known already is no news"
    cluster.slower.clear()
    cluster.train(120)
    assert cluster.change is not None
    assert layers_of(cluster.change, "b/0") == 4


def test_a_link_that_drops_is_avoided(cluster: Cluster) -> None:
    order = [s.device[0] for s in cluster.situation.plan.pipelines[0].stages]
    slow = {(order[0], order[1]): 1e6, (order[1], order[0]): 1e6}
    cluster.train(60)
    cluster.rate |= slow
    cluster.train(3)
    cluster.rate.clear()
    cluster.train(30)
    assert cluster.events == [], "a dip"
    cluster.rate |= slow
    since_s = cluster.now_s
    cluster.train(60)
    assert cluster.change is not None
    assert cluster.change.plan is not None
    assert cluster.change.cause == "link"
    assert cluster.now_s - since_s < 20
    after = [s.device[0] for s in cluster.change.plan.pipelines[0].stages]
    hops = {frozenset(hop) for hop in pairwise(after)}
    assert frozenset(order[:2]) not in hops
    assert {(e["source"], e["target"]) for e in cluster.told("link")} == set(slow)


def test_after_a_failure_a_better_plan_is_searched_in_the_background(cluster: Cluster) -> None:
    skewed = JOB.model_copy(
        update={
            "parallelism": JOB.parallelism.model_copy(
                update={"layers": [[0, 1, 2, 12]], "stages": None, "pipelines": None}
            )
        }
    )
    haste = plan(MEASURED, skewed, VOCAB)
    cluster.situation = replace(
        cluster.situation, generation=2, cause="failure", pause_s=0.7, plan=haste
    )
    cluster.train(10)
    assert cluster.change is not None
    assert cluster.change.cause == "better plan"
    assert cluster.change.figures["cost_s"] >= 0.7
    assert cluster.change.plan is not None
    assert cluster.change.plan.predicted_step_s < 0.6 * haste.predicted_step_s


def test_a_plan_for_a_generation_that_is_over_is_not_offered(cluster: Cluster) -> None:
    then = cluster.situation
    cluster.slower["b/0"] = 3.0
    cluster.train(1)
    cluster.situation = replace(then, generation=7)
    cluster.improver._want("straggler", 0.0)
    cluster.improver._search(then, "straggler")
    assert cluster.change is None
    assert cluster.told("search") == []


def test_a_plan_that_does_not_pay_yet_is_looked_at_again_later(cluster: Cluster) -> None:
    cluster.train(60)
    for second in range(30):
        cluster.history.happened(float(second))
    for _ in range(5):
        cluster.improver._policy.paused(60.0)
    cluster.slower["b/0"] = 1.6
    cluster.train(90)
    assert cluster.change is None
    assert {e["adopted"] for e in cluster.told("search")} == {False}
    cluster.train(4 * 3600)
    assert cluster.change is not None
    assert len(cluster.told("search")) <= 10, "less and less often"
