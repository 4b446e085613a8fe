"""The driver's part: check a job before anything starts, reach Ray, follow a run to its end."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import ray
from ray.exceptions import ActorDiedError, GetTimeoutError, RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_train_geo.actors.coordinator import Coordinator
from ray_train_geo.actors.workforce import NAMESPACE, end_workers
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

__all__ = ["Callback", "attach", "follow", "prepare", "stop"]

_POLL_S = 0.5
_ANSWER_S = 10.0


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


def follow(mission: Mission, callbacks: Sequence[Callback] = ()) -> Summary:
    """Start the coordinator and pass on what it tells, until the run has ended.

    SIGTERM and SIGINT stop the run in good order: after the step that is running, with a
    checkpoint.  A second one ends it at once.

    Raises:
        ClusterError: a run in the same directory is going on; or it should go on without this
            process, but Ray would not.
        RunError: the coordinator was lost, and Ray did not start it again.
    """
    directory = mission.job.run.directory
    if mission.job.run.on_driver_exit == "continue" and _started_ray():
        raise ClusterError(
            "run.on_driver_exit is continue, but this process started Ray, which ends with it; "
            "start a cluster (`ray start --head`) and name it with --address, or choose stop"
        )
    try:
        # Detached, so that it outlives a driver that is killed; see actors.coordinator.
        actor: Any = Coordinator  # what @ray.remote has made of the class
        coordinator = actor.options(
            name=_name(directory),
            namespace=NAMESPACE,
            lifetime="detached",
            max_restarts=-1,
            scheduling_strategy=NodeAffinitySchedulingStrategy(
                ray.get_runtime_context().get_node_id(), soft=False
            ),
            runtime_env={"env_vars": {"OMP_NUM_THREADS": "1", "RAY_IGNORE_UNHANDLED_ERRORS": "1"}},
        ).remote(mission)
    except ValueError:
        raise ClusterError(
            f"a run is going on in {directory}; stop it (ray-train-geo stop {directory}), or "
            "change run.name"
        ) from None
    try:
        with _signals() as signals:
            return _follow(coordinator, mission.job, callbacks, signals)
    finally:
        with contextlib.suppress(RayError):
            ray.kill(coordinator)
        end_workers(mission.session)


def _started_ray() -> bool:
    node = ray._private.worker._global_node
    return node is not None and node.is_head()


def attach(job: JobSpec, callbacks: Sequence[Callback] = ()) -> Summary:
    """Follow a run that goes on without this process, until it has ended.

    Raises:
        ClusterError: no run of ``job`` is going on in this Ray cluster.
        RunError: the coordinator was lost, and Ray did not start it again.
    """
    return _follow(_running(job), job, callbacks, [])


def stop(job: JobSpec, reason: str) -> None:
    """Ask the run of ``job`` to stop after the step that is running, with a checkpoint.

    Raises:
        ClusterError: as :func:`attach`.
        RunError: the coordinator does not answer.
    """
    coordinator, patience_s = _running(job), job.failure.coordinator_patience_s
    _ask(coordinator, lambda: coordinator.stop.remote(reason), patience_s)


def _running(job: JobSpec) -> Any:
    directory = job.run.directory
    try:
        return ray.get_actor(_name(directory), NAMESPACE)
    except ValueError:
        raise ClusterError(
            f"no run is going on in {directory} on this Ray cluster; `ray-train-geo status "
            f"{directory}` shows how it ended"
        ) from None


def _name(directory: Path) -> str:
    """The coordinator's: two runs in one directory can't be."""
    return f"{directory.name}-{hashlib.sha256(str(directory).encode()).hexdigest()[:8]}"


def _follow(
    coordinator: Any, job: JobSpec, callbacks: Sequence[Callback], signals: list[str]
) -> Summary:
    patience_s = job.failure.coordinator_patience_s
    step, events, told = 0, 0, False
    while True:
        if signals and not told:
            _ask(coordinator, lambda: coordinator.stop.remote(signals[0]), patience_s, signals)
            told = True
        progress: Progress = _ask(
            coordinator, functools.partial(coordinator.progress.remote, step, events), patience_s,
            signals,
        )  # fmt: skip
        records, events = progress.records, events + len(progress.events)
        # Steps that were lost are computed, and told of, once more.
        lost = [e["step"] for e in progress.events if e.get("lost_steps")]
        if lost:
            step, records = min(lost), []
        elif records:
            step = records[-1]["step"]
        for news in sorted([*records, *progress.events], key=lambda n: n["time"]):
            for callback in callbacks:
                if "event" in news:
                    callback.on_event(news)
                else:
                    callback.on_step(news)
        if progress.summary is not None and not lost:
            return progress.summary
        time.sleep(_POLL_S)


def _ask(
    coordinator: Any, call: Callable[[], Any], patience_s: float, signals: Sequence[str] = ()
) -> Any:
    """The coordinator's answer; while it is being replaced, that of its successor.

    Raises:
        RunError: it is gone for good, or there was no answer for ``patience_s``.
        KeyboardInterrupt: two signals came.
    """
    until = time.monotonic() + patience_s
    while True:
        if len(signals) > 1:
            raise KeyboardInterrupt
        try:
            return ray.get(call(), timeout=_ANSWER_S)
        except GetTimeoutError:
            why = "it does not answer"
        except RayActorError as e:
            why = str(e).splitlines()[0]
            if isinstance(e, ActorDiedError):  # not one that is being replaced
                raise RunError(f"the coordinator was lost: {why}") from None
        if time.monotonic() > until:
            raise RunError(f"the coordinator was lost for {patience_s:g} s: {why}")
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
