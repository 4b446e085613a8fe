"""Makes things go wrong at the right moments.

Faults ``@step`` and ``@time`` happen when it is their time, whatever the run is doing.  All others
wait for each other: the next one comes once the run is over the last one and at full strength.
"""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from typing import Any

from ray_train_geo.chaos.disk import Disk
from ray_train_geo.chaos.faults import Fault, FaultKind, Moment
from ray_train_geo.chaos.local_cluster import LocalCluster, Node
from ray_train_geo.chaos.processes import signal_to
from ray_train_geo.chaos.recovery import Injection, median_step_s
from ray_train_geo.chaos.tail import RunTail
from ray_train_geo.observe.phases import read_phase

__all__ = ["Injector"]

_SETTLED_STEPS = 3
_SPREAD_STEPS = 8
"""A random fault comes up to so many steps after the run is at full strength."""
_STRENGTH_PATIENCE_S = 60.0
"""So long a run may take to get back to full strength; then faults go on as it is."""
_RECOVERY_PATIENCE_S = 60.0
"""What has not shown in a new generation by then, beyond its own length, has passed unnoticed."""
_HUNT_S = 0.2
_GLANCE_S = 2e-4
_RECOVERY_WINDOW_S = 0.3
"""A fault during a recovery comes so soon after the first failure is known."""
_KILL = Fault("kill-worker", None, Moment())


class Injector:
    """Call :meth:`poll` often.

    Args:
        replace: nodes that are gone for good are replaced by new ones.
        disk: what can be filled, if anything can.
    """

    def __init__(
        self,
        cluster: LocalCluster,
        tail: RunTail,
        faults: tuple[Fault, ...],
        rng: random.Random,
        *,
        replace: bool = True,
        disk: Disk | None = None,
    ) -> None:
        self._cluster = cluster
        self._tail = tail
        self._rng = rng
        self._replace = replace
        self._disk = disk
        self._timed = [f for f in faults if f.moment.kind in ("step", "time")]
        self._queue = [f for f in faults if f.moment.kind in ("random", "phase")]
        self._later: list[tuple[float, Callable[[], None]]] = []
        self._aim: Callable[[], bool] | None = None
        self._disturbed: Injection | None = None
        self._weak_since: float | None = None
        self._nodes = len(cluster.nodes)
        self._strength = 0
        self.injections: list[Injection] = []

    # ------------------------------------------------------------------ when

    @property
    def left(self) -> list[Fault]:
        """What has not been injected yet."""
        return [*self._timed, *self._queue]

    def done(self) -> bool:
        """Everything was injected, undone where that belongs to it, and the run is over it."""
        return not self.left and not self._later and self._disturbed is None

    def quiet(self) -> bool:
        """Never: faults leave enough of the cluster to train on."""
        return False

    def poll(self) -> None:
        """Inject what is due."""
        now = time.monotonic()
        for due, undo in [item for item in self._later if item[0] <= now]:
            self._later.remove((due, undo))
            undo()
        for fault in [f for f in self._timed if self._is_due(f.moment)]:
            if self._inject(fault):
                self._timed.remove(fault)
        if self._disturbed is not None and self._recovered():
            self._disturbed = None
            self._top_up()
        if self._queue:
            if self._aim is None and self._settled():
                self._aim = self._aimed(self._queue[0])
            if self._aim is not None and self._aim():
                self._aim = None
                self._queue.pop(0)

    def _is_due(self, moment: Moment) -> bool:
        if not self._tail.records:
            return False
        if moment.kind == "step":
            return self._tail.step >= moment.at
        return time.time() - float(self._tail.records[0]["time"]) >= moment.at

    def _recovered(self) -> bool:
        """Whether a step was committed since the last fault, in a new generation if need be."""
        last = self._disturbed
        assert last is not None
        newest = self._tail.records[-1] if self._tail.records else None
        if newest is None or newest["time"] <= last.time:
            return False
        if last.fault.kind == "kill-coordinator":
            return True
        if last.fault.kind == "fill-disk":
            return float(newest["time"]) > last.time + (last.fault.seconds or 0.0)
        waited_s = time.time() - last.time - (last.fault.seconds or 0.0)
        return int(newest["generation"]) > last.generation or waited_s > _RECOVERY_PATIENCE_S

    def _settled(self) -> bool:
        """Whether the run trains steadily, with as many workers as it had at first."""
        tail = self._tail
        if self._disturbed is not None or not tail.training or self._later:
            return False
        generation = int(tail.records[-1]["generation"])
        newest = tail.records[-_SETTLED_STEPS:]
        if len(newest) < _SETTLED_STEPS or int(newest[0]["generation"]) != generation:
            return False
        workers = len(tail.workers)
        self._strength = max(self._strength, workers)
        possible = self._cluster.expected() * self._cluster.workers_per_node
        if workers >= min(self._strength, possible):
            self._weak_since = None
            return True
        now = time.monotonic()
        self._weak_since = self._weak_since or now
        if now - self._weak_since < _STRENGTH_PATIENCE_S or workers < 2:
            return False
        self._weak_since = None
        return True

    def _aimed(self, fault: Fault) -> Callable[[], bool]:
        """What injects ``fault`` at its moment when it is called often; True once it has."""
        moment, rng = fault.moment, self._rng
        if moment.kind == "phase" and moment.phase == "recovery":
            return self._during_recovery(fault)
        step = self._tail.step + rng.randrange(_SPREAD_STEPS)
        if moment.kind == "phase":
            victim = self._victim()
            return lambda: self._tail.step >= step and self._in_phase(fault, victim)
        fraction, from_s = rng.random(), list[float]()

        def at_random() -> bool:
            if self._tail.step < step:
                return False
            now = time.monotonic()
            if not from_s:
                from_s.append(now + fraction * median_step_s(self._tail.records))
            return now >= from_s[0] and self._inject(fault)

        return at_random

    def _during_recovery(self, fault: Fault) -> Callable[[], bool]:
        """One kill, and as soon as the run knows of it, ``fault``."""
        first, delay_s = list[Injection](), self._rng.random() * _RECOVERY_WINDOW_S

        def second() -> bool:
            if not first:
                self._inject(_KILL)
                first.append(self.injections[-1])
                return False
            failures = self._tail.of_kind("failure")
            known = failures and failures[-1]["time"] >= first[0].time
            if not known or time.time() - failures[-1]["time"] < delay_s:
                return False
            dead = first[0].target
            alive = [w for w in self._tail.workers if _name(w) != dead]
            return self._inject(fault, self._rng.choice(alive) if alive else None)

        return second

    def _in_phase(self, fault: Fault, victim: dict[str, Any]) -> bool:
        """Watch the victim for a moment, and inject if it is in the fault's phase."""
        pid, phase, until = int(victim["pid"]), fault.moment.phase, time.monotonic() + _HUNT_S
        if victim not in self._tail.workers:
            self._aim = self._aimed(fault)  # it has left; another one then
            return False
        while time.monotonic() < until:
            if self._is_in(pid, phase):
                # Held, so that it is still in that phase when it happens.
                signal_to(pid, signal.SIGSTOP)
                if self._is_in(pid, phase) and self._inject(fault, victim, held=True):
                    return True
                signal_to(pid, signal.SIGCONT)
            time.sleep(_GLANCE_S)
        return False

    def _is_in(self, pid: int, phase: str | None) -> bool:
        now, saving = read_phase(self._cluster.phases, pid)
        return saving if phase == "checkpoint" else now == phase

    # ------------------------------------------------------------------ what

    def _victim(self) -> dict[str, Any]:
        return self._rng.choice(self._tail.workers)

    def _inject(
        self, fault: Fault, victim: dict[str, Any] | None = None, held: bool = False
    ) -> bool:
        """Let it happen; False if there is nothing to befall at the moment."""
        if not self._tail.workers:
            return False
        worker = victim or self._victim()
        pid = int(worker["pid"])
        phase: str | None = read_phase(self._cluster.phases, pid)[0]
        if fault.moment.phase in ("checkpoint", "recovery"):
            phase = fault.moment.phase
        began = time.time()
        target = self._act(fault, worker)
        if target is None:
            return False
        if held and fault.kind != "freeze":
            signal_to(pid, signal.SIGCONT)  # for a partition: the process itself goes on
        generation = self._tail.generation
        injection = Injection(
            fault,
            began,
            target,
            phase if fault.kind not in ("drain", "join", "kill-coordinator") else None,
            self._tail.step,
            int(generation["generation"]) if generation else 0,
        )
        self.injections.append(injection)
        self._disturbed = injection
        return True

    def _act(self, fault: Fault, worker: dict[str, Any]) -> str | None:
        """Returns what it befell; None if that is gone."""
        cluster, pid = self._cluster, int(worker["pid"])
        kind: FaultKind = fault.kind
        if kind == "kill-worker":
            return _name(worker) if signal_to(pid, signal.SIGKILL) else None
        if kind == "freeze":
            if not signal_to(pid, signal.SIGSTOP):
                return None
            self._after(fault.seconds, lambda: signal_to(pid, signal.SIGCONT))
            return _name(worker)
        if kind == "kill-coordinator":
            coordinator = self._tail.coordinator_pid
            if coordinator is None or not signal_to(coordinator, signal.SIGKILL):
                return None
            return f"pid {coordinator}"
        if kind == "fill-disk":
            return self._fill_disk(fault)
        if kind == "join":
            cluster.add_node()
            self._nodes += 1
            return "a new node"
        node = cluster.node_of(pid)
        return None if node is None else self._act_on_node(fault, node)

    def _fill_disk(self, fault: Fault) -> str | None:
        disk = self._disk
        assert disk is not None  # whoever makes the run sees to it
        if not self._tail.of_kind("checkpoint"):
            return None  # a run that ends could not be resumed
        disk.fill()
        self._after(fault.seconds, disk.free)
        return "the run's storage"

    def _act_on_node(self, fault: Fault, node: Node) -> str:
        cluster = self._cluster
        if fault.kind == "kill-node":
            cluster.kill(node)
        elif fault.kind == "drain":
            cluster.drain(node)
            # The cloud takes the machine at the deadline, whether it is empty or not.
            self._after(fault.seconds, lambda: cluster.kill(node) if node.alive() else None)
        else:
            network = cluster.network
            assert network is not None  # whoever makes the cluster sees to it
            network.cut(node.address)
            self._after(fault.seconds, lambda: network.heal(node.address))
        return f"{node.name} ({node.region})"

    def _after(self, seconds: float | None, undo: Callable[[], Any]) -> None:
        self._later.append((time.monotonic() + (seconds or 0.0), undo))

    def _top_up(self) -> None:
        """The cloud gives a new node for each that is gone."""
        if self._replace:
            for _ in range(self._nodes - self._cluster.expected()):
                self._cluster.add_node()


def _name(worker: dict[str, Any]) -> str:
    return f"rank {worker['rank']} (pid {worker['pid']})"
