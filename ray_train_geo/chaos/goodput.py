"""What share of its devices' time a run under a spot trace turned into committed steps (level 0).

::

    goodput = steps committed / integral of R(devices that are there) over time

``R(n)``, the undisturbed rate on ``n`` devices, is the run's own: see :class:`Rates`.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np

__all__ = ["Goodput", "Presence", "Rates", "goodput", "phases"]

Records = Sequence[Mapping[str, Any]]

_ENOUGH_STEPS = 5
"""A number of devices that trained for fewer says nothing: its steps were those of a change."""


@dataclass(frozen=True, slots=True)
class Presence:
    """One node, from when it is up in the cluster until the trace takes it, in unix seconds."""

    node: str
    up_s: float
    gone_s: float = math.inf


Phase = tuple[float, float, frozenset[str]]
"""From, until, and the nodes that are there."""


def phases(presences: Sequence[Presence], began_s: float, ended_s: float) -> list[Phase]:
    """Stretches between two moments in which nobody comes or goes, without gaps."""
    moments = {t for p in presences for t in (p.up_s, p.gone_s) if began_s < t < ended_s}
    found = []
    for start_s, end_s in pairwise([began_s, *sorted(moments), ended_s]):
        there = (p.node for p in presences if p.up_s <= start_s and end_s <= p.gone_s)
        found.append((start_s, end_s, frozenset(there)))
    return found


@dataclass(frozen=True, slots=True)
class Rates:
    """Steps per second that a run reaches on so many devices when nothing happens to it.

    Args:
        measured: steps per second by number of devices, none lower than that of fewer devices.
    """

    measured: Mapping[int, float]

    @classmethod
    def of(cls, records: Records, generations: Records) -> Rates:
        """From the median step of all generations that train on as many devices.

        Where more devices were slower than fewer (they share this machine), they get one rate: the
        nearest ones that never fall, by squares weighted with the time that was trained (isotonic
        regression, by pooling adjacent violators: Ayer et al., 1955).

        Args:
            generations: ``generation`` events.
        """
        devices = {int(g["generation"]): len(g["workers"]) for g in generations}
        steps: dict[int, list[float]] = defaultdict(list)
        for record in records:
            if (n := devices.get(int(record["generation"]))) is not None:
                steps[n].append(float(record["step_s"]))
        pools: list[tuple[float, float, list[int]]] = []  # weighted sum, weight, who
        for n, step_s in sorted(steps.items()):
            if len(step_s) < _ENOUGH_STEPS:
                continue
            weight = sum(step_s)
            pools.append((weight / statistics.median(step_s), weight, [n]))
            while len(pools) > 1 and pools[-2][0] * pools[-1][1] > pools[-1][0] * pools[-2][1]:
                total, weight, who = pools.pop()
                pools[-1] = pools[-1][0] + total, pools[-1][1] + weight, pools[-1][2] + who
        return cls({n: total / weight for total, weight, who in pools for n in who})

    def at(self, devices: int) -> float:
        """On the line between the nearest that were measured, of which none on no device is one.

        More devices than were ever measured count in proportion.
        """
        known = [0, *self.measured]
        rates = [0.0, *self.measured.values()]
        if devices > known[-1]:
            return rates[-1] * devices / known[-1] if known[-1] else 0.0
        return float(np.interp(devices, known, rates))


@dataclass(frozen=True, slots=True)
class Goodput:
    """What came of the device-seconds that there were.

    Args:
        seconds: from the first committed step to the end of the trace.
        mean_devices: that were there.
        steps, tokens: committed in that time.
        undisturbed_steps: what the same device-seconds give when nothing ever happens.
        stopped_steps: those of them that passed while a generation ended and the next one began.
        unused_steps: those that the devices would have given that were there and not yet, or no
            longer, in use.
        rates: steps per second by number of devices.
        restart_s: from the start of this run to its first committed step.
        restarted_steps: what checkpoint and restart would have committed, computed with these
            rates; None if the job keeps no checkpoints.
    """

    seconds: float
    mean_devices: float
    steps: int
    tokens: int
    undisturbed_steps: float
    stopped_steps: float
    unused_steps: float
    rates: Mapping[int, float]
    restart_s: float
    restarted_steps: float | None

    @property
    def share(self) -> float:
        """Of what is possible."""
        return self._of(self.steps)

    @property
    def restarted_share(self) -> float | None:
        """The same with checkpoint and restart."""
        return None if self.restarted_steps is None else self._of(self.restarted_steps)

    @property
    def stopped_share(self) -> float:
        """What is lost while generations change."""
        return self._of(self.stopped_steps)

    @property
    def unused_share(self) -> float:
        """What is lost for devices that are not in use."""
        return self._of(self.unused_steps)

    def _of(self, steps: float) -> float:
        return steps / self.undisturbed_steps if self.undisturbed_steps else 0.0

    def to_json(self) -> dict[str, Any]:
        shares = ("share", "restarted_share", "stopped_share", "unused_share")
        return asdict(self) | {name: getattr(self, name) for name in shares}


def goodput(
    records: Records,
    generations: Records,
    presences: Sequence[Presence],
    *,
    until_s: float,
    devices_per_node: int,
    started_s: float,
    interval: int,
) -> Goodput | None:
    """The goodput of a run; None if it committed nothing to measure it by.

    Args:
        records: of ``metrics.jsonl``.
        generations: ``generation`` events.
        until_s: when the trace, or the run, came to its end, in unix seconds.
        started_s: when the run was started.
        interval: steps from one checkpoint to the next; 0 is never.
    """
    rates = Rates.of(records, generations)
    if not rates.measured:
        return None
    began_s, ended_s = float(records[0]["time"]), until_s
    seconds, restart_s = ended_s - began_s, began_s - started_s
    there = phases(presences, began_s, ended_s)
    counted = [r for r in records if r["time"] <= ended_s]
    devices = {int(g["generation"]): len(g["workers"]) for g in generations}

    def possible(start_s: float, end_s: float, used: int = 0) -> float:
        """Steps of the devices that are there, beyond those of the ``used`` ones."""
        return sum(
            max(0.0, rates.at(devices_per_node * len(nodes)) - rates.at(used)) * span_s
            for a, b, nodes in there
            if (span_s := min(b, end_s) - max(a, start_s)) > 0
        )

    stopped = possible(float(counted[-1]["time"]), ended_s)
    unused = 0.0
    for before, after in pairwise(counted):
        start_s, end_s = float(before["time"]), float(after["time"])
        if before["generation"] != after["generation"]:
            stopped += max(0.0, possible(start_s, end_s) - 1)
        else:
            unused += possible(start_s, end_s, devices[int(after["generation"])])
    steps = len(counted) - 1  # the first one was computed before
    return Goodput(
        seconds=seconds,
        mean_devices=devices_per_node * sum(len(n) * (b - a) for a, b, n in there) / seconds,
        steps=steps,
        tokens=sum(int(r["tokens"]) for r in counted[1:]),
        undisturbed_steps=possible(began_s, ended_s),
        stopped_steps=stopped,
        unused_steps=unused,
        rates=rates.measured,
        restart_s=restart_s,
        restarted_steps=_restarted(there, rates, devices_per_node, restart_s, interval)
        if interval
        else None,
    )


def _restarted(
    there: Sequence[Phase], rates: Rates, devices_per_node: int, restart_s: float, interval: int
) -> float:
    """Steps that checkpoint and restart commits on the same nodes.

    Whenever a node that trains is taken, it starts again from the newest checkpoint, on whoever is
    there.  For one that joins it starts again if that pays before the next change, which it is
    told; with a checkpoint first.  Checkpoints cost nothing.
    """

    def rate(nodes: frozenset[str]) -> float:
        return rates.at(devices_per_node * len(nodes))

    saved, running = 0.0, 0.0  # steps up to the last restart, and since
    ready_s, _, used = there[0]
    for start_s, end_s, nodes in there:
        pays = rate(nodes) * (end_s - start_s - restart_s) > rate(used) * (end_s - start_s)
        if not used <= nodes:
            saved += running // interval * interval
            used, running, ready_s = nodes, 0.0, start_s + restart_s
        elif ready_s > start_s:
            used = nodes  # it has not begun: it begins with them, too
        elif pays or not used:
            saved += running
            used, running, ready_s = nodes, 0.0, start_s + restart_s
        running += rate(used) * max(0.0, end_s - max(start_s, ready_s))
    return saved + running
