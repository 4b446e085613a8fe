"""Replica groups, as torchft has them: a pipeline lives or dies as a whole.

::

    group 0  [a b c d]     c vanishes: a, b, d idle, and the others go on without them after a while
    group 1  [e f g h]     as soon as four devices are idle they form a group, heal from a live one,
    group 2  [i j k l]     and enter at the end of a step

The global batch stays constant and is shared anew among the groups that live; torchft itself would
let it shrink, which is a different training run.  Where no group lives, the newest checkpoint is
read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ray_train_geo.planning.plan import Plan
from ray_train_geo.planning.transition import Holdings
from ray_train_geo.replay.assumptions import TorchftCosts
from ray_train_geo.replay.checkpoints import Checkpoints
from ray_train_geo.replay.fixed_shape import FixedShape
from ray_train_geo.replay.fleet import Change
from ray_train_geo.replay.ledger import Ledger

__all__ = ["TorchftLike"]

_Group = tuple[str, ...]
"""Device ids in the order of stages."""


class TorchftLike:
    """The policy."""

    def __init__(
        self, ledger: Ledger, shape: FixedShape, checkpoints: Checkpoints, costs: TorchftCosts
    ) -> None:
        self.ledger = ledger
        self.wake_s = math.inf
        self.replans = 0
        self._shape, self._checkpoints, self._costs = shape, checkpoints, costs
        self._there: set[str] = set()
        self._live: list[_Group] = []
        self._healing: list[tuple[float, _Group]] = []  # when they are ready
        self._resume_s = math.inf
        self._plan: Plan | None = None  # that ran last

    def change(self, change: Change) -> None:
        now_s = change.time_s
        self._there = (self._there - set(change.left)) | set(change.joined)
        gone = {d.id for d in self._shape.book.devices(change.left)}
        before = len(self._live)
        self._live = [group for group in self._live if not gone & set(group)]
        self._healing = [(s, group) for s, group in self._healing if not gone & set(group)]
        broken = len(self._live) < before
        if broken:
            resumes_s = 0.0 if self.ledger.training else self._resume_s
            self._resume_s = max(resumes_s, now_s + self._costs.failure_s)
            self.ledger.stop(now_s)
        if not self._live:
            self._start(now_s, now_s + (self._costs.failure_s if broken else 0.0))
        self._ask(now_s)

    def wake(self, now_s: float) -> None:
        self._live += [group for ready_s, group in self._healing if ready_s <= now_s]
        self._healing = [(ready_s, group) for ready_s, group in self._healing if ready_s > now_s]
        self._train(now_s)
        self._ask(now_s)

    def _start(self, now_s: float, known_s: float) -> None:
        """From nothing, or from the newest checkpoint once it is known that no group is left."""
        self._healing = []
        found = self._shape.plan(self._there)
        if self._plan is not None:
            saved = self._checkpoints.newest(self.ledger, self._plan, now_s)
            self.ledger.roll_back(self.ledger.committed_by(now_s) - saved)
        if found is None:
            self._resume_s = math.inf
            self.ledger.wait(now_s)
            return
        self._live = [tuple(s.device for s in p.stages) for p in found.pipelines]
        if self._plan is None:
            self._train(now_s)
            return
        self.ledger.stop(now_s)
        self._resume_s = known_s + self._costs.start_s + self._checkpoints.load_s(found)

    def _train(self, now_s: float) -> None:
        """With all groups that live, from the next step on."""
        plan = self._together(self._live)
        assert plan is not None  # no group is formed that does not fit
        self._plan, self._resume_s = plan, math.inf
        self.replans += 1
        step_s = plan.predicted_step_s * (1 + self._costs.step_overhead)
        self.ledger.train(now_s, plan.world_size, step_s)

    def _together(self, groups: Sequence[_Group]) -> Plan | None:
        """How so many groups train; None if they don't fit."""
        used = {device for group in groups for device in group}
        nodes = {d.node for d in self._shape.book.devices(self._there) if d.id in used}
        return self._shape.plan_of(len(groups), nodes)

    def _in_use(self, device: str) -> bool:
        return any(device in group for group in self._live)

    def _ask(self, now_s: float) -> None:
        """Form groups of who is idle, and be woken when something is due."""
        if not self._live or self._plan is None:
            self.wake_s = math.inf
            return
        self._form_groups(now_s)
        if not self.ledger.training:
            self.wake_s = self._resume_s
        elif self._healing:
            ready_s = min(ready_s for ready_s, _ in self._healing)
            self.wake_s = self.ledger.step_end(max(ready_s, now_s))
        else:
            self.wake_s = math.inf

    def _form_groups(self, now_s: float) -> None:
        there = self._shape.book.devices(self._there)
        healing = {device for _, group in self._healing for device in group}
        idle = [d.id for d in there if not self._in_use(d.id) and d.id not in healing]
        wanted = self._shape.plan(self._there)
        room = 0 if wanted is None else len(wanted.pipelines) - len(self._live) - len(self._healing)
        depth = self._shape.stages
        for i in range(min(room, len(idle) // depth)):
            group = tuple(idle[i * depth : (i + 1) * depth])
            others = [healing for _, healing in self._healing]
            if self._together([*self._live, *others, group]) is None:
                break
            heal_s = self._costs.overlap_factor * self._healed_s(group)
            self._healing.append((now_s + self._costs.start_s + heal_s, group))

    def _healed_s(self, group: _Group) -> float:
        """Until every stage of ``group`` has got its state from a live one."""
        assert self._plan is not None
        runs = [stage.layers for stage in self._plan.pipelines[0].stages]
        held = {d: run for live in self._live for d, run in zip(live, runs, strict=True)}
        book = self._shape.book
        holdings = Holdings(held, book.topology(self._there), book.dims)
        return holdings.moves_to(dict(zip(group, runs, strict=True))).seconds
