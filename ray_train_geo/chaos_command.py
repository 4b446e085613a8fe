"""``ray-train-geo chaos``: break a cluster under a job on purpose, and see that nothing is lost."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ray_train_geo.chaos.faults import KINDS, parse_faults
from ray_train_geo.chaos.spot import followed
from ray_train_geo.cluster.traces import load_trace
from ray_train_geo.console import AsJson, JobPath, Overrides, errors, print_json
from ray_train_geo.errors import InputError
from ray_train_geo.spec import load_job

if TYPE_CHECKING:
    from ray_train_geo.chaos.goodput import Goodput
    from ray_train_geo.chaos.recovery import Recovery
    from ray_train_geo.chaos.run import ChaosResult

__all__ = ["chaos", "show"]

_COLUMNS = (
    ("noticed", "noticed_s"),
    ("settle", "settle_s"),
    ("plan", "plan_s"),
    ("transfer", "transfer_s"),
    ("build", "build_s"),
    ("commit", "commit_s"),
    ("pause", "pause_s"),
)

_SPEEDUP = 24.0
_MAX_NODES = 8
_NODES = 4

_WIDTH = 140
"""Columns that the table needs; narrower terminals wrap its lines."""


def chaos(
    job_path: JobPath,
    faults: Annotated[
        str | None,
        typer.Option(
            metavar="FAULTS",
            help="What goes wrong, and when: [COUNT*]KIND[:SECONDS][@MOMENT], with commas between. "
            f"KIND: {', '.join(KINDS)}. MOMENT: random (default), step:N, time:S, phase:forward, "
            "backward, sync, optimizer, checkpoint or recovery.",
        ),
    ] = None,
    trace: Annotated[
        str | None,
        typer.Option(
            metavar="TRACE",
            help="Instead of faults: nodes come and go as those of a spot trace, a file or "
            "aws-p3 or gcp-a100.",
        ),
    ] = None,
    speedup: Annotated[
        float | None, typer.Option(help="So many times as fast as the trace. Default: 24.")
    ] = None,
    max_nodes: Annotated[
        int | None,
        typer.Option(min=1, max=64, help="Nodes of the trace at once: a share of it. Default: 8."),
    ] = None,
    until_h: Annotated[
        float | None, typer.Option(help="Hours of the trace. Default: to its last event.")
    ] = None,
    notice_s: Annotated[
        float | None,
        typer.Option(
            help="A node of the trace is drained so many seconds (of the run) before it is killed. "
            "Default: as the trace says."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of random moments and victims.")] = 0,
    nodes: Annotated[
        int | None,
        typer.Option(min=1, max=64, help="Nodes of the cluster, beside its head. Default: 4."),
    ] = None,
    workers_per_node: Annotated[int, typer.Option(min=1, max=64)] = 1,
    replace: Annotated[
        bool, typer.Option(help="A node that is gone for good is replaced by a new one.")
    ] = True,
    limit_s: Annotated[
        float | None,
        typer.Option(
            min=1,
            help="Stop the run after so many seconds. Default: 600, or 300 more than the trace.",
        ),
    ] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Train a job on a Ray cluster of its own on this machine, under faults, and check the run.

    Every step and sample must have counted once, losses must be those of an undisturbed run, and
    nothing may be left behind; exit code 1 if not.
    """
    with errors(as_json):
        played, parsed = None, parse_faults(faults or "")
        if trace is None:
            _refuse_trace_options(speedup, max_nodes, until_h, notice_s)
            if not parsed:
                raise InputError(
                    "--faults names none, and there is no --trace; such as "
                    "--faults kill-worker@phase:backward"
                )
        elif faults is not None or nodes is not None:
            other = "--faults" if faults is not None else "--nodes"
            raise InputError(f"--trace says when nodes come and go: leave {other} out")
        else:
            played = followed(
                load_trace(trace, seed),
                speedup=_SPEEDUP if speedup is None else speedup,
                max_nodes=max_nodes or _MAX_NODES,
                until_h=until_h,
                notice_s=notice_s,
            )
        job = load_job(job_path, overrides or ())
        # Torch takes seconds to import: wrong faults are told before.
        from ray_train_geo.chaos.run import run_chaos

        console = Console(stderr=as_json)
        began = time.monotonic()
        result = run_chaos(
            job,
            parsed,
            trace=played,
            seed=seed,
            nodes=nodes or _NODES,
            workers_per_node=workers_per_node,
            replace=replace,
            limit_s=limit_s,
            say=lambda text: console.print(
                f"{time.monotonic() - began:7.1f} s  {text}",
                highlight=False,
                markup=False,
                soft_wrap=True,
            ),
        )
        if as_json:
            print_json(result.to_json())
        show(console, result)
        if not result.passed:
            raise typer.Exit(1)


def _refuse_trace_options(
    speedup: float | None, max_nodes: int | None, until_h: float | None, notice_s: float | None
) -> None:
    given = {
        "--speedup": speedup, "--max-nodes": max_nodes, "--until-h": until_h,
        "--notice-s": notice_s,
    }  # fmt: skip
    for name, value in given.items():
        if value is not None:
            raise InputError(f"{name} is for a --trace, and there is none")


def show(console: Console, result: ChaosResult) -> None:
    """Print a row a fault, and a line a check."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, caption="times in seconds")
    table.add_column("fault", no_wrap=True)
    for name in ("target", "in", "step"):
        table.add_column(name)
    for name, _ in _COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("lost", justify="right")
    for recovery in result.recoveries:
        table.add_row(*_cells(recovery))
    Console(file=console.file, width=max(console.width, _WIDTH)).print(table)
    for check in result.checks:
        console.print(
            f"{'ok  ' if check.passed else 'FAIL'} {check.name}: {check.detail}",
            style="" if check.passed else "red",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
    if result.goodput is not None:
        for line in _goodput_lines(result.goodput):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(
        f"{result.generations} generations, median step {result.median_step_s:.3g} s, seed "
        f"{result.seed}; report: {result.path}/report.html",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _goodput_lines(found: Goodput) -> list[str]:
    lines = [
        f"goodput {found.share:.1%}: {found.steps} steps ({found.tokens} tokens) in "
        f"{found.seconds:.0f} s, of {found.undisturbed_steps:.0f} that the same device-seconds "
        f"({found.mean_devices:.3g} devices on average) give undisturbed",
        f"  lost: {found.stopped_share:.1%} between generations, {found.unused_share:.1%} for "
        "devices not in use yet, or no longer",
        "  undisturbed steps/s by devices: "
        + ", ".join(f"{n}: {rate:.3g}" for n, rate in found.rates.items()),
    ]
    if found.restarted_share is None:
        why = "the job keeps no checkpoints (checkpoint.interval)"
        return [*lines, f"  checkpoint and restart: not computed, {why}"]
    return [
        *lines,
        f"  checkpoint and restart, computed from the same figures: {found.restarted_share:.1%}, "
        f"with {found.restart_s:.1f} s for each restart",
    ]


def _cells(recovery: Recovery) -> list[str]:
    injection = recovery.injection
    figures = [getattr(recovery, field) for _, field in _COLUMNS]
    return [
        injection.fault.kind,
        injection.target,
        injection.phase or "",
        str(injection.step),
        *("" if value is None else f"{value:.2f}" for value in figures),
        "" if recovery.lost_steps is None else str(recovery.lost_steps),
    ]
