"""``ray-train-geo compare``: all systems on one cluster, measured beside predicted."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.bar import Bar
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ray_train_geo.console import AsJson, errors, print_json
from ray_train_geo.outputs import PICTURES, require_writable, write_output
from ray_train_geo.ticker import Ticker

if TYPE_CHECKING:
    from ray_train_geo.systems.comparison import Compared, Comparison

__all__ = ["compare"]

_ROOMY = 100  # columns of a terminal: from where on there is room for bars
_BAR = 24  # columns of the longest bar


def compare(
    scenario: Annotated[
        str | None, typer.Option(help="A named cluster, such as worldwide, mixed or random-7.")
    ] = None,
    topology: Annotated[
        Path | None, typer.Option(help="In its place: the devices in this topology file.")
    ] = None,
    model: Annotated[str, typer.Option(help="A model of the catalog.")] = "gpt3-xl-24",
    global_batch: Annotated[
        int, typer.Option(help="Sequences of one step, over all pipelines.")
    ] = 1024,
    systems: Annotated[
        str | None, typer.Option(metavar="A,B", help="Only these systems. Default: all.")
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also draw a bar chart, as .png or .svg."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Predict one step of every system on the same devices; published times stand beside."""
    with errors(as_json):
        if picture is not None:
            require_writable("--picture", picture, PICTURES)
        from ray_train_geo.systems.comparison import compare

        ticker = Ticker()
        found = compare(
            scenario,
            topology=topology,
            model=model,
            global_batch=global_batch,
            systems=None if systems is None else _names(systems),
            on_system=lambda name: ticker.show(f"now {name}"),
        )
        if picture is not None:
            _draw(picture, found)
        if as_json:
            print_json(found.to_json())
        else:
            _print(found)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _draw(path: Path, found: Comparison) -> None:
    from ray_train_geo.observe.comparison_picture import comparison_picture
    from ray_train_geo.observe.rendering import to_png, to_svg

    figure = comparison_picture(found)
    content = to_png(figure) if path.suffix.lower() == ".png" else to_svg(figure).encode()
    write_output("--picture", path, content)


def _print(found: Comparison) -> None:
    console = Console()
    console.print(
        f"{found.model}, {found.global_batch} sequences a step, on {found.place} "
        f"({found.devices} devices)\n",
        highlight=False,
        markup=False,
    )
    roomy = console.width >= _ROOMY
    table = Table(box=SIMPLE_HEAD, padding=(0, int(roomy), 0, 0), pad_edge=False, show_edge=False)
    table.add_column("system", no_wrap=True)
    for name in ("step s", "measured", "error", "PFLOPS", "of peak", "$/Mtoken"):
        table.add_column(name, justify="right", no_wrap=True)
    if roomy:
        table.add_column("", width=_BAR)
    for row in found.rows:
        style = "bold" if row is found.rows[0] else ""
        cells = [Text(cell) for cell in _cells(row)]
        if roomy and row.predicted is not None:
            shown_s = min(row.predicted.step_s, found.chart_s)
            table.add_row(*cells, Bar(found.chart_s, 0, shown_s, width=_BAR), style=style)
        else:
            table.add_row(*cells, style=style)
    console.print(table)
    lines = [("can't", f"{why} ({', '.join(names)})") for why, names in found.refusals.items()]
    common = found.rows[0].precision
    for other in sorted({row.precision for row in found.rows} - {common}):
        names = ", ".join(row.system for row in found.rows if row.precision == other)
        lines.append((f"in {other}", f"{names}; the others in {common}"))
    if found.mean_absolute_error is not None:
        lines.append(("mean error", f"{found.mean_absolute_error:.1%} of the measured times"))
    if found.also_measured:
        others = ", ".join(f"{m} {batch}" for m, batch in found.also_measured)
        lines.append(("also measured", f"(model, global batch) {others}"))
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column()
    for name, text in lines:
        grid.add_row(Text(name), Text(text))
    if lines:
        console.print()
        console.print(grid)


def _cells(row: Compared) -> list[str]:
    from ray_train_geo.systems.figures import known_price

    measured, error, p = row.mean_measured_s, row.prediction_error, row.predicted
    price = None if p is None else known_price(p)
    return [
        row.system,
        "-" if p is None else f"{p.step_s:.2f}",
        "" if measured is None else f"{measured:.2f}",
        "" if error is None else f"{error:+.1%}",
        "" if p is None else f"{p.pflops:.3f}",
        "" if p is None else f"{p.efficiency:.1%}",
        "" if price is None else f"{price:.4g}",
    ]
