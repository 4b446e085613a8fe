"""The Python API, with Ray Train's names: ``GeoTrainer(job).fit() -> Result``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray_train_geo.connection import connected
from ray_train_geo.driver import Callback, follow, prepare
from ray_train_geo.errors import GeoError
from ray_train_geo.observe.run_directory import RunDirectory
from ray_train_geo.spec import JobSpec, load_job, parse_job

__all__ = [
    "Checkpoint",
    "CheckpointConfig",
    "FailureConfig",
    "GeoTrainer",
    "Result",
    "RunConfig",
    "ScalingConfig",
]


@dataclass(frozen=True)
class ScalingConfig:
    """Which devices to use; replaces fields of the job's ``scaling``.

    Args:
        num_workers: workers to use, exactly; or ``(fewest, most)``.
        use_gpu: one GPU a worker (unless ``resources_per_worker`` says otherwise).
        resources_per_worker: Ray resources of one worker.
        label_selector: labels a node must carry.
    """

    num_workers: int | tuple[int, int] | None = None
    use_gpu: bool = False
    resources_per_worker: Mapping[str, float] | None = None
    label_selector: Mapping[str, str] | None = None

    def overrides(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if self.num_workers is not None:
            fewest, most = (
                self.num_workers
                if isinstance(self.num_workers, tuple)
                else (self.num_workers, self.num_workers)
            )
            found |= {"min_devices": fewest, "max_devices": most}
        if self.resources_per_worker is not None:
            found["resources_per_worker"] = dict(self.resources_per_worker)
        elif self.use_gpu:
            found["resources_per_worker"] = {"CPU": 1.0, "GPU": 1.0}
        if self.label_selector is not None:
            found["label_selector"] = dict(self.label_selector)
        return found


@dataclass(frozen=True)
class FailureConfig:
    """Lost workers: failures in a row that are recovered from, and how the run prepares for them.

    Args:
        max_failures: with no step committed between them.
        memory_copies: steps between in-memory copies of what one node alone holds; 0: none, None:
            as the job says.
        wait_s: for devices, where too few are left; None: as the job says.
    """

    max_failures: int = 3
    memory_copies: int | None = None
    wait_s: float | None = None


@dataclass(frozen=True)
class CheckpointConfig:
    """How many checkpoints to keep, and how many steps lie between them."""

    num_to_keep: int | None = None
    checkpoint_frequency: int | None = None


@dataclass(frozen=True)
class RunConfig:
    """Where the run's record goes; replaces fields of ``run``, ``failure`` and ``checkpoint``."""

    name: str | None = None
    storage_path: str | Path | None = None
    failure_config: FailureConfig | None = None
    checkpoint_config: CheckpointConfig | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: hand ``path`` to ``fit(resume=...)`` or ``ray-train-geo export``."""

    path: str


@dataclass(frozen=True)
class Result:
    """How a run went.

    Args:
        metrics: the last committed step's record; empty if there was none.
        checkpoint: the newest complete checkpoint.
        error: why the run failed, if it did (only with ``fit(raise_on_error=False)``).
        path: the run directory.
        stopped: it was stopped before its last step.
    """

    metrics: dict[str, Any]
    checkpoint: Checkpoint | None
    error: GeoError | None
    path: str
    stopped: bool = False
    history: list[dict[str, Any]] = field(default_factory=list, repr=False)


class GeoTrainer:
    """Trains one job on Ray.

    Args:
        job: a :class:`JobSpec`, a mapping of its sections, or the path of a YAML file.
        scaling_config: replaces fields of the job's ``scaling``.
        run_config: replaces fields of the job's ``run``, ``failure`` and ``checkpoint``.
        callbacks: told of every committed step and every event.
        overrides: ``a.b=value`` texts, as on the command line.
        address: a Ray cluster; by default the one already initialised, or RAY_ADDRESS, or one of
            our own on this machine.

    Raises:
        SpecError: the job is wrong.
    """

    def __init__(
        self,
        job: JobSpec | Mapping[str, Any] | str | Path,
        *,
        scaling_config: ScalingConfig | None = None,
        run_config: RunConfig | None = None,
        callbacks: Sequence[Callback] = (),
        overrides: Sequence[str] = (),
        address: str | None = None,
    ) -> None:
        if isinstance(job, str | Path):
            job = load_job(job, overrides)
        elif not isinstance(job, JobSpec):
            job = parse_job(job, overrides)
        elif overrides:
            job = parse_job(job.model_dump(mode="json"), overrides)
        self.job = _configured(job, scaling_config, run_config)
        self._callbacks = callbacks
        self._address = address

    def fit(
        self,
        resume: bool | str = False,
        until: int | None = None,
        raise_on_error: bool = True,
    ) -> Result:
        """Train to the end and return how it went.

        Args:
            resume: True to go on from the run's newest checkpoint, or the path of one.
            until: stop after this step, with a checkpoint.
            raise_on_error: raise what made a run fail; else it is the result's ``error``.

        Raises:
            InputError: wrong input; nothing was started.
            RunError: the run failed.
        """
        mission = prepare(self.job, resume, until)
        with connected(self.job, self._address):
            summary = follow(mission, self._callbacks)
        if summary.error is not None and raise_on_error:
            raise summary.error
        history = RunDirectory.open(Path(summary.path)).metrics()
        return Result(
            metrics=history[-1] if history else {},
            checkpoint=Checkpoint(summary.checkpoint) if summary.checkpoint else None,
            error=summary.error,
            path=summary.path,
            stopped=summary.phase == "stopped",
            history=history,
        )


def _configured(job: JobSpec, scaling: ScalingConfig | None, run: RunConfig | None) -> JobSpec:
    raw = job.model_dump(mode="json")
    if scaling is not None:
        raw["scaling"] |= scaling.overrides()
    if run is not None:
        if run.name is not None:
            raw["run"]["name"] = run.name
        if run.storage_path is not None:
            raw["run"]["storage_path"] = str(run.storage_path)
        if run.failure_config is not None:
            given = dataclasses.asdict(run.failure_config)
            raw["failure"] |= {name: value for name, value in given.items() if value is not None}
        kept = run.checkpoint_config
        if kept is not None and kept.num_to_keep is not None:
            raw["checkpoint"]["keep"] = kept.num_to_keep
        if kept is not None and kept.checkpoint_frequency is not None:
            raw["checkpoint"]["interval"] = kept.checkpoint_frequency
    return parse_job(raw)
