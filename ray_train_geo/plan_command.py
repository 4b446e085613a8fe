"""``ray-train-geo plan``: which layers would run where, how long a step takes, and why."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ray_train_geo.console import Address, AsJson, Overrides, errors
from ray_train_geo.errors import SpecError, StorageError
from ray_train_geo.job_options import (
    Codecs,
    GlobalBatch,
    JobPath,
    Microbatch,
    Model,
    PrecisionOption,
    Recompute,
    SeqLen,
    codec_names,
)
from ray_train_geo.spec import GradientSyncChoice, JobSpec, ScheduleChoice, load_job

if TYPE_CHECKING:
    from ray_train_geo.cluster.topology import Topology
    from ray_train_geo.planning.explain import Explanation, PipelineFigures
    from ray_train_geo.planning.plan import Plan
    from ray_train_geo.planning.request import PlanRequest

__all__ = ["plan"]

_PICTURES = (".png", ".svg")
_MOST_TABLES = 12
"""Kinds of pipelines that are shown; ``--json`` has all."""

_GIB = 2**30
_TO_EXPLAIN = 0.1  # of the time for the search: for what would help
_ROOMY, _WIDE = 100, 140  # columns of a terminal: from where on tables have air, and no more


def plan(
    job_path: JobPath = None,
    scenario: Annotated[
        str | None,
        typer.Option(help="Plan for a named cluster, such as worldwide, mixed or random-7."),
    ] = None,
    topology: Annotated[
        Path | None, typer.Option(help="Plan for the devices in this topology file.")
    ] = None,
    model: Model = None,
    global_batch: GlobalBatch = None,
    seq_len: SeqLen = None,
    microbatch: Microbatch = None,
    precision: PrecisionOption = None,
    recompute: Recompute = None,
    stages: Annotated[
        int | None, typer.Option(help="Stages of each pipeline. Default: searched.")
    ] = None,
    replicas: Annotated[
        int | None, typer.Option(help="Number of pipelines. Default: searched.")
    ] = None,
    schedule: Annotated[ScheduleChoice | None, typer.Option(help="Default: 1f1b.")] = None,
    gradient_sync: Annotated[
        GradientSyncChoice | None,
        typer.Option(help="How pipelines sum gradients. Default: the fastest."),
    ] = None,
    objective: Annotated[
        Literal["step-time", "dollars", "dtfm"],
        typer.Option(help="Minimise seconds a step, $ per million tokens, or DT-FM's cost."),
    ] = "step-time",
    codecs: Codecs = None,
    max_dollars_per_hour: Annotated[
        float | None, typer.Option(help="Most that all used devices together may cost.")
    ] = None,
    moves: Annotated[
        int | None,
        typer.Option(help="Changes that the local search tries. Default: by devices."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the local search.")] = 0,
    budget_s: Annotated[
        float | None, typer.Option(help="Seconds to search at most. Default: no limit.")
    ] = None,
    vocab_size: Annotated[
        int | None,
        typer.Option(help="Tokens of the vocabulary. Default: the model's or the tokenizer's."),
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also draw the plan's map, as .png or .svg."),
    ] = None,
    overrides: Overrides = None,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Show which layers would run where, and why; nothing is started.

    For a job or for a model, on a live cluster (a job alone), a scenario or a topology file.
    """
    with errors(as_json):
        _check_picture(picture)
        job = None if job_path is None else load_job(job_path, overrides or ())
        devices: Topology | Path | None = topology
        if job is not None:
            vocab_size = vocab_size or _tokenizer_vocab(job)
            if scenario is None and topology is None:
                devices = _live_topology(job, address)
        from ray_train_geo.planning.budget import Budget
        from ray_train_geo.planning.explain import explain
        from ray_train_geo.planning.request import request

        wanted = request(
            job,
            scenario=scenario,
            topology=devices,
            model=model,
            global_batch=global_batch,
            seq_len=seq_len,
            microbatch=microbatch,
            precision=precision,
            recompute=recompute,
            stages=stages,
            replicas=replicas,
            schedule=schedule,
            gradient_sync=gradient_sync,
            objective=objective,
            codecs=codec_names(codecs),
            max_dollars_per_hour=max_dollars_per_hour,
            moves=moves,
            seed=seed,
            budget_s=budget_s,
            vocab_size=vocab_size,
            overrides=() if job is not None else overrides or (),
        )
        made = wanted.plan()
        # Large clusters take a second for each change that may help.
        trying = Budget(None if budget_s is None else _TO_EXPLAIN * budget_s)
        explained = explain(made, wanted.topology, wanted.job, wanted.vocab_size, trying)
        if picture is not None:
            _draw(picture, made, wanted)
        if as_json:
            found = {**made.to_json(), "explanation": explained.to_json()}
            print(json.dumps(found, allow_nan=False), flush=True)
        else:
            _print(made, explained)


def _check_picture(path: Path | None) -> None:
    if path is None:
        return
    if path.suffix.lower() not in _PICTURES:
        raise SpecError(f"--picture {path}: the name must end in {' or '.join(_PICTURES)}")
    if not path.parent.is_dir():
        raise StorageError(f"--picture {path}: there is no folder {path.parent}")


def _draw(path: Path, made: Plan, wanted: PlanRequest) -> None:
    from ray_train_geo.observe.plan_map import plan_map
    from ray_train_geo.observe.rendering import to_png, to_svg

    figure = plan_map(made, wanted.topology)
    content = to_png(figure) if path.suffix.lower() == ".png" else to_svg(figure).encode()
    try:
        path.write_bytes(content)
    except OSError as e:
        raise StorageError(f"can't write the picture {path}: {e.strerror or e}") from None


def _tokenizer_vocab(job: JobSpec) -> int | None:
    """What only the job's data can tell: None where the job, or its byte tokenizer, says it."""
    named = job.model.name is not None or job.model.vocab_size is not None
    if named or job.data.tokenizer == "byte":
        return None
    from ray_train_geo.data.dataset import open_dataset

    return open_dataset(job.data, job.training.seq_len).vocab_size


def _live_topology(job: JobSpec, address: str | None) -> Topology:
    """The devices of a live cluster (or of this machine), with speeds that nobody measured."""
    from ray_train_geo.actors.discovery import wait_for_devices
    from ray_train_geo.cluster.topology import Topology
    from ray_train_geo.cluster.topology_file import load_topology
    from ray_train_geo.connection import connected

    network = Topology(()) if job.scaling.topology is None else load_topology(job.scaling.topology)
    with connected(job, address):
        return network.with_devices(wait_for_devices(job.scaling, job.scaling.min_devices, None))


def _print(made: Plan, explained: Explanation) -> None:
    console = Console()
    console = Console(width=min(console.width, _WIDE))
    kinds = _kinds(explained.pipelines)
    for alike in kinds[:_MOST_TABLES]:
        console.print(_title(explained.pipelines, alike), highlight=False, markup=False)
        console.print(_table(explained.pipelines[alike[0]], roomy=console.width >= _ROOMY))
        console.print()
    if len(kinds) > _MOST_TABLES:
        hidden = sum(map(len, kinds[_MOST_TABLES:]))
        console.print(f"... and {hidden} more pipelines; --json has all\n", highlight=False)

    b, step_s = explained.breakdown, explained.step_s
    parts = (
        ("compute", b.compute_s),
        ("bubble", b.bubble_s),
        ("gradient sync", b.sync_s),
        ("optimizer", b.optimizer_s),
        ("commit", b.commit_s),
    )
    shares = ", ".join(f"{name} {seconds / step_s:.0%}" for name, seconds in parts)
    codecs = sorted({s.codec for p in made.pipelines for s in p.stages[:-1]} - {"none"})
    ways = ", ".join((made.schedule, made.gradient_sync, *codecs))
    lines = [
        ("step", f"{_seconds(step_s)} a step predicted ({ways}): {shares}"),
        ("bottleneck", explained.bottleneck),
        ("bound", explained.bound),
    ]
    if made.certificate is not None and made.certificate.objective == "dollars":
        lines.insert(1, ("price", f"${made.certificate.value:.4g} per million tokens"))
    lines += [
        ("would help" if i == 0 else "", f"-{g.saved:.1%}: {g.change}")
        for i, g in enumerate(explained.gains)
    ]
    lines += [("note", note) for note in made.notes]
    lines.append(("search", f"took {made.search_s:.2f} s"))
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column()
    for name, text in lines:
        grid.add_row(name, Text(text))
    console.print(grid)


def _kinds(pipelines: Sequence[PipelineFigures]) -> list[list[int]]:
    """Numbers of the pipelines, those together that look alike in a table.

    Of two that stay within a region each, it does not matter in which.
    """
    alike: dict[str, list[int]] = {}
    for i, p in enumerate(pipelines):
        regions = [s.region for s in p.stages]
        key = (
            regions if len(set(regions)) > 1 else None,
            [(s.type, s.layers) for s in p.stages],
            [(s.hop.codec, _seconds(s.hop.transfer_s)) for s in p.stages if s.hop is not None],
        )
        alike.setdefault(repr(key), []).append(i)
    return list(alike.values())


def _title(pipelines: Sequence[PipelineFigures], alike: Sequence[int]) -> str:
    more = f" and {len(alike) - 1} more like it" if len(alike) > 1 else ""
    starts = list(dict.fromkeys(pipelines[i].stages[0].region for i in alike))
    where = f" in {', '.join(starts)}" if len(starts) > 1 else ""
    counts = sorted({pipelines[i].microbatches for i in alike})
    count = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]}-{counts[-1]}"
    each = " each" if len(alike) > 1 else ""
    return f"pipeline {alike[0]}{more}{where}: {count} microbatches a step{each}"


def _table(pipeline: PipelineFigures, roomy: bool) -> Table:
    """One row a stage; compute, busy (the hop below) and idle are of the step."""
    table = Table(box=SIMPLE_HEAD, padding=(0, int(roomy), 0, 0), pad_edge=False, show_edge=False)
    coded = any(s.hop is not None and s.hop.codec != "none" for s in pipeline.stages)
    for name in ("", "device", "region", "type"):
        table.add_column(name, overflow="fold")
    for name in ("layers", "compute", "send", "busy"):
        table.add_column(name, justify="right", no_wrap=True)
    if coded:
        table.add_column("codec", no_wrap=True)
    for name in ("mem. GiB", "idle"):
        table.add_column(name, justify="right", no_wrap=True)
    for i, s in enumerate(pipeline.stages):
        first, last = s.layers[0], s.layers[1] - 1
        hop = ["", ""] if s.hop is None else [_seconds(s.hop.transfer_s), f"{s.hop.busy:.0%}"]
        if coded:
            hop.append("" if s.hop is None else s.hop.codec)
        memory = f"{s.memory_bytes / _GIB:.1f}/{s.device_memory_bytes / _GIB:.1f}"
        table.add_row(
            str(i),
            Text(s.device),
            Text(s.region),
            Text(s.type),
            f"{first}-{last}" if last > first else f"{first}",
            _seconds(s.compute_s),
            *hop,
            memory,
            f"{s.idle:.0%}",
        )
    return table


def _seconds(value: float) -> str:
    """Three digits, in the unit that suits them."""
    if value >= 1:
        return f"{value:.3g} s" if value < 1000 else f"{value:.0f} s"
    if value >= 1e-3:
        return f"{value * 1e3:.3g} ms"
    return f"{value * 1e6:.3g} us"
