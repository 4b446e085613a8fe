"""``ray-train-geo lab`` and ``lab-do``: emulated hosts on this machine, and changes to them."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ray_train_geo.cluster.topology_file import load_topology
from ray_train_geo.console import errors
from ray_train_geo.errors import ClusterError, SpecError
from ray_train_geo.spec import load_job

if TYPE_CHECKING:
    from ray_train_geo.lab.control import Control
    from ray_train_geo.lab.lab import Lab

__all__ = ["lab", "lab_do"]

_POLL_S = 1.0


def lab(
    command: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- COMMAND...]", help="Run this on a host, and end with it."),
    ] = None,
    scenario: Annotated[
        str | None, typer.Option(help="A named cluster, such as worldwide or regional.")
    ] = None,
    topology: Annotated[
        Path | None, typer.Option(metavar="FILE", help="In its place: a topology file.")
    ] = None,
    hosts: Annotated[
        int | None,
        typer.Option(help="How many of its nodes, spread over the regions. Default: all."),
    ] = None,
    scale: Annotated[
        float, typer.Option(help="What bandwidths are multiplied by; latencies stay.")
    ] = 1.0,
    ray: Annotated[
        bool, typer.Option("--ray", help="Start Ray on all hosts, the head on the first one.")
    ] = False,
    cpus: Annotated[int, typer.Option(min=1, help="CPUs of each host, as Ray is told.")] = 1,
    train: Annotated[
        Path | None,
        typer.Option(metavar="JOB.yaml", help="Train this job inside, and end with it; with Ray."),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="A.B=VALUE", help="Override a field of the job; repeatable."),
    ] = None,
    on: Annotated[
        str | None, typer.Option(metavar="HOST", help="Where COMMAND runs. Default: the first.")
    ] = None,
) -> None:
    """Emulate the hosts of a cluster on this machine, with its slow links between them.

    Without a command or a job it waits for Ctrl-C; meanwhile `ray-train-geo lab-do` changes it.
    """
    with errors():
        if (scenario is None) == (topology is None):
            raise SpecError("give one of --scenario and --topology: it says what is emulated")
        if command and train is not None:
            raise SpecError("--train and a command: one of them runs inside")
        if on is not None and not command:
            raise SpecError(f"--on {on}: it says where a command runs, so give one after --")
        if overrides and train is None:
            raise SpecError("--set changes a job, so also give one with --train")
        # Before anything starts.
        job = None if train is None else load_job(train, overrides or ())
        where = scenario if topology is None else load_topology(topology)
        assert where is not None
        from ray_train_geo.lab.lab import Lab
        from ray_train_geo.lab.ray_nodes import RayOnLab

        with Lab(where, hosts, scale) as emulated:
            _print_hosts(emulated, Console(stderr=bool(command or train)))
            if on is not None:
                emulated.host(on)
            if not (ray or train):
                _run(None if not command else emulated.popen(on or 0, command))
                return
            cluster = RayOnLab(emulated, cpus)
            took_s = cluster.start()
            print(f"Ray at {cluster.address}, up after {took_s:.0f} s", flush=True)
            if train is not None and job is not None:
                sets = list(overrides or ())
                if job.scaling.topology is None:
                    sets.append(f"scaling.topology={emulated.topology_path}")
                command = cluster.train_command(train, sets)
            _run(cluster.popen(on or 0, command) if command else None)


def lab_do(
    action: Annotated[str, typer.Argument(help="cut, heal, shape, kill, boot or traffic.")],
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[HOST|REGION] [HOST|REGION] [FIELD=VALUE...]",
            help="One for kill and boot; one or two for cut and heal; two and fields for shape.",
        ),
    ] = None,
    control: Annotated[
        str | None,
        typer.Option(
            "--lab", envvar="GEO_LAB", metavar="SOCKET", help="As `ray-train-geo lab` prints it."
        ),
    ] = None,
) -> None:
    """Change a lab that runs: `lab-do cut Tokyo London`, `lab-do shape Tokyo Seoul loss=0.01`.

    `shape` takes latency_s, jitter_s, loss, bytes_per_s and flow_bytes_per_s, of one direction.
    """
    with errors():
        from ray_train_geo.lab.control import Control

        if control is None:
            raise ClusterError("which lab? Give --lab SOCKET, as `ray-train-geo lab` prints it")
        with Control(control) as found:
            _do(found, action, words or ())


def _do(control: Control, action: str, words: Sequence[str]) -> None:
    names = [w for w in words if "=" not in w]
    changes = [w.partition("=") for w in words if "=" in w]
    if changes and action != "shape":
        raise SpecError(f"{action} takes no {changes[0][0]}=; shape does")
    match action, names:
        case "cut", [a]:
            control.cut(a)
        case "cut", [a, b]:
            control.cut(a, b)
        case "heal", [a]:
            control.heal(a)
        case "heal", [a, b]:
            control.heal(a, b)
        case "kill", [host]:
            control.kill(host)
        case "boot", [host]:
            control.boot(host)
        case "shape", [a, b] if changes:
            control.shape(a, b, **{name: _number(name, value) for name, _, value in changes})
        case "traffic", []:
            for (a, b), carried in sorted(control.traffic().items()):
                print(f"{a} {b} {carried.size_bytes} bytes, {carried.lost} packets lost")
        case _:
            raise SpecError(
                f"lab-do {' '.join([action, *words])}: it is one of `cut A [B]`, `heal A [B]`, "
                "`shape A B FIELD=VALUE...`, `kill HOST`, `boot HOST` and `traffic`"
            )


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise SpecError(f"{name}={text} is no number") from None


def _run(process: subprocess.Popen[bytes] | None) -> None:
    """Wait for a command, and end as it does; without one, wait for Ctrl-C."""
    if process is None:
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                time.sleep(_POLL_S)
        return
    code = None
    while code is None:
        # The terminal sends Ctrl-C to the command, too, which ends as it sees fit.
        with contextlib.suppress(KeyboardInterrupt):
            code = process.wait()
    if code:
        raise typer.Exit(code if code > 0 else 128 - code)


def _print_hosts(emulated: Lab, console: Console) -> None:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in ("host", "region", "address", "round trips, ms", "a connection gets, Mbit/s"):
        table.add_column(column, no_wrap=True)
    shapes = emulated.shapes()
    for host in emulated.hosts:
        links = [shape for (source, _), shape in shapes.items() if source == host.name]
        table.add_row(
            host.name,
            host.region,
            host.address,
            _range([2e3 * link.latency_s for link in links]),
            _range([8e-6 * min(link.bytes_per_s, link.flow_bytes_per_s) for link in links]),
        )
    console.print(table)
    if not emulated.real_time:
        console.print("no real-time priority here: while the machine is busy, links are slower")
    console.print(
        f"change it with: ray-train-geo lab-do --lab {emulated.control_path} cut HOST",
        soft_wrap=True,
        highlight=False,
    )


def _range(values: list[float]) -> str:
    if not values:
        return "-"
    low, high = f"{min(values):.3g}", f"{max(values):.3g}"
    return low if low == high else f"{low} to {high}"
