"""Reaching Ray: a cluster that is there, or one of our own on this machine."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from typing import Any

import ray
from ray._private.services import canonicalize_bootstrap_address
from ray.exceptions import RayError

from ray_train_geo.actors.workforce import NAMESPACE
from ray_train_geo.errors import ClusterError
from ray_train_geo.spec import JobSpec

__all__ = ["connected", "joined"]

_OBJECT_STORE_BYTES = 200 * 2**20
_MOST_LOCAL_WORKERS = 16
_REACH_S = 10.0
_QUIET: dict[str, Any] = {
    "namespace": NAMESPACE,
    "log_to_driver": False,
    "logging_level": "ERROR",
}
_HTTP2_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"


@contextlib.contextmanager
def connected(job: JobSpec, address: str | None = None) -> Iterator[None]:
    """Be connected to Ray: the one already initialised, the one at ``address`` (or RAY_ADDRESS),
    or one of our own on this machine, which ends with the context.

    Raises:
        ClusterError: Ray can't be reached or started.
    """
    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS") or None
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # a crew hears all its workers
    if address not in (None, "local"):
        with joined(address):
            yield
        return
    # A cluster of our own is private to this machine; other Ray clusters here stay untouched.
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    folder = tempfile.mkdtemp(prefix="rtg-")
    try:
        try:
            ray.init(
                address="local",
                num_cpus=_local_cpus(job),
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE_BYTES,
                _temp_dir=folder,
                **_QUIET,
            )
        except (ConnectionError, RuntimeError, ValueError, OSError, RayError) as e:
            reason = str(e).strip().splitlines()[0]
            raise ClusterError(f"can't start Ray on this machine: {reason}") from None
        try:
            yield
        finally:
            ray.shutdown()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def joined(address: str) -> Iterator[None]:
    """Be connected to the Ray cluster at ``address`` (HOST:PORT or auto).

    Raises:
        ClusterError: Ray can't be reached there.
    """
    try:
        _reach(address)
        ray.init(address=address, **_QUIET)
    except (OSError, RuntimeError, ValueError, RayError) as e:
        reason = getattr(e, "strerror", None) or str(e).strip().splitlines()[0]
        raise ClusterError(
            f"can't reach Ray at {address}: {reason}; start it there with `ray start --head`, "
            "or correct --address (or RAY_ADDRESS): it is HOST:PORT, by default port 6379"
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


def _reach(address: str) -> None:
    """Ask whether a Ray head listens at ``address``: ``ray.init`` itself would try for ever.

    Raises:
        OSError, ValueError: it does not, or it is no address.
    """
    client = "://" in address
    bare = address.partition("://")[2] if client else canonicalize_bootstrap_address(address)
    host, _, port = (bare or address).rpartition(":")
    with socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH_S) as connection:
        if client or os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):
            return
        # A head speaks gRPC: its first frame is HTTP/2 settings.  A dashboard's port does not.
        connection.sendall(_HTTP2_HELLO)
        if connection.makefile("rb").read(9)[3:4] != b"\4":
            raise ConnectionError("what answers there is no Ray head")


def _local_cpus(job: JobSpec) -> int:
    """This machine's cores, or a few more: workers of a small fixed plan may share a core."""
    cores = os.cpu_count() or 1
    pipelines, stages = job.fixed_pipelines(), job.parallelism.stages
    bounds = job.stage_boundaries()
    depths = [len(b) - 1 for b in bounds] if bounds else [stages or 1]
    workers = sum(depths) if len(depths) > 1 else depths[0] * (pipelines or 1)
    if workers > _MOST_LOCAL_WORKERS:
        return cores
    return max(cores, int(workers * job.scaling.resources_per_worker.get("CPU", 0.0) + 0.999))
