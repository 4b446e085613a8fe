"""The node watcher: tells Ray that this node is going to leave, as soon as the cloud says so.

    cloud's metadata server --notice--> watcher --drain--> Ray's control store (GCS)
                                                                |  polled
                        the work moves, at a step boundary <-- coordinator

A plain process beside the raylet, of no job.  It only ever drains: who trains on the node decides
what to do about it.  Ray ends a drained node once no worker is left on it, and the watcher ends
with its node.
"""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil
from ray import _raylet as raylet
from ray._private.services import canonicalize_bootstrap_address
from ray.exceptions import RayError

from ray_train_geo.cluster.notices import MetadataError, Notice
from ray_train_geo.errors import ClusterError

__all__ = ["NodeWatcher", "RayNode", "find_node"]

_RAYLET: Any = raylet  # its stubs leave GcsClient out
_PREEMPTION = 2  # DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION
_ALIVE = 0  # GcsNodeInfo.GcsNodeState.ALIVE

_GCS_TIMEOUT_S = 5.0
_ALIVE_EVERY_S = 10.0


@dataclass(frozen=True, slots=True)
class RayNode:
    """A node of a Ray cluster, as its control store knows it."""

    id: str
    """Hexadecimal."""
    address: str
    """Of the control store, HOST:PORT."""
    is_head: bool

    def drain(self, notice: Notice) -> None:
        """Mark the node as draining until the notice's deadline; again: until the new one.

        Raises:
            ClusterError: the control store can't be reached, or refuses.
        """
        # 0: no deadline.  One that has passed is told as it is: the node may end at any moment.
        known = math.isfinite(notice.deadline_unix_s)
        deadline_ms = int(notice.deadline_unix_s * 1000) if known else 0
        why = f"{notice.kind} notice of {notice.source}: {notice.text}"
        accepted, refusal = _ask(
            self.address,
            lambda gcs: gcs.drain_node(
                self.id, _PREEMPTION, why, deadline_ms, timeout=_GCS_TIMEOUT_S
            ),
        )
        if not accepted:
            raise ClusterError(f"Ray refuses to drain node {self.id}: {refusal}")

    def alive(self) -> bool:
        """Whether the node is part of the cluster.

        Raises:
            ClusterError: the control store can't be reached.
        """
        return self.id in (_id(info) for info in _live_nodes(self.address))


def find_node(address: str | None = None, node: str | None = None) -> RayNode:
    """This machine's node.

    Args:
        address: of Ray's control store, HOST:PORT.  Default: RAY_ADDRESS, or the Ray that runs on
            this machine.
        node: the node's id or IP address.  Default: the live node with an address of this machine.

    Raises:
        ClusterError: Ray can't be reached, or has no such node (yet), or several.
    """
    try:
        found = canonicalize_bootstrap_address(address or "auto")
    except (OSError, ValueError) as e:
        raise ClusterError(f"no Ray on this machine: {e}; give --address HOST:PORT") from None
    if found is None:
        raise ClusterError(f"{address} is not the address of a cluster: give --address HOST:PORT")
    wanted = {node} if node else _own_addresses()
    live = _live_nodes(found)
    mine = [n for n in live if _id(n) in wanted or n.node_manager_address in wanted]
    if not mine:
        known = ", ".join(f"{_id(n)} at {n.node_manager_address}" for n in live) or "none"
        raise ClusterError(
            f"Ray at {found} has no live node {node or 'with an address of this machine'}; its "
            f"nodes: {known}"
        )
    if len(mine) > 1:
        ids = ", ".join(_id(n) for n in mine)
        raise ClusterError(f"several nodes of Ray at {found} fit; give one by --node ID: {ids}")
    return RayNode(_id(mine[0]), found, mine[0].is_head_node)


class NodeWatcher:
    """Watches a cloud's notices for a node and drains it; see :meth:`run`."""

    def __init__(
        self,
        node: RayNode,
        poll: Callable[[], Notice | None],
        *,
        rebalance: bool = False,
        poll_s: float = 1.0,
        grace_s: float = 25.0,
        say: Callable[[str], None] = print,
    ) -> None:
        """
        Args:
            poll: asks the cloud, as :meth:`~ray_train_geo.cluster.notices.NoticeSource.poll`.
            rebalance: whether a rebalance recommendation drains too.
            poll_s: seconds from one poll to the next.
            grace_s: seconds that are left when this process is told to terminate.
            say: gets a line for all that happens.
        """
        self._node = node
        self._poll = poll
        self._rebalance = rebalance
        self._poll_s = poll_s
        self._grace_s = grace_s
        self._say = say
        self._notice: Notice | None = None  # the most urgent so far
        self._drained: Notice | None = None  # what Ray was told
        self._troubles = dict[str, str]()
        self._ignored = False

    def run(self, terminated: Callable[[float], bool]) -> Notice | None:
        """Watch until the node has left Ray, or this process is told to terminate.

        A notice drains the node once, and once more if it becomes more urgent.  Errors of metadata
        server and control store are said, once each, and what failed is tried again.

        Args:
            terminated: waits for so many seconds; True at once when SIGTERM comes, which drains
                the node too.

        Returns:
            The notice that Ray was told last, if any.
        """
        asked_at = time.monotonic()
        while True:
            self._look()
            self._drain()
            if time.monotonic() - asked_at >= _ALIVE_EVERY_S:
                asked_at = time.monotonic()
                if self._gone():
                    self._say(f"node {self._node.id} has left Ray: nothing left to watch")
                    return self._drained
            if terminated(self._poll_s):
                return self._terminate(terminated)

    def _terminate(self, terminated: Callable[[float], bool]) -> Notice | None:
        ends = time.time() + self._grace_s
        self._heed(Notice("preemption", ends, "SIGTERM", f"{self._grace_s:g} s are left"))
        self._drain()
        while self._drained is not self._notice and time.time() < ends and not terminated(0.5):
            self._drain()
        return self._drained

    def _look(self) -> None:
        try:
            notice = self._poll()
        except MetadataError as e:
            self._trouble("metadata server", str(e))
            return
        self._trouble("metadata server")
        if notice is None:
            return
        if notice.kind != "rebalance" or self._rebalance:
            self._heed(notice)
        elif not self._ignored:
            self._ignored = True
            self._say(f"ignored without --rebalance: {notice.text}")

    def _heed(self, notice: Notice) -> None:
        """Remember the most urgent notice: some deadlines are counted anew from every poll."""
        known = self._notice
        if known is None or notice.deadline_unix_s < known.deadline_unix_s:
            self._notice = notice

    def _drain(self) -> None:
        notice = self._notice
        if notice is None or notice is self._drained:
            return
        try:
            self._node.drain(notice)
        except ClusterError as e:
            self._trouble("Ray", str(e))
            return
        self._trouble("Ray")
        self._drained = notice
        left_s = notice.deadline_unix_s - time.time()
        until = f"{left_s:.1f} s are left" if math.isfinite(left_s) else "no deadline"
        self._say(f"draining node {self._node.id}: {notice.source} {notice.text} ({until})")

    def _gone(self) -> bool:
        try:
            alive = self._node.alive()
        except ClusterError as e:
            self._trouble("Ray", str(e))
            return False
        self._trouble("Ray")
        return not alive

    def _trouble(self, what: str, message: str = "") -> None:
        """Say what is wrong with whom when it begins, changes or ends."""
        if message != self._troubles.get(what, ""):
            self._troubles[what] = message
            self._say(f"trouble, still trying: {message}" if message else f"{what}: well again")


def _id(info: Any) -> str:
    return str(info.node_id.hex())


def _live_nodes(address: str) -> list[Any]:
    infos = _ask(
        address, lambda gcs: gcs.get_all_node_info(timeout=_GCS_TIMEOUT_S, state_filter=_ALIVE)
    )
    return list(infos.values())


def _ask(address: str, call: Callable[[Any], Any]) -> Any:
    """What the control store at ``address`` says, over a connection of its own.

    Making one takes 2 ms; a kept one would not survive a control store that starts anew.

    Raises:
        ClusterError: it does not answer.
    """
    host, _, port = address.rpartition(":")
    try:
        # Ray itself would wait 40 s for a control store that is not there.
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_GCS_TIMEOUT_S):
            pass
        return call(_RAYLET.GcsClient(address=address))
    except (OSError, ValueError, RayError) as e:
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise ClusterError(f"Ray at {address} does not answer: {reason}") from None


def _own_addresses() -> set[str]:
    """The IP addresses of this machine's interfaces."""
    return {a.address for addresses in psutil.net_if_addrs().values() for a in addresses}
