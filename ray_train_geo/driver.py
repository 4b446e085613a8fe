"""The driver's part: check a job before anything starts, reach Ray, follow a run to its end."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import ray
from ray._private.services import canonicalize_bootstrap_address
from ray.exceptions import GetTimeoutError, RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_train_geo.actors.coordinator import Coordinator
from ray_train_geo.cluster.topology_file import load_topology
from ray_train_geo.data.dataset import open_dataset
from ray_train_geo.errors import CheckpointError, ClusterError, RunError, StorageError
from ray_train_geo.observe.run_directory import RunDirectory
from ray_train_geo.spec import JobSpec
from ray_train_geo.training.checkpoint import CheckpointStore, read_manifest
from ray_train_geo.training.identity import check_identity, check_model, identity
from ray_train_geo.training.mission import (
    Mission,
    Progress,
    Summary,
    checkpoint_root,
)

__all__ = ["Callback", "connected", "follow", "prepare"]

_NAMESPACE = "ray_train_geo"
_POLL_S = 0.5
_ANSWER_S = 60.0
_OBJECT_STORE_BYTES = 200 * 2**20
_MOST_LOCAL_WORKERS = 16
_REACH_S = 10.0
_HTTP2_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"


class Callback(Protocol):
    """Who wants to know how a run goes.  Subclasses may leave methods out.

    ``record`` and ``event`` are what ``metrics.jsonl`` and ``events.jsonl`` hold.
    """

    def on_step(self, record: dict[str, Any]) -> None:
        """A step was committed."""

    def on_event(self, event: dict[str, Any]) -> None:
        """Something happened."""


def prepare(job: JobSpec, resume: bool | str = False, until: int | None = None) -> Mission:
    """Check all that can be checked without Ray, and make the run directory.

    Args:
        resume: True for the run's newest complete checkpoint, or the path of one.
        until: stop after this step (the learning rate still follows the job's number of steps).

    Raises:
        InputError: data, tokenizer, topology file, storage or checkpoint can't be used.
    """
    if job.scaling.topology is not None:
        load_topology(Path(job.scaling.topology))
    data = open_dataset(job.data, job.training.seq_len)
    dims = job.dims(data.vocab_size)
    data.require_vocab(dims.vocab_size)
    if job.model.init_from is not None:
        saved = read_manifest(job.model.init_from).identity
        check_model(saved, dims, f"model.init_from {job.model.init_from}")
    location = _resume_location(job, resume)
    if location is not None:
        mine = identity(job, dims, data.fingerprint)
        check_identity(read_manifest(location).identity, mine, f"checkpoint {location}")
        run = _open_or_create(job)
    else:
        _refuse_foreign_checkpoints(job)
        run = RunDirectory.create(job.run.directory)
    run.write_text("job.yaml", job.to_yaml())
    store = CheckpointStore(checkpoint_root(job))
    store.remove_probe(store.probe())
    return Mission(
        job=job,
        vocab_size=data.vocab_size,
        data_fingerprint=data.fingerprint,
        bytes_per_token=data.bytes_per_token,
        resume=location,
        until=until,
    )


def _open_or_create(job: JobSpec) -> RunDirectory:
    """The run's directory; a new one if only the checkpoints (at a URL) are left."""
    directory = job.run.directory
    if directory.exists():
        with contextlib.suppress(StorageError):
            run = RunDirectory.open(directory)
            os.close(run.hold())
            return run
    return RunDirectory.create(directory)


def _resume_location(job: JobSpec, resume: bool | str) -> str | None:
    if not resume:
        return None
    if isinstance(resume, str):
        return find_checkpoint(resume)
    root = checkpoint_root(job)
    newest = CheckpointStore(root).newest()
    if newest is None:
        raise CheckpointError(
            f"nothing to resume: {root} holds no complete checkpoint; start without --resume"
        )
    return newest


def find_checkpoint(path: str) -> str:
    """The checkpoint at ``path``, or the newest one of the run (or folder of checkpoints) there.

    Raises:
        CheckpointError: there is none.
    """
    if "://" not in path:
        path = str(Path(path).expanduser().absolute())
    for root in (f"{path}/checkpoints", path):
        newest = CheckpointStore(root).newest()
        if newest is not None:
            return newest
    read_manifest(path)
    return path


def _refuse_foreign_checkpoints(job: JobSpec) -> None:
    """Checkpoints in the run directory move aside with it; elsewhere they must not be mixed."""
    if job.checkpoint.storage_path is None:
        return
    root = checkpoint_root(job)
    newest = CheckpointStore(root).newest()
    if newest is not None:
        raise StorageError(
            f"{root} already holds checkpoints of a run of this name ({newest}); go on with "
            "--resume, or choose another run.name"
        )


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
    common: dict[str, Any] = {
        "namespace": _NAMESPACE,
        "log_to_driver": False,
        "logging_level": "ERROR",
    }
    if address not in (None, "local"):
        try:
            _reach(address)
            ray.init(address=address, **common)
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
                **common,
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


def follow(mission: Mission, callbacks: Sequence[Callback] = ()) -> Summary:
    """Start the coordinator and pass on what it tells, until the run has ended.

    SIGTERM and SIGINT stop the run in good order: after the step that is running, with a
    checkpoint.  A second one ends it at once.

    Raises:
        ClusterError: a run in the same directory is going on.
        RunError: the coordinator was lost.
    """
    directory = mission.job.run.directory
    name = f"{mission.job.run.name}-{hashlib.sha256(str(directory).encode()).hexdigest()[:8]}"
    try:
        # Detached, so that it outlives a driver that is killed; see actors.coordinator.
        actor: Any = Coordinator  # what @ray.remote has made of the class
        coordinator = actor.options(
            name=name,
            namespace=_NAMESPACE,
            lifetime="detached",
            scheduling_strategy=NodeAffinitySchedulingStrategy(
                ray.get_runtime_context().get_node_id(), soft=False
            ),
            runtime_env={"env_vars": {"OMP_NUM_THREADS": "1", "RAY_IGNORE_UNHANDLED_ERRORS": "1"}},
        ).remote(mission)
    except ValueError:
        raise ClusterError(
            f"a run is going on in {directory}; stop it, or change run.name"
        ) from None
    try:
        with _signals() as signals:
            return _follow(coordinator, callbacks, signals)
    finally:
        with contextlib.suppress(RayError):
            ray.kill(coordinator)


def _follow(coordinator: Any, callbacks: Sequence[Callback], signals: list[str]) -> Summary:
    running, told = coordinator.run.remote(), False
    while True:
        if signals and not told:
            coordinator.stop.remote(signals[0])
            told = True
        if len(signals) > 1:
            raise KeyboardInterrupt
        try:
            progress: Progress = ray.get(coordinator.progress.remote(), timeout=_ANSWER_S)
        except GetTimeoutError:
            raise RunError(f"the coordinator has not answered for {_ANSWER_S:g} s") from None
        except RayActorError as e:
            with contextlib.suppress(GetTimeoutError):
                ray.get(running, timeout=0)
            raise RunError(f"the coordinator was lost: {str(e).splitlines()[0]}") from None
        for news in sorted([*progress.records, *progress.events], key=lambda n: n["time"]):
            for callback in callbacks:
                if "event" in news:
                    callback.on_event(news)
                else:
                    callback.on_step(news)
        if progress.summary is not None:
            return progress.summary
        time.sleep(_POLL_S)


@contextlib.contextmanager
def _signals() -> Iterator[list[str]]:
    """The names of the stop signals that came, as they come; only a main thread gets any."""
    came: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    before = {
        number: signal.signal(number, lambda n, _: came.append(signal.Signals(n).name))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
