"""The run of a chaos test as it goes on: the driver's process, and what is seen of it."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from ray_train_geo.chaos.census import Census
from ray_train_geo.chaos.disk import Disk
from ray_train_geo.chaos.local_cluster import LocalCluster
from ray_train_geo.chaos.processes import end_session
from ray_train_geo.chaos.recovery import Injection
from ray_train_geo.chaos.tail import RunTail
from ray_train_geo.chaos.verify import Check
from ray_train_geo.spec import JobSpec

__all__ = ["Disturbance", "Session"]

_POLL_S = 0.01
_STEPS_AFTER = 3
_STUCK_S = 120.0
_STARTING_S = 400.0
"""So long nothing may happen: later on, and before the first step."""
_STOP_S = 90.0
_NO_SPACE = "no space left on device"


class Disturbance(Protocol):
    """What goes wrong in a run.

    Args:
        injections: what has gone wrong by now.
    """

    injections: list[Injection]

    @property
    def left(self) -> Sequence[object]:
        """What has not happened yet."""

    def done(self) -> bool:
        """Everything has happened, and the run can be stopped."""

    def quiet(self) -> bool:
        """The run can't be expected to train now."""

    def poll(self) -> None:
        """Let happen what is due; called often."""


class Session:
    """One run under a disturbance.

    Args:
        disk: where its directory is, if that can be full: a run that ends for it is resumed.
    """

    def __init__(
        self,
        job: JobSpec,
        cluster: LocalCluster,
        tail: RunTail,
        disturbance: Disturbance,
        say: Callable[[str], None],
        disk: Disk | None = None,
    ) -> None:
        self._job = job
        self._cluster = cluster
        self._disturbance = disturbance
        self._say = say
        self._disk = disk
        self._refusals: list[str] = []
        self._driver: subprocess.Popen[bytes] | None = None
        self._stuck = ""
        self._told = 0
        self.tail = tail
        self.started_s = self.ended_s = 0.0
        self.census = Census()
        self.pids: set[int] = set()
        self.phase = "failed"

    # ------------------------------------------------------------------ the run

    def train(self, limit_s: float) -> None:
        """Until the run has ended for good."""
        until = time.monotonic() + limit_s
        self._say("starting the run")
        self.started_s = time.time()
        self._drive(until)
        while self._has_no_space() and time.monotonic() < until:
            self._refusals.append(f"it ended after step {self.tail.step}")
            self._say(self.phase)
            while self._disk is not None and self._disk.full:
                self._disturbance.poll()
                time.sleep(_POLL_S)
            self._say("there is space again: resuming")
            self._drive(until, "--resume")
            self._refusals[-1] += f", and {self._resumed()}"

    def _has_no_space(self) -> bool:
        return self._disk is not None and _NO_SPACE in self.phase

    def _resumed(self) -> str:
        """How the run went on."""
        resumes = self.tail.of_kind("resume")
        if len(resumes) < len(self._refusals):
            return f"could not be resumed: {self.phase}"
        return f"went on from step {resumes[-1]['step']}"

    def _drive(self, until: float, *arguments: str) -> None:
        """Until the driver has ended."""
        driver = self._driver = self._start(*arguments)
        stopping_s, enough = None, None
        while driver.poll() is None:
            self._look()
            now = time.monotonic()
            if stopping_s is None:
                self._disturbance.poll()
                if enough is None and self._disturbance.done():
                    enough = self.tail.step + _STEPS_AFTER
                if (enough is not None and self.tail.step >= enough) or now > until:
                    driver.send_signal(signal.SIGTERM)
                    stopping_s = now
            silent_s = now - self._news_s
            patience_s = _STUCK_S if self.tail.records else _STARTING_S
            if silent_s > patience_s or (stopping_s is not None and now - stopping_s > _STOP_S):
                self._stuck = f"; nothing happened for {silent_s:.0f} s"
                end_session(driver.pid)
                break
            time.sleep(_POLL_S)
        driver.wait()
        self.ended_s = time.time()
        self._look()
        self.phase = self._ending()

    def _start(self, *arguments: str) -> subprocess.Popen[bytes]:
        path = self._cluster.folder / "job.yaml"
        path.write_text(self._job.to_yaml())
        self._log = self._cluster.folder / "driver.log"
        self._news_s, self._last = time.monotonic(), (0, 0)
        command = [
            sys.executable, "-m", "ray_train_geo", "train", str(path),
            f"--address={self._cluster.address}", "--json", *arguments,
        ]  # fmt: skip
        return self._cluster.spawn(command, self._log)

    def _look(self) -> None:
        """See what is new, and pass it on."""
        tail = self.tail
        tail.poll()
        self._cluster.poll()
        news = len(tail.events), len(tail.records)
        if news != self._last or self._disturbance.quiet():
            self._last, self._news_s = news, time.monotonic()
            self.pids |= {int(w["pid"]) for w in tail.workers}
        if (
            len(tail.records) >= 2
            and tail.training
            and tail.records[-2].get("generation") == tail.records[-1].get("generation")
        ):
            self.census.take(tail)
        for injection in self._disturbance.injections[self._told :]:
            self._told += 1
            self._say(_line(injection))

    def _ending(self) -> str:
        """What the driver said at its end, and why if it failed."""
        lines = self._log.read_text(errors="replace").strip().splitlines()
        for line in reversed(lines):
            with contextlib.suppress(ValueError, AttributeError):
                found = json.loads(line)
                if "error" in found:
                    return f"failed: {found['error']['message']}"
                return str(found["phase"])
        return f"failed: {lines[-1]}" if lines else "failed: the driver ended without a word"

    def end(self) -> None:
        """Leave nothing behind, however the run went."""
        if self._driver is not None and self._driver.poll() is None:
            end_session(self._driver.pid)
            self._driver.wait()

    # ------------------------------------------------------------------ what must hold

    def checks(self) -> list[Check]:
        left = self._disturbance.left
        detail = f"{len(self._disturbance.injections)} were injected"
        if left:
            detail += f"; these were not, raise training.steps or --limit-s: {left[0]}"
            detail += f" and {len(left) - 1} more" if len(left) > 1 else ""
        ended = self.phase in ("finished", "stopped") and not self._stuck
        found = [
            Check("run", ended, f"{self.phase} after step {self.tail.step}{self._stuck}"),
            Check("faults", not left, detail),
        ]
        if self._disk is not None:
            resumed = len(self.tail.of_kind("resume")) == len(self._refusals)
            said = "; ".join(self._refusals) or "nothing had to be written while it was full"
            found.append(Check("full disk", resumed, said))
        return found


def _line(i: Injection) -> str:
    phase = f", in {i.phase}" if i.phase else ""
    return f"step {i.step}, generation {i.generation}: {i.fault.kind} {i.target}{phase}"
