"""Lets a local cluster's nodes come and go as those of a spot trace do."""

from __future__ import annotations

import math
import time
from collections import deque

from ray_train_geo.chaos.faults import Fault, FaultKind, Moment
from ray_train_geo.chaos.goodput import Presence
from ray_train_geo.chaos.local_cluster import LocalCluster, Node
from ray_train_geo.chaos.recovery import Injection
from ray_train_geo.chaos.spot import nodes_at_first
from ray_train_geo.chaos.tail import RunTail
from ray_train_geo.cluster.traces import SpotTrace, TraceEvent

__all__ = ["TracePlayer"]


class TracePlayer:
    """Call :meth:`poll` often.  Time begins with the run's first committed step.

    Args:
        cluster: it has as many nodes as the trace has at first.
        trace: in seconds of the run (`chaos.spot`).
    """

    def __init__(self, cluster: LocalCluster, tail: RunTail, trace: SpotTrace) -> None:
        self._cluster = cluster
        self._tail = tail
        self._length_s = trace.end_s
        first = nodes_at_first(trace)
        self._at = {e: n.name for e, n in zip(first, cluster.nodes, strict=True)}
        self._events = deque(e for e in trace.events if e.op != "add" or e.time_s > 0)
        self._coming: list[tuple[str, Moment]] = []
        self._present = {n.name: n.up_s or n.started_s for n in cluster.nodes}
        self._gone: list[Presence] = []
        self.injections: list[Injection] = []

    @property
    def left(self) -> list[str]:
        """What has not happened yet."""
        return [f"{e.op} {e.node} at {e.time_s:.0f} s" for e in self._events]

    def done(self) -> bool:
        """The trace has come to its end."""
        return not self._events and self._now_s() >= self._length_s

    @property
    def end_s(self) -> float:
        """When that is, in unix seconds; never, if the run has not begun."""
        records = self._tail.records
        return float(records[0]["time"]) + self._length_s if records else math.inf

    def quiet(self) -> bool:
        """Nobody can expect the run to train: no node is there."""
        return not self._present

    def presences(self) -> list[Presence]:
        """Which nodes were there, and when."""
        there = [Presence(name, up_s) for name, up_s in self._present.items()]
        return [*self._gone, *there]

    def poll(self) -> None:
        """Let happen what is due."""
        now_s = self._now_s()
        while self._events and self._events[0].time_s <= now_s:
            self._follow(self._events.popleft())
        for name, moment in list(self._coming):
            node = self._cluster.named(name)
            if node is not None and node.up_s is not None:
                self._coming.remove((name, moment))
                self._present[name] = node.up_s
                self._note("join", None, moment, node, node.up_s)

    def _now_s(self) -> float:
        """Seconds since the first committed step; negative before."""
        return time.time() - self.end_s + self._length_s

    def _follow(self, event: TraceEvent) -> None:
        cluster, moment = self._cluster, Moment("time", round(event.time_s, 1))
        if event.op == "add":
            self._at[event.node] = cluster.add_node()
            self._coming.append((self._at[event.node], moment))
            return
        name, now_s = self._at[event.node], time.time()
        node = cluster.named(name)
        if event.op == "notice":
            if name in self._present and node is not None:
                cluster.drain(node)
                self._note("drain", self._notice_s(event), moment, node, now_s)
            return
        self._coming = [coming for coming in self._coming if coming[0] != name]
        if name in self._present:
            self._gone.append(Presence(name, self._present.pop(name), now_s))
            if node is not None:  # not drained, or not empty yet
                self._note("kill-node", None, moment, node, now_s)
        cluster.withdraw(name)

    def _notice_s(self, event: TraceEvent) -> float | None:
        """From a notice to the removal, where there is one."""
        later = (e.time_s for e in self._events if e.op == "remove" and e.node == event.node)
        removed_s = next(later, None)
        return None if removed_s is None else round(removed_s - event.time_s, 1)

    def _note(
        self, kind: FaultKind, seconds: float | None, moment: Moment, node: Node, time_s: float
    ) -> None:
        generation = self._tail.generation
        self.injections.append(
            Injection(
                Fault(kind, seconds, moment),
                time_s,
                f"{node.name} ({node.region})",
                None,
                self._tail.step,
                int(generation["generation"]) if generation else 0,
            )
        )
