"""``ray-train-geo attach`` and ``stop``: for runs that go on without the driver that began them."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ray_train_geo.console import AsJson, Overrides, errors, print_json
from ray_train_geo.errors import ClusterError
from ray_train_geo.observe.run_directory import RunDirectory
from ray_train_geo.spec import JobSpec, load_job

if TYPE_CHECKING:
    from ray_train_geo.training.mission import Summary

__all__ = ["attach", "stop", "tell"]

_REASON = "ray-train-geo stop"

_Run = Annotated[Path, typer.Argument(metavar="RUN", help="Run directory, or a job spec.")]
_Address = Annotated[
    str | None,
    typer.Option(help="The run's Ray cluster (HOST:PORT). Default: as the run directory says."),
]


def attach(
    run: _Run, overrides: Overrides = None, address: _Address = None, as_json: AsJson = False
) -> None:
    """Follow a run that is going on until it ends; Ctrl-C leaves it alone."""
    with errors(as_json):
        _follow(*_found(run, overrides, address), as_json, ask_to_stop=False)


def stop(
    run: _Run,
    overrides: Overrides = None,
    address: _Address = None,
    wait: Annotated[bool, typer.Option(help="Follow the run until it has ended.")] = True,
    as_json: AsJson = False,
) -> None:
    """Stop a run that is going on, after the step that is running, with a checkpoint."""
    with errors(as_json):
        job, steps, address = _found(run, overrides, address)
        if wait:
            _follow(job, steps, address, as_json, ask_to_stop=True)
            return
        from ray_train_geo import driver
        from ray_train_geo.connection import connected

        with connected(job, address):
            driver.stop(job, _REASON)
        if as_json:
            print_json({"path": str(job.run.directory), "phase": "stopping"})


def _found(run: Path, overrides: list[str] | None, address: str | None) -> tuple[JobSpec, int, str]:
    """The run's job, its last step, and where its Ray is.

    Raises:
        StorageError: there is no run.
        ClusterError: it has not begun.
    """
    if run.suffix in (".yaml", ".yml") and run.is_file():
        run = load_job(run, overrides or ()).run.directory
    directory = RunDirectory.open(run)
    path = directory.path
    # As the directory is now: a folder can be named from elsewhere than it was then.
    here = (f"run.storage_path={path.parent}", f"run.name={path.name}")
    job = load_job(directory.job_path, here)
    started = [e for e in directory.events() if e["event"] == "start"]
    if not started:
        raise ClusterError(f"the run in {path} has not begun; try again in a few seconds")
    return job, started[-1]["steps"], address or started[-1]["address"]


def _follow(job: JobSpec, steps: int, address: str, as_json: bool, ask_to_stop: bool) -> None:
    from ray_train_geo import driver
    from ray_train_geo.connection import connected
    from ray_train_geo.progress import ConsoleProgress

    console = Console(stderr=as_json)
    with (
        # What Ray prints of its own accord must not get into a program's JSON.
        contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout),
        connected(job, address),
        ConsoleProgress(console, steps) as progress,
    ):
        if ask_to_stop:
            driver.stop(job, _REASON)
        summary = driver.attach(job, [progress])
    tell(summary, console, as_json)


def tell(summary: Summary, console: Console, as_json: bool) -> None:
    """How a run ended, for people and for programs.

    Raises:
        GeoError: it failed.
    """
    if summary.error is not None:
        raise summary.error
    if as_json:
        print_json(
            {
                "phase": summary.phase,
                "step": summary.step,
                "checkpoint": summary.checkpoint,
                "path": summary.path,
            }
        )
    console.print(
        f"{summary.phase} after step {summary.step}; checkpoint: {summary.checkpoint}\n"
        f"report: {summary.path}/report.html",
        soft_wrap=True,
        highlight=False,
    )
