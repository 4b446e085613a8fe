"""``ray-train-geo logs``: speed and TFLOPs of logged runs, and of published tables of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ray_train_geo.console import AsJson, errors, print_json
from ray_train_geo.errors import InputError

if TYPE_CHECKING:
    from ray_train_geo.observe.log_settings import RunSettings
    from ray_train_geo.observe.run_speed import RunSpeed

__all__ = ["logs"]

_ROOMY, _WIDE = 100, 140  # columns of a terminal: from where on tables have all, and no more

_SHOWN = {
    "system": "system",
    "gpus": "GPUs",
    "size_b": "size B",
    "gbs": "batch",
    "seconds": "seconds",
    "tflops": "printed",
    "tflops_formula": "TFLOPs",
    "tokens_per_s": "tokens/s",
    "ms": "ms",
    "checkpoint_gb": "GB",
    "gb_per_s": "GB/s",
    "gb_per_s_per_node": "GB/s/node",
}
"""Columns of a recomputed table that a terminal shows, and their heads; ``--json`` has all."""


def logs(
    files: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[LOG...]",
            help="Logs of Megatron-LM, DeepSpeed or the Hugging Face Trainer; metrics.jsonl; run "
            "directories.",
            show_default=False,
        ),
    ] = None,
    size_b: Annotated[
        float | None, typer.Option(help="Billions of parameters. Default: the log's.")
    ] = None,
    seq: Annotated[
        int | None, typer.Option(help="Tokens of a sequence. Default: the log's.")
    ] = None,
    gpus: Annotated[int | None, typer.Option(help="Default: the log's.")] = None,
    global_batch: Annotated[
        int | None, typer.Option(help="Sequences of a step. Default: the log's.")
    ] = None,
    recompute: Annotated[
        bool | None,
        typer.Option(
            "--recompute/--no-recompute",
            help="Whether the backward recomputed activations. Default: the log's, or yes.",
        ),
    ] = None,
    skip: Annotated[int, typer.Option(help="Entries left out at the start, as warmup.")] = 1,
    table: Annotated[
        Path | None,
        typer.Option(metavar="IN.csv", help="Instead of logs, recompute a table of speeds."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="OUT.csv", help="Also write the table, recomputed.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print the speed and TFLOPs of training logs, failed runs included: a row each.

    With --table, of published runs instead, with the rows that contradict themselves.
    """
    with errors(as_json):
        from ray_train_geo.observe.log_settings import RunSettings

        given = RunSettings(size_b, seq, global_batch, gpus, recompute)
        if table is not None:
            if files:
                raise InputError("give either logs or --table, not both")
            if given != RunSettings():
                raise InputError(
                    "a table has sizes, batches and GPUs of its own: give it no others"
                )
            _recompute(table, out, as_json)
        elif out is not None:
            raise InputError("--out is for --table: give the table to recompute")
        elif not files:
            raise InputError("no log is given: name log files or run directories, or a --table")
        else:
            _speeds(files, skip, given, as_json)


def _speeds(files: Sequence[Path], skip: int, given: RunSettings, as_json: bool) -> None:
    from ray_train_geo.observe.run_speed import RunSpeed, run_speed
    from ray_train_geo.observe.training_logs import read_log

    def speed(path: Path) -> RunSpeed:
        try:
            log = read_log(path)
        except InputError as e:
            return RunSpeed(str(path), "error", str(e))
        return run_speed(log, skip=skip, given=given)

    speeds = [speed(path) for path in files]
    if all(s.status == "error" for s in speeds):
        none = f"none of the {len(files)} logs can be read; the first: " if len(files) > 1 else ""
        raise InputError(f"{none}{speeds[0].reason}")
    if as_json:
        print_json({"runs": [s.to_json() for s in speeds]})
    else:
        _print_speeds(speeds)


def _print_speeds(speeds: Sequence[RunSpeed]) -> None:
    console = _console()
    table = _table("log", "status")
    heads = ["timed", "step s", "median", "tokens/s", "TFLOPs"]
    if roomy := console.width >= _ROOMY:
        heads += ["size B", "batch", "GPUs"]
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    names = _short_names([s.path for s in speeds])
    for name, s in zip(names, speeds, strict=True):
        figures = [s.timed, s.step_s, s.median_step_s, s.tokens_per_s, s.tflops_per_gpu]
        if roomy:
            figures += [s.size_b, s.global_batch, s.gpus]
        table.add_row(Text(name), s.status, *map(_figure, figures))
    console.print(table)
    for name, s in zip(names, speeds, strict=True):
        for remark in (*((s.reason,) if s.reason else ()), *s.notes):
            console.print(Text(f"{name}: {remark}"), soft_wrap=True)


def _recompute(path: Path, out: Path | None, as_json: bool) -> None:
    from ray_train_geo.observe.speed_table import read_table, recompute_table, write_table

    rows = recompute_table(read_table(path))
    if all(row["error"] for row in rows):
        raise InputError(f"no row of {path} can be recomputed; row 1: {rows[0]['error']}")
    if out is not None:
        write_table(out, rows)
    if as_json:
        print_json({"rows": rows})
    else:
        _print_rows(rows)


def _print_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    console = _console()
    shown = [name for name in _SHOWN if any(name in row for row in rows)]
    table = _table("row", *(name for name in shown if name == "system"))
    for name in shown:
        if name != "system":
            table.add_column(_SHOWN[name], justify="right", no_wrap=True)
    for number, row in enumerate(rows, 1):
        table.add_row(str(number), *(_cell(row.get(name)) for name in shown))
    console.print(table)
    for number, row in enumerate(rows, 1):
        for reason in row["contradictions"]:
            console.print(Text(f"row {number} contradicts itself: {reason}"), soft_wrap=True)
        if row["error"]:
            console.print(Text(f"row {number}: {row['error']}"), soft_wrap=True)


def _console() -> Console:
    console = Console()
    return Console(width=min(console.width, _WIDE))


def _table(*texts: str) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for name in texts:
        table.add_column(name, overflow="fold")
    return table


def _cell(value: str | float | None) -> Text:
    return Text(value if isinstance(value, str) else _figure(value))


def _figure(value: float | None) -> str:
    """Four digits, and no exponent."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _short_names(paths: Sequence[str]) -> list[str]:
    """The files' own names where these tell them apart, else the whole paths."""
    names = [Path(path).name for path in paths]
    return names if len(set(names)) == len(names) else list(paths)
