"""What processes hold as a run goes on, and what is left when it has ended."""

from __future__ import annotations

import os
import re
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from ray_train_geo.chaos.local_cluster import LocalCluster
from ray_train_geo.chaos.processes import Usage, reap, usage
from ray_train_geo.chaos.tail import RunTail
from ray_train_geo.chaos.verify import Check

__all__ = ["Census", "check_cluster", "check_machine", "shared_memory"]

_SLACK = 2
"""Threads or descriptors that come and go with whatever is under way at the moment."""
_RESIDENT_GROWTH = 0.05
_WARM_SAMPLES = 4
"""Memory counts from here on: allocators keep what the first generations needed."""
_ENDING_S = 10.0
_POLL_S = 0.1
_ACTORS = ("ray::StageWorker", "ray::Coordinator")
_SHM = Path("/dev/shm")
_NUMBERS = re.compile(r"\d+")


@dataclass(slots=True)
class Census:
    """Samples of the coordinator and the workers that live long, by process and role.

    A role has its own number of links, with their threads and sockets, and so has a plan: only
    samples of the same process in the same role of the same layers are compared.
    """

    _samples: dict[tuple[int, str], list[Usage]] = field(default_factory=lambda: defaultdict(list))
    _generation: int = 0

    def take(self, tail: RunTail) -> None:
        """Sample all of them, once a generation; call it while the run trains steadily."""
        event = tail.generation
        if event is None or int(event["generation"]) == self._generation:
            return
        self._generation = int(event["generation"])
        roles = _roles(event["workers"])
        if tail.coordinator_pid is not None:
            roles[tail.coordinator_pid] = f"coordinator of {len(event['workers'])}"
        for pid, role in roles.items():
            found = usage(pid)
            if found is not None:
                self._samples[pid, role].append(found)

    def checks(self) -> list[Check]:
        """Threads, descriptors and memory of those that were seen in the same role again."""
        again = {key: samples for key, samples in self._samples.items() if len(samples) > 1}
        if not again:
            return []
        found = [
            _growth("threads", {k: [u.threads for u in s] for k, s in again.items()}),
            _growth("file descriptors", {k: [u.descriptors for u in s] for k, s in again.items()}),
        ]
        warm = {k: s for k, s in again.items() if len(s) > _WARM_SAMPLES}
        if warm:
            memory = {
                k: s[-1].resident_bytes / s[_WARM_SAMPLES - 1].resident_bytes - 1
                for k, s in warm.items()
            }
            (pid, role), most_grown = max(memory.items(), key=lambda item: item[1])
            detail = f"resident memory grew by at most {most_grown:.1%}, in {role} (pid {pid})"
            found.append(Check("memory", most_grown <= _RESIDENT_GROWTH, detail))
        return found


def _roles(workers: Sequence[Mapping[str, Any]]) -> dict[int, str]:
    """What each process does, by its id, in words that are the same if its links are."""
    pipelines: dict[int, list[str]] = {}
    for worker in sorted(workers, key=lambda w: int(w["rank"])):
        first, last = worker["layers"]
        pipelines.setdefault(int(worker["pipeline"]), []).append(f"{first}-{last}")
    plan = " | ".join(" ".join(stages) for stages in pipelines.values())
    return {int(w["pid"]): f"rank {w['rank']} of layers {plan}" for w in workers}


def _growth(name: str, samples: Mapping[tuple[int, str], Sequence[int]]) -> Check:
    """What a process holds at its quietest: a leak never goes, what is under way does."""
    growth = {}
    for key, counts in samples.items():
        third = max(1, len(counts) // 3)
        growth[key] = min(counts[-third:]) - min(counts[:third])
    (pid, role), most = max(growth.items(), key=lambda item: item[1])
    detail = (
        f"at most {most:+d} from a process's first third of samples to its last, in {role} "
        f"(pid {pid}); {len(samples)} compared, over up to {max(map(len, samples.values()))} "
        "generations"
    )
    return Check(name, most <= _SLACK, detail)


def check_cluster(cluster: LocalCluster) -> list[Check]:
    """The run has ended: the cluster is there, but nobody works for the run any more."""
    until = time.monotonic() + _ENDING_S
    while (left := _actors(cluster)) and time.monotonic() < until:
        time.sleep(_POLL_S)
    files = sorted(p.name for p in (cluster.folder / "tmp").iterdir())
    return [
        Check("processes of the run", not left, ", ".join(left) or "none is left"),
        Check("temporary files", not files, ", ".join(files) or "none is left"),
    ]


def check_machine(spared: Iterable[int], shared_before: set[str], pids: set[int]) -> list[Check]:
    """The cluster has ended, too: nothing at all may be left.

    Args:
        spared: children that have nothing to do with the run.
        shared_before: what :func:`shared_memory` said before it.
        pids: all processes that were seen; names in shared memory hold their maker's.
    """
    spared, until = set(spared), time.monotonic() + _ENDING_S
    while (left := _children(spared)) and time.monotonic() < until:
        reap(spared)
        time.sleep(_POLL_S)
    names = sorted(
        name
        for name in shared_memory() - shared_before
        if any(int(n) in pids for n in _NUMBERS.findall(name))
    )
    return [
        Check("processes", not left, ", ".join(left) or "none is left"),
        Check("shared memory", not names, ", ".join(names) or "none is left"),
    ]


def shared_memory() -> set[str]:
    """Names of all segments on this machine."""
    try:
        return set(os.listdir(_SHM))
    except OSError:
        return set()


def _actors(cluster: LocalCluster) -> list[str]:
    found = []
    for pid in cluster.processes():
        title = _title(pid)
        if title.startswith(_ACTORS):
            found.append(f"{title} (pid {pid})")
    return found


def _children(spared: set[int]) -> list[str]:
    children = psutil.Process().children(recursive=True)
    return [f"{_title(c.pid) or c.pid} (pid {c.pid})" for c in children if c.pid not in spared]


def _title(pid: int) -> str:
    try:
        return " ".join(psutil.Process(pid).cmdline())[:80]
    except psutil.Error:
        return ""
