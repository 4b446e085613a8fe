"""``report.html``: one self-contained page about a run (level 0).

It is made from the run directory alone, and from whatever is there: a run that failed before its
first step, or one without a trace, has a report too.
"""

from __future__ import annotations

import html
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from ray_train_geo.errors import StorageError
from ray_train_geo.observe.device_timeline import device_timeline, device_timeline_picture
from ray_train_geo.observe.pictures import (
    loss_curve,
    pipeline_timeline,
    plan_picture,
    step_time_picture,
    to_svg,
)
from ray_train_geo.observe.run_directory import RunDirectory

__all__ = ["write_report"]

_MOST_EVENTS = 500
_MOST_ERRORS = 50
_MOST_CHARACTERS = 20_000
_WORKER_COLUMNS = (
    "rank", "pipeline", "stage", "layers", "device", "host", "region", "node_id", "pid",
)  # fmt: skip

Records = Sequence[Mapping[str, Any]]


def write_report(run: RunDirectory) -> Path:
    """Write ``report.html`` of ``run`` and return its path.

    The page needs no network: pictures are inline SVG, styles are inside.

    Raises:
        StorageError: metrics or events can't be read, or the page can't be written.
    """
    records, events = run.metrics(), run.events()
    pictures, notes = _pictures(run, records, events)
    template = (files("ray_train_geo.observe") / "report.html").read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.from_string(template).render(
        name=run.path.name,
        path=str(run.path),
        status=_status(events),
        span=_span(records, events),
        tiles=_tiles(records, events),
        pictures=pictures,
        notes=notes,
        worker_columns=_WORKER_COLUMNS,
        generations=_generations(events),
        events=_event_rows(events[-_MOST_EVENTS:]),
        hidden_events=max(len(events) - _MOST_EVENTS, 0),
        errors=_errors(run, events),
        job=_text_of(run.job_path) if run.job_path.exists() else "",
    )
    return run.write_text("report.html", page)


def _pictures(
    run: RunDirectory, records: Records, events: Records
) -> tuple[list[Markup], list[str]]:
    figures: list[tuple[str, Figure]] = [
        ("Loss by step", loss_curve(records, events)),
        ("Step time by step, predicted and measured", step_time_picture(records)),
    ]
    notes = []
    try:
        if (timeline := device_timeline(events)) is not None:
            figures.append(("Devices over time", device_timeline_picture(timeline)))
    except (KeyError, TypeError, ValueError) as e:
        notes.append(f"events.jsonl is not in the format that this version draws ({e!r}).")
    for name, title, draw in (
        ("trace.json", "Timeline of one step", pipeline_timeline),
        ("plan.json", "Plan", plan_picture),
    ):
        drawn = _drawn(run, name, draw)
        if isinstance(drawn, Figure):
            figures.append((title, drawn))
        else:
            notes.append(drawn)
    return [_inline(title, figure) for title, figure in figures], notes


def _drawn(run: RunDirectory, name: str, draw: Callable[[Any], Figure]) -> Figure | str:
    """The picture of the JSON file ``name``, or why there is none."""
    try:
        data = run.read_json(name)
        return f"There is no {name}, hence no picture of it." if data is None else draw(data)
    except StorageError as e:
        return str(e)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as e:
        return f"{name} is not in the format that this version draws ({e!r})."


def _inline(title: str, figure: Figure) -> Markup:
    # Markup: matplotlib has escaped all text inside, so the SVG may pass as it is.
    label = html.escape(title)
    return Markup(to_svg(figure).replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1))


def _tiles(records: Records, events: Records) -> list[tuple[str, str, str]]:
    """(label, value, small print) of each summary tile; a dash where nothing is known."""
    losses, bits = _numbers(records, "loss"), _numbers(records, "bits_per_byte")
    measured = _median(records, "step_s")
    predicted = _median(records, "predicted_step_s")
    skipped = sum(bool(r.get("skipped")) for r in records)
    generations = {r["generation"] for r in [*records, *events] if r.get("generation") is not None}
    checkpoints = [e for e in events if e.get("event") == "checkpoint"]
    times = _numbers([*records, *events], "time")
    off = ""
    if measured and predicted:
        off = f"predicted {_duration(predicted)}, measured {measured / predicted - 1:+.0%}"
    speed = _median(records, "tokens_per_s")
    return [
        ("Final loss", _digits(losses[-1:]), f"first {_digits(losses[:1])}" if losses else ""),
        ("Bits per byte", _digits(bits[-1:]), f"first {_digits(bits[:1])}" if bits else ""),
        ("Steps", f"{len(records):,}", f"{skipped} skipped (overflow)" if skipped else ""),
        ("Tokens", _count(sum(_numbers(records, "tokens"))), ""),
        ("Tokens/s", _count(speed), "median") if speed else ("Tokens/s", "-", ""),
        ("Step time", _duration(measured), off or "median") if measured else ("Step time", "-", ""),
        ("Wall time", _duration(max(times) - min(times)) if times else "-", ""),
        ("Workers", *_workers(events)),
        ("Generations", str(len(generations)), ""),
        ("Checkpoints", str(len(checkpoints)), _last_checkpoint(checkpoints)),
    ]


def _workers(events: Records) -> tuple[str, str]:
    """How many workers the last generation has, and in how many pipelines."""
    for _, _, rows in _generations(events):
        pipelines = len({row[_WORKER_COLUMNS.index("pipeline")] for row in rows})
        return str(len(rows)), f"{pipelines} pipeline{'s' * (pipelines != 1)}"
    return "-", ""


def _last_checkpoint(checkpoints: Records) -> str:
    return f"last at step {checkpoints[-1].get('step')}" if checkpoints else ""


def _status(events: Records) -> tuple[str, str]:
    """(words, CSS class) for how the run ended."""
    endings = {
        "finish": ("finished", "good"),
        "stop": ("stopped", "warn"),
        "error": ("failed", "bad"),
    }
    for e in reversed(events):
        name = e.get("event")
        if name in endings:
            return endings[name]
        if name in ("start", "resume", "generation", "plan"):
            break
    return ("no end recorded (running, or killed)", "warn")


def _span(records: Records, events: Records) -> str:
    times = _numbers([*records, *events], "time")
    return f"{_clock(min(times))} to {_clock(max(times))} UTC" if times else "nothing recorded"


def _generations(events: Records) -> list[tuple[Any, str, list[list[str]]]]:
    """(generation, clock time, a row of cells per worker), newest first."""
    found = []
    for e in events:
        workers = e.get("workers")
        if e.get("event") == "generation" and isinstance(workers, list):
            rows = [
                [_cell(column, w.get(column)) for column in _WORKER_COLUMNS]
                for w in workers
                if isinstance(w, Mapping)
            ]
            found.append((e.get("generation"), _event_clock(e), rows))
    return found[::-1]


def _cell(column: str, value: Any) -> str:
    if column == "layers" and isinstance(value, list) and len(value) == 2:
        return str(value[0]) if value[1] - value[0] == 1 else f"{value[0]}-{value[1] - 1}"
    if column == "node_id" and isinstance(value, str):
        return value[:12]  # of Ray's 56 digits; events.jsonl has them all
    return "-" if value is None else str(value)


def _event_rows(events: Records) -> list[tuple[str, str, str, str]]:
    """(clock time, seconds since the first, event, details) of each event."""
    times = _numbers(events, "time")
    rows = []
    for e in events:
        since = f"+{_duration(e['time'] - times[0])}" if _is_number(e.get("time")) else ""
        details = [
            f"{key}: {_detail(key, value)}"
            for key, value in e.items()
            if key not in ("time", "event", "traceback") and value is not None
        ]
        rows.append((_event_clock(e), since, str(e.get("event")), ", ".join(details)))
    return rows


def _detail(key: str, value: Any) -> str:
    if key == "workers" and isinstance(value, list):
        return str(len(value))
    if key in ("bytes", "size_bytes") and _is_number(value):
        return f"{value / 2**20:.3g} MiB"
    if isinstance(value, float):
        return f"{value:.4g}"
    text = str(value)
    return text if len(text) <= 300 else f"{text[:300]}…"


def _errors(run: RunDirectory, events: Records) -> list[tuple[str, str]]:
    """(headline, traceback) of the error events, then of the files in ``errors/``."""
    found = [
        (str(e.get("message") or "error"), str(e.get("traceback") or ""))
        for e in events
        if e.get("event") == "error"
    ]
    paths = sorted(p for p in run.errors_path.glob("*") if p.is_file() and p.name[0] != ".")
    found += [(f"errors/{path.name}", _text_of(path)) for path in paths]
    return found[:_MOST_ERRORS]


def _text_of(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as e:
        return f"can't read {path}: {e.strerror}"
    if len(text) <= _MOST_CHARACTERS:
        return text
    # A traceback says what happened at its end.
    return f"(the last {_MOST_CHARACTERS} of {len(text)} characters)\n{text[-_MOST_CHARACTERS:]}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _numbers(records: Records, key: str) -> list[float]:
    return [r[key] for r in records if _is_number(r.get(key))]


def _median(records: Records, key: str) -> float | None:
    values = _numbers(records, key)
    return statistics.median(values) if values else None


def _digits(values: Sequence[float]) -> str:
    return f"{values[0]:.4f}" if values else "-"


def _count(value: float) -> str:
    for size, suffix in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if value >= size:
            return f"{value / (1e3 if suffix == 'k' else size):.3g} {suffix}"
    return f"{value:,.0f}"


def _duration(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def _clock(time_s: float) -> str:
    return datetime.fromtimestamp(time_s, timezone.utc).strftime("%Y-%m-%d %H:%M:%S")


def _event_clock(event: Mapping[str, Any]) -> str:
    time_s = event.get("time")
    return _clock(time_s) if isinstance(time_s, int | float) else ""
