"""``ray-train-geo replay``: what a job would have got done on spot nodes that come and go."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ray_train_geo.console import AsJson, Overrides, errors
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
from ray_train_geo.outputs import PICTURES, require_writable, write_output
from ray_train_geo.spec import load_job

if TYPE_CHECKING:
    from ray_train_geo.replay.run import Replay

__all__ = ["replay"]

_ROOMY = 100
"""Columns of a terminal from where on the table has air."""


def replay(
    trace: Annotated[
        str,
        typer.Argument(metavar="TRACE", help="A trace file, or aws-p3 or gcp-a100."),
    ],
    job_path: JobPath = None,
    model: Model = None,
    global_batch: GlobalBatch = None,
    seq_len: SeqLen = None,
    microbatch: Microbatch = None,
    precision: PrecisionOption = None,
    recompute: Recompute = None,
    vocab_size: Annotated[
        int | None, typer.Option(help="Tokens of the vocabulary. Default: the model's.")
    ] = None,
    codecs: Codecs = None,
    gpu: Annotated[
        str | None, typer.Option(help="What a node holds, such as V100-16G, if no topology says.")
    ] = None,
    gpus_per_node: Annotated[int | None, typer.Option(help="Default: 1.")] = None,
    region: Annotated[
        list[str] | None,
        typer.Option(help="Where nodes are; repeatable: they are dealt to the regions in turn."),
    ] = None,
    topology: Annotated[
        Path | None, typer.Option(help="The trace's nodes are those of this topology file.")
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="ours, checkpoint-restart, restart, torchft-like or on-demand; repeatable. "
            "Default: all."
        ),
    ] = None,
    until_h: Annotated[
        float | None, typer.Option(help="Hours to replay. Default: to the trace's last event.")
    ] = None,
    max_nodes: Annotated[
        int | None, typer.Option(help="Most nodes at the same time. Default: all.")
    ] = None,
    notice_s: Annotated[
        float | None,
        typer.Option(help="Warning before each removal, in seconds. Default: as the trace says."),
    ] = None,
    checkpoint_interval_s: Annotated[
        float | None, typer.Option(help="Default: Young's optimum for each policy.")
    ] = None,
    assume: Annotated[
        list[str] | None,
        typer.Option(
            metavar="POLICY.NAME=VALUE",
            help="Another figure for what a policy costs, such as ours.detect_s=1; repeatable.",
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Of the planner, and of who leaves where a trace has counts.")
    ] = 0,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also draw the timeline, as .png or .svg.")
    ] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Replay a spot trace: goodput, lost work and dollars of a job under several policies."""
    with errors(as_json):
        if picture is not None:
            require_writable("--picture", picture, PICTURES)
        job = None if job_path is None else load_job(job_path, overrides or ())
        from ray_train_geo.replay.run import POLICIES, replay_trace

        found = replay_trace(
            trace,
            job,
            model=model,
            global_batch=global_batch,
            seq_len=seq_len,
            microbatch=microbatch,
            precision=precision,
            recompute=recompute,
            vocab_size=vocab_size,
            codecs=codec_names(codecs),
            gpu=gpu,
            gpus_per_node=gpus_per_node,
            regions=region or (),
            topology=topology,
            policies=policy or POLICIES,
            until_h=until_h,
            max_nodes=max_nodes,
            notice_s=notice_s,
            checkpoint_interval_s=checkpoint_interval_s,
            assume=assume or (),
            seed=seed,
            overrides=() if job is not None else overrides or (),
        )
        if picture is not None:
            _draw(picture, found)
        if as_json:
            print(json.dumps(found.to_json(), allow_nan=False), flush=True)
        else:
            _print(found)


def _draw(path: Path, found: Replay) -> None:
    from ray_train_geo.observe.rendering import to_png, to_svg
    from ray_train_geo.observe.replay_picture import replay_picture

    figure = replay_picture(found)
    png = path.suffix.lower() == ".png"
    write_output("--picture", path, to_png(figure) if png else to_svg(figure).encode())


def _print(found: Replay) -> None:
    """A row a policy; device-seconds as shares of all that were there."""
    console = Console()
    roomy = console.width >= _ROOMY
    table = Table(box=SIMPLE_HEAD, padding=(0, int(roomy), 0, 0), pad_edge=False, show_edge=False)
    table.add_column("policy", no_wrap=True)
    for name in (
        "goodput", "samples/s", "tokens/s", "lost", "down", "idle", "redone", "$/Mtok",
    ):  # fmt: skip
        table.add_column(name, justify="right", no_wrap=True)
    for o in found.outcomes:
        price = o.usd_per_million_tokens(o.market_type)
        shares = (o.lost_device_s, o.downtime_device_s, o.idle_device_s)
        table.add_row(
            o.policy,
            f"{o.goodput:.1%}",
            f"{o.samples_per_s:.3g}" if o.samples_per_s < 1000 else f"{o.samples_per_s:,.0f}",
            f"{o.tokens_per_s:,.0f}",
            *(f"{s / o.device_s:.1%}" for s in shares),
            f"{o.undone_steps + o.cut_off_steps:,}",
            "" if price is None else f"{price:.3g}",
        )
    fleet = found.fleet
    later = [change for change in fleet.changes if change.time_s > 0]
    console.print(
        f"{found.trace}: {fleet.end_s / 3600:.3g} h, {fleet.mean_devices:.3g} devices on average, "
        f"{sum(len(c.joined) for c in later)} joins, {sum(len(c.left) for c in later)} leaves",
        highlight=False,
        markup=False,
    )
    console.print(table)
    fixed = {o.policy: o.fixed_stages for o in found.outcomes if o.fixed_stages is not None}
    if fixed:
        (depth,) = set(fixed.values())
        console.print(
            f"{', '.join(fixed)}: all pipelines have {depth} stages",
            highlight=False,
            markup=False,
        )
