"""Which devices the recruiter tries, and when; no Ray runs here."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from ray_train_geo.actors import recruiter as module
from ray_train_geo.actors.discovery import Node
from ray_train_geo.actors.offers import Offers
from ray_train_geo.actors.recruiter import Recruiter
from ray_train_geo.cluster.topology import Device, Topology
from ray_train_geo.planning.corrections import Corrections
from ray_train_geo.planning.policy import ChangeHistory
from ray_train_geo.spec import parse_job

JOB = parse_job(
    {
        "model": {"layers": 4, "dim": 32, "heads": 4},
        "data": {"path": "python://stdlib"},
        "training": {"steps": 1, "global_batch": 4, "microbatch": 1, "seq_len": 8},
    }
)


class Cloud:
    """Nodes as Ray lists them, and a clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.nodes: list[Node] = []
        self.draining: set[str] = set()
        self.now_s = 0.0
        monkeypatch.setattr(module, "live_nodes", lambda: self.nodes)
        monkeypatch.setattr(module, "draining_nodes", lambda: self.draining)
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: self.now_s))

    def boot(self, number: int, machine: str) -> None:
        cpu = {"CPU": 1.0, "memory": 1e9}
        self.nodes.append(Node(f"node{number:08}", machine, (machine,), {}, cpu, cpu))

    def end(self, number: int) -> list[Device]:
        """The node is gone; its device."""
        name = f"node{number:08}"
        self.nodes = [n for n in self.nodes if n.id != name]
        return [Device(f"{name}/0", name)]


@pytest.fixture
def cloud(monkeypatch: pytest.MonkeyPatch) -> Cloud:
    return Cloud(monkeypatch)


def recruiter(cloud: Cloud) -> Recruiter:
    offers = Offers(lambda: None, lambda change: None)
    offers.close()  # its threads end at once: the test asks
    mission: Any = SimpleNamespace(job=JOB)
    made = Recruiter(mission, *[SimpleNamespace()] * 3, offers, ChangeHistory(), Corrections())
    made.close()
    return made


def free(made: Recruiter, *taken: Device) -> list[str]:
    now: Any = SimpleNamespace(topology=Topology(taken))
    return [d.node for d in made._free(now)]


def test_what_was_not_needed_is_tried_again_once_something_has_changed(cloud: Cloud) -> None:
    cloud.boot(1, "a")
    made = recruiter(cloud)
    assert free(made) == [], "the first plan did not want it"
    made.reconsider()
    assert free(made) == ["node00000001"]
    made._declined.add("node00000001")
    assert free(made) == []
    made.resume()
    assert free(made) == ["node00000001"], "a change was made"
    cloud.draining = {"node00000001"}
    assert free(made) == []


def test_a_machine_that_flaps_waits_longer_each_time(cloud: Cloud) -> None:
    made, waits = recruiter(cloud), []
    for number in range(7):
        cloud.boot(number, "flapping")
        since_s = cloud.now_s
        while not free(made):
            cloud.now_s += 0.5
        waits.append(cloud.now_s - since_s)
        made._flapping.came(("flapping",), cloud.now_s)
        made.lost(cloud.end(number))
    assert waits == [0, 0, 1, 3, 7, 15, 31]
    cloud.boot(9, "steady")
    assert free(made) == ["node00000009"]


def test_a_node_that_was_lost_is_tried_after_all_others(cloud: Cloud) -> None:
    """Ray may take a while to see that it is dead, and a worker for it would be waited for."""
    for number in (1, 2, 3):
        cloud.boot(number, "abc"[number - 1])
    made = recruiter(cloud)
    lost = Device("node00000001/0", "node00000001")
    made.lost([lost])
    assert free(made) == ["node00000002", "node00000003", "node00000001"]
