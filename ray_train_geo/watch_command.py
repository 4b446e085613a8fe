"""``ray-train-geo watch-node``: drains this Ray node when the cloud gives notice that it ends."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ray_train_geo.console import errors
from ray_train_geo.errors import ClusterError, InputError

if TYPE_CHECKING:
    from ray_train_geo.actors.node_watcher import RayNode
    from ray_train_geo.cluster.notices import NoticeSource

__all__ = ["watch_node"]

_RETRY_S = 1.0


def watch_node(
    cloud: Annotated[
        Literal["auto", "aws", "gcp", "azure"],
        typer.Option(help="Whose notices. auto: found out; ends where there is no cloud."),
    ] = "auto",
    address: Annotated[
        str | None,
        typer.Option(
            help="Ray's control store, HOST:PORT. Default: RAY_ADDRESS, or the Ray on this machine."
        ),
    ] = None,
    node: Annotated[
        str | None,
        typer.Option(help="The node's id or IP address. Default: the node on this machine."),
    ] = None,
    rebalance: Annotated[
        bool, typer.Option("--rebalance", help="Drain at AWS's rebalance recommendations too.")
    ] = False,
    poll_s: Annotated[
        float, typer.Option(min=0.1, max=60, help="Seconds from one look for notices to the next.")
    ] = 1.0,
    grace_s: Annotated[
        float, typer.Option(min=0, help="Seconds that are left when SIGTERM comes.")
    ] = 25.0,
    wait_s: Annotated[
        float, typer.Option(min=0, help="Seconds to wait for the node to join Ray.")
    ] = 300.0,
    metadata_url: Annotated[
        str | None,
        typer.Option(help="An imitation of the cloud's metadata server, for drills."),
    ] = None,
) -> None:
    """Drain this Ray node as soon as the cloud gives notice that its machine ends, or at SIGTERM.

    Runs beside Ray on a spot node, as long as the node is part of Ray.
    """
    with errors(), _terminations() as terminated:
        source = _source(cloud, metadata_url)
        if source is None:
            _say("no cloud: no metadata server answers as AWS, GCP or Azure; nothing to watch")
            return
        # Ray takes a second to import.
        from ray_train_geo.actors.node_watcher import NodeWatcher

        found = _find(address, node, wait_s, terminated)
        if found is None:
            return
        if found.is_head:
            raise ClusterError(
                f"node {found.id} is the head of Ray at {found.address}, and no cluster outlives "
                "its head: let it be an on-demand machine, and watch the other nodes"
            )
        _say(f"watching {source.cloud}'s notices for node {found.id} of Ray at {found.address}")
        watcher = NodeWatcher(
            found, source.poll, rebalance=rebalance, poll_s=poll_s, grace_s=grace_s, say=_say
        )
        watcher.run(terminated)


def _source(
    cloud: Literal["auto", "aws", "gcp", "azure"], metadata_url: str | None
) -> NoticeSource | None:
    """Where notices come from; None if there is no cloud."""
    from ray_train_geo.cluster.notices import METADATA_URL, detect_cloud, notice_source

    url = metadata_url or METADATA_URL
    if not url.startswith("http://"):
        raise InputError(f"--metadata-url {url} is not http://HOST:PORT")
    return detect_cloud(url) if cloud == "auto" else notice_source(cloud, url)


def _find(
    address: str | None, node: str | None, wait_s: float, terminated: Callable[[float], bool]
) -> RayNode | None:
    """This machine's node, once it has joined; None if SIGTERM came before.

    Raises:
        ClusterError: it has not joined within ``wait_s``.
    """
    from ray_train_geo.actors.node_watcher import find_node

    ends, said = time.monotonic() + wait_s, ""
    while True:
        try:
            return find_node(address, node)
        except ClusterError as e:
            if time.monotonic() >= ends:
                raise
            if str(e) != said:
                said = str(e)
                _say(f"waiting for the node: {said}")
        if terminated(_RETRY_S):
            return None


@contextlib.contextmanager
def _terminations() -> Iterator[Callable[[float], bool]]:
    """A function that waits for so many seconds, and is True at once when SIGTERM comes.

    SIGTERM is blocked and taken from the kernel's hands between two steps of the work: a handler
    could run in the midst of one.  Threads that start later inherit the block.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield lambda s: signal.sigtimedwait({signal.SIGTERM}, s) is not None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _say(text: str) -> None:
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} watch-node: {text}", flush=True)
