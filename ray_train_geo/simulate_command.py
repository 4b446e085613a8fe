"""``ray-train-geo simulate``: how long a step of any system would take; or whole tables."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ray_train_geo.console import AsJson, errors, print_json
from ray_train_geo.errors import SpecError
from ray_train_geo.outputs import require_writable, write_output
from ray_train_geo.ticker import Ticker

if TYPE_CHECKING:
    from ray_train_geo.systems.simulated import Simulated

__all__ = ["simulate"]


def simulate(
    system: Annotated[
        str | None, typer.Option(help="What would train, such as ours or megatron_p8; see --list.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="A model of the catalog, such as gpt3-xl-24.")
    ] = None,
    global_batch: Annotated[
        int | None, typer.Option(help="Sequences of one step, over all pipelines.")
    ] = None,
    scenario: Annotated[
        str | None, typer.Option(help="A named cluster, such as worldwide, mixed or random-7.")
    ] = None,
    topology: Annotated[
        Path | None, typer.Option(help="In its place: the devices in this topology file.")
    ] = None,
    devices: Annotated[
        int | None, typer.Option(help="Or so many equal devices, any two of them linked by ...")
    ] = None,
    latency_ms: Annotated[
        float | None, typer.Option(help="... a link with this delay, one way, and ...")
    ] = None,
    bandwidth_gbps: Annotated[float | None, typer.Option(help="... this bandwidth.")] = None,
    stages: Annotated[
        int | None, typer.Option(help="Stages of each pipeline; as --set stages=N.")
    ] = None,
    replicas: Annotated[
        int | None, typer.Option(help="Number of pipelines; as --set replicas=N.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A setting of the system; repeatable."),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also write a timeline for https://ui.perfetto.dev."),
    ] = None,
    table: Annotated[
        Path | None,
        typer.Option(
            metavar="IN.csv",
            help="A whole table: columns scenario, system, model, global_batch, and any that is "
            "called like a setting.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="OUT.csv", help="The same with step_s, pflops and error."),
    ] = None,
    list_systems: Annotated[
        bool, typer.Option("--list", help="Show all systems and their settings.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Predict one step of a system, on a scenario, a topology or one made-up network.

    With --table, of every row of a CSV file.
    """
    with errors(as_json):
        one = {
            "--system": system,
            "--model": model,
            "--global-batch": global_batch,
            "--scenario": scenario,
            "--topology": topology,
            "--devices": devices,
            "--latency-ms": latency_ms,
            "--bandwidth-gbps": bandwidth_gbps,
            "--stages": stages,
            "--replicas": replicas,
            "--set": settings,
            "--trace": trace,
        }
        if list_systems:
            _refuse("--list", "it stands alone", {**one, "--table": table, "--out": out})
            _print_systems(as_json)
        elif table is not None:
            _refuse("--table", "its columns say what is simulated", one)
            _fill_table(table, out, as_json)
        else:
            if out is not None:
                raise SpecError(f"--out {out}: a table goes there, so also give --table IN.csv")
            if system is None or model is None or global_batch is None:
                missing = [n for n in ("--system", "--model", "--global-batch") if one[n] is None]
                raise SpecError(
                    f"{', '.join(missing)} missing: a step is that of a system, with a model and a "
                    "global batch (or give a --table)"
                )
            if trace is not None:
                require_writable("--trace", trace)
            from ray_train_geo.systems.names import catalog_model
            from ray_train_geo.systems.place import place
            from ray_train_geo.systems.simulate import simulate

            name, where = place(scenario, topology, devices, latency_ms, bandwidth_gbps)
            found = simulate(
                system,
                catalog_model(model),
                global_batch,
                scenario=name,
                topology=where,
                settings=_settings(settings or (), stages, replicas),
                trace=trace is not None,
            )
            if trace is not None:
                _write_trace(trace, found)
            _print(found, as_json)


def _refuse(option: str, why: str, given: Mapping[str, object]) -> None:
    extra = [name for name, value in given.items() if value not in (None, [])]
    if extra:
        raise SpecError(f"{option} and {', '.join(extra)}: {why}")


def _settings(texts: Sequence[str], stages: int | None, replicas: int | None) -> dict[str, str]:
    """``--set`` and the options that are short for it.

    Raises:
        SpecError: no ``KEY=VALUE``, or a key that is given twice.
    """
    pairs = [
        (name, str(n)) for name, n in (("stages", stages), ("replicas", replicas)) if n is not None
    ]
    for text in texts:
        key, equals, value = (part.strip() for part in text.partition("="))
        if not (key and equals and value):
            raise SpecError(f"--set {text}: write KEY=VALUE, as in --set stages=4")
        pairs.append((key, value))
    found: dict[str, str] = {}
    for key, value in pairs:
        if key in found:
            raise SpecError(f"setting {key!r} is given twice: {found[key]} and {value}")
        found[key] = value
    return found


def _write_trace(path: Path, found: Simulated) -> None:
    from ray_train_geo.observe.simulated_trace import simulated_trace

    if not found.trace:
        raise SpecError(f"--trace {path}: {found.system} is a model without a timeline of actions")
    write_output("--trace", path, json.dumps(simulated_trace(found)).encode())


def _print(found: Simulated, as_json: bool) -> None:
    from ray_train_geo.systems.figures import figures

    known = figures(found)
    if as_json:
        print_json(
            {
                **known,
                "system": found.system,
                "scenario": found.scenario or None,
                "model": found.model,
                "global_batch": found.global_batch,
            }
        )
        return
    price = known["dollars_per_million_tokens"]
    causes = sorted(found.breakdown.items(), key=lambda item: -item[1])
    lines = [
        ("system", f"{found.system} on {found.scenario or 'a topology'}, {found.devices} devices"),
        ("work", f"{found.model}, {found.global_batch} sequences a step"),
        ("step", f"{found.step_s:.4g} s"),
        ("speed", f"{found.pflops:.4g} PFLOPS, {found.efficiency:.1%} of the devices' peak"),
        ("tokens", f"{found.tokens_per_s:,.0f} a second"),
        ("price", "unknown" if price is None else f"${price:.4g} per million tokens"),
        *(
            ("where it goes" * (i == 0), f"{s:8.3f} s  {s / found.step_s:4.0%}  {cause}")
            for i, (cause, s) in enumerate(causes)
        ),
        *(("note", note) for note in found.notes),
    ]
    _print_lines(lines)


def _print_lines(lines: Sequence[tuple[str, str]]) -> None:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column()
    for name, text in lines:
        grid.add_row(name, Text(text))
    Console().print(grid)


def _print_systems(as_json: bool) -> None:
    from ray_train_geo.systems.catalog import SYSTEMS

    if as_json:
        known: dict[str, Any] = {
            s.name: {"description": s.description, "settings": dict(s.settings)}
            for s in SYSTEMS.values()
        }
        print_json({"systems": known})
        return
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("system", no_wrap=True)
    table.add_column("what it is; its settings")
    explained: dict[str, str] = {}
    for s in SYSTEMS.values():
        table.add_row(Text(s.name), Text(s.description))
        # A setting without a default is chosen by the system.
        defaults = [f"{n}={o.default}" if o.default else n for n, o in s.options.items()]
        table.add_row("", Text(" ".join(defaults), style="dim"))
        for name, option in s.options.items():
            choices = f": {', '.join(option.choices)}" if option.choices else ""
            explained.setdefault(name, f"{option.help}{choices}")
    console = Console()
    console.print(table)
    console.print()
    _print_lines(list(explained.items()))


def _fill_table(path: Path, out: Path | None, as_json: bool) -> None:
    if out is None:
        raise SpecError("--table without --out: also name the file to write, as in --out OUT.csv")
    require_writable("--out", out)
    from ray_train_geo.systems.table import read_table, simulate_table, write_table

    asked, ticker = read_table(path), Ticker()
    filled = simulate_table(
        asked, lambda done: ticker.show(f"{done} of {len(asked.rows)} rows are done")
    )
    write_table(filled, out)
    refused = [row["error"] for row in filled.rows if row["error"]]
    done = len(filled.rows) - len(refused)
    if not done:
        raise SpecError(f"no row of {path} could be done; the first: {refused[0]} (all: {out})")
    if as_json:
        print_json({"rows": len(filled.rows), "done": done, "refused": len(refused),
                    "out": str(out)})  # fmt: skip
    else:
        why = f"; {len(refused)} can't be done, column error says why" * bool(refused)
        print(f"{out}: {done} of {len(filled.rows)} rows{why}")
