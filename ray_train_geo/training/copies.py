"""In-memory copies: what the loss of one node would take is also on another node.

    step 7 │ commit │ step 8 ...................................│ commit │ step 9
           └─ copy own state, send it to the peer ──────────────┘
                                        has it arrived? only then may 8 commit

So a survivor that has committed step ``k`` can rely on a copy of the newest multiple of the
interval below ``k`` at least: no more than the interval's steps are ever lost.  To go back to
that step all keep a copy of their own state of it, too.

Residuals of gradient codecs are one worker's alone, and of no use when a step old.  So they are
copied to the nearest other node after *each* step, if that takes a small part of a step only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import torch

from ray_train_geo.cluster.topology import Device, Topology
from ray_train_geo.errors import AbortedError, DeadlineError
from ray_train_geo.model.catalog import ModelDims, parameter_shapes
from ray_train_geo.planning.memory import (
    OUTER_STATE_BYTES_PER_PARAMETER,
    STATE_BYTES_PER_PARAMETER,
)
from ray_train_geo.planning.plan import Plan
from ray_train_geo.training.buckets import holders_of
from ray_train_geo.training.memory import Memory, Snapshot
from ray_train_geo.training.residuals import RESIDUAL
from ray_train_geo.transport.state_stream import Address, Streams

__all__ = ["Copier", "CopyDuty", "copy_duties", "copy_interval", "spare_keepers"]

_COST_SHARE = 0.03
"""`auto` waits for copies during at most so much of the time."""

_SPARE_SHARE = 0.1
"""Copies of residuals take a link for at most so much of a step."""

_RESIDUAL_BYTES = 4


@dataclass(frozen=True, slots=True)
class CopyDuty:
    """What one worker copies.

    Args:
        interval: in steps.
        names: weights that go to ``peer``; of all others only a copy of one's own is kept.
    """

    interval: int
    names: tuple[str, ...] = ()
    peer: int | None = None


def copy_duties(plan: Plan, dims: ModelDims, topology: Topology) -> dict[int, CopyDuty]:
    """Every rank's duty, at interval 1; empty if there is nothing to copy, or nowhere to.

    A weight is copied if all its holders are on one node, by the first of them, to a worker on
    another node: of another region if there is one, then the nearest, then the least burdened.
    """
    devices = [topology.device(plan.stage(role).device) for role in plan.roles()]
    given: dict[int, list[str]] = {}
    for name in parameter_shapes(dims):
        holders = holders_of(name, plan, dims)
        if len({devices[rank].node for rank in holders}) == 1:
            given.setdefault(holders[0], []).append(name)
    if not given or len({d.node for d in devices}) < 2:
        return {}
    burden = [0] * len(devices)
    duties = {rank: CopyDuty(1) for rank in range(len(devices))}
    for rank, names in sorted(given.items()):
        peer = _peer(devices[rank], devices, topology, burden)
        burden[peer] += len(names)
        duties[rank] = CopyDuty(1, tuple(names), peer)
    return duties


def _peer(
    owner: Device, devices: Sequence[Device], topology: Topology, burden: Sequence[int]
) -> int:
    def preference(rank: int) -> tuple[bool, int, float]:
        device = devices[rank]
        return device.region == owner.region, burden[rank], topology.link(owner, device).latency_s

    return min((r for r, d in enumerate(devices) if d.node != owner.node), key=preference)


def spare_keepers(plan: Plan, dims: ModelDims, topology: Topology) -> dict[int, int]:
    """Who gets copies of whose residuals, by rank; empty where links have no room for them."""
    devices = [topology.device(plan.stage(role).device) for role in plan.roles()]
    shapes = parameter_shapes(dims)
    owned = [0] * len(devices)
    for name, shape in shapes.items():
        holders = holders_of(name, plan, dims)
        if len(holders) > 1:
            for rank in holders:
                owned[rank] += math.prod(shape)
    found: dict[int, int] = {}
    burden = [0] * len(devices)
    for rank, device in enumerate(devices):
        others = [r for r, d in enumerate(devices) if d.node != device.node]
        if not owned[rank]:
            continue
        if not others:
            return {}
        far_s = {
            r: topology.link(device, devices[r]).transfer_s(_RESIDUAL_BYTES * owned[rank])
            for r in others
        }
        keeper = min(others, key=lambda r: (far_s[r], burden[r]))
        if far_s[keeper] > _SPARE_SHARE * plan.predicted_step_s:
            return {}
        burden[keeper] += 1
        found[rank] = keeper
    return found


def copy_interval(
    duties: Mapping[int, CopyDuty],
    plan: Plan,
    dims: ModelDims,
    topology: Topology,
    local_sgd: bool = False,
) -> int:
    """The least interval at which waiting for copies is predicted to cost 3% of the time.

    A copy has one step's time to arrive for nothing; what it takes longer is waited for once in
    an interval.
    """
    devices = [topology.device(plan.stage(role).device) for role in plan.roles()]
    shapes = parameter_shapes(dims)
    bytes_each = STATE_BYTES_PER_PARAMETER + OUTER_STATE_BYTES_PER_PARAMETER * local_sgd
    longest_s = 0.0
    for rank, duty in duties.items():
        if duty.peer is not None:
            parameters = sum(math.prod(shapes[name]) for name in duty.names)
            link = topology.link(devices[rank], devices[duty.peer])
            sent_s = link.transfer_s(parameters * bytes_each)
            longest_s = max(longest_s, sent_s)
    waited_s = longest_s - plan.predicted_step_s
    return max(1, math.ceil(waited_s / (_COST_SHARE * plan.predicted_step_s)))


class Copier:
    """Carries out one worker's duty in one generation.

    Args:
        duty: None: there is nothing to copy, and copies of earlier generations are let go.
        peer: the state server of ``duty.peer``.
        streams: of this generation.
        snapshot: the worker's whole state as it is now, copied to the CPU.
        spares_to: the state server of who gets a copy of its residuals after each step.
        spares: these residuals as they are now, copied to the CPU.
    """

    def __init__(
        self,
        duty: CopyDuty | None,
        peer: Address | None,
        streams: Streams,
        memory: Memory,
        snapshot: Callable[[], Snapshot],
        deadline_s: float,
        spares_to: Address | None = None,
        spares: Callable[[], Snapshot] | None = None,
    ) -> None:
        self._duty = duty
        self._spares_to = spares_to
        self._spares = spares
        self._peer = peer
        self._streams = streams
        self._memory = memory
        self._snapshot = snapshot
        self._deadline_s = deadline_s
        self._pusher = ThreadPoolExecutor(1, thread_name_prefix="copy-state")
        self._pushing: list[Future[None]] = []
        self._aborted: Future[None] = Future()
        self._copied: float = math.inf if duty is None else -1

    def begin(self) -> None:
        """The generation starts: what it starts from is copied at once."""
        if self._duty is not None:
            self._copy()
        self._spare()

    def committed(self, step: int) -> None:
        """``step`` is committed everywhere, or will be: older copies can go."""
        # Of residuals those of the step before are needed until this step's have arrived.
        self._memory.forget_before(min(self._copied, step - 1 if self._spares_to else math.inf))
        if self._duty is not None and step % self._duty.interval == 0:
            self._copy()
        self._spare()

    def finish(self) -> None:
        """Wait until the copies that are under way have arrived.

        Raises:
            TransportError: it has not.
        """
        while self._pushing:
            both = [self._pushing[0], self._aborted]
            done = wait(both, self._deadline_s, FIRST_COMPLETED).done
            if not done:
                raise DeadlineError(
                    f"the in-memory copy did not arrive within {self._deadline_s:.1f} s"
                )
            if self._pushing[0] not in done:
                raise AbortedError("the generation was aborted while a copy was under way")
            self._pushing.pop(0).result()

    def abort(self) -> None:
        """Release :meth:`finish`; from any thread."""
        if not self._aborted.done():
            self._aborted.set_result(None)

    def close(self) -> None:
        self._pusher.shutdown(wait=False, cancel_futures=True)

    def _copy(self) -> None:
        assert self._duty is not None
        copy = self._snapshot()
        self._memory.keep(copy)
        self._copied = copy.step
        if self._peer is not None and self._duty.names:
            names = set(self._duty.names)
            tensors = {
                n: t
                for n, t in copy.tensors.items()
                if n.partition(".")[2] in names and not n.startswith(RESIDUAL)
            }
            self._push(self._peer, copy, tensors)

    def _spare(self) -> None:
        if self._spares_to is not None and self._spares is not None:
            spares = self._spares()
            self._push(self._spares_to, spares, spares.tensors)

    def _push(self, peer: Address, copy: Snapshot, tensors: Mapping[str, torch.Tensor]) -> None:
        self._pushing.append(
            self._pusher.submit(self._streams.push, peer, copy.step, copy.facts(), tensors)
        )
