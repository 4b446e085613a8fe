"""Whole tables: a CSV of questions in, the same with answers out.

A row is one step of one system::

    scenario,   system,          model,       global_batch, any other ...
    worldwide,  dtfm_scheduled,  gpt3-xl-24,  1024,                        -> step_s, pflops, error

The columns of the published measurements do as well: ``case`` for ``scenario``, ``batch`` for
``global_batch``, and ``layers`` beside a model's name.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ray_train_geo.errors import DataError, InputError, SpecError, StorageError
from ray_train_geo.systems.catalog import SYSTEMS
from ray_train_geo.systems.names import catalog_model
from ray_train_geo.systems.place import place
from ray_train_geo.systems.simulate import simulate

__all__ = ["ADDED", "Table", "read_table", "simulate_table", "write_table"]

ADDED = ("step_s", "pflops", "error")
"""Columns that are filled in; they take the place of columns that are called so already."""

_Value = TypeVar("_Value")

_ALSO_CALLED = {"scenario": "case", "global_batch": "batch"}
_NETWORK = ("devices", "latency_ms", "bandwidth_gbps")


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text; each has all ``columns``."""

    columns: tuple[str, ...]
    rows: tuple[Mapping[str, str], ...]


def read_table(path: Path) -> Table:
    """A CSV file with a header.

    Raises:
        DataError: it can't be read, has no rows, a row that is longer than the header, or a
            header without a needed column or with one twice.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        why = e.strerror if isinstance(e, OSError) else "it is not UTF-8 text"
        raise DataError(f"can't read the table {path}: {why or e}") from None
    # The csv module wants to see a quoted line's end itself, hence no splitlines().
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        columns = tuple(name.strip() for name in next(reader, ()))
        _check_header(path, columns)
        rows = []
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) > len(columns):
                raise DataError(
                    f"{path}, line {reader.line_num}: {len(cells)} cells, but the header names "
                    f"{len(columns)} columns"
                )
            padded = cells + [""] * (len(columns) - len(cells))
            rows.append(dict(zip(columns, padded, strict=True)))
    except csv.Error as e:
        raise DataError(f"{path}, line {reader.line_num}: no CSV: {e}") from None
    if not rows:
        raise DataError(f"{path} has no rows below its header")
    return Table(columns, tuple(rows))


def _check_header(path: Path, columns: tuple[str, ...]) -> None:
    twice = sorted({name for name in columns if columns.count(name) > 1})
    if twice:
        raise DataError(f"{path}: more than one column is called {', '.join(map(repr, twice))}")
    missing = [n for n in ("system", "model") if n not in columns]
    missing += [
        f"{n} (or {_ALSO_CALLED[n]})"
        for n in _ALSO_CALLED
        if n not in columns
        and _ALSO_CALLED[n] not in columns
        # A table of single pipelines says its networks instead.
        and not (n == "scenario" and set(_NETWORK) <= set(columns))
    ]
    if missing:
        raise DataError(
            f"{path} has no column {', '.join(missing)}; its header is: {','.join(columns)[:200]}"
        )


def simulate_table(table: Table, on_row: Callable[[int], None] = lambda done: None) -> Table:
    """``table`` with ``step_s``, ``pflops`` and ``error`` filled in for every row.

    A row that can't be done says why in ``error``, and the others go on.  Rows that ask the same
    are simulated once.

    Args:
        on_row: called after each row with the number of rows done.
    """
    answers: dict[_Question, tuple[str, str, str]] = {}
    filled = []
    for done, row in enumerate(table.rows, 1):
        try:
            question = _Question.of(row)
            if question not in answers:
                answers[question] = question.answer()
            answer = answers[question]
        except InputError as e:
            answer = _refusal(e)
        filled.append({**row, **dict(zip(ADDED, answer, strict=True))})
        on_row(done)
    kept = tuple(name for name in table.columns if name not in ADDED)
    return Table(kept + ADDED, tuple(filled))


def write_table(table: Table, path: Path) -> None:
    """Write a CSV file.

    Raises:
        StorageError: it can't be written.
    """
    try:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, table.columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(table.rows)
    except OSError as e:
        raise StorageError(f"can't write the table {path}: {e.strerror or e}") from None


@dataclass(frozen=True, slots=True)
class _Question:
    """All of a row that its answer depends on."""

    system: str
    model: str
    global_batch: int
    scenario: str | None
    network: tuple[int | None, float | None, float | None]
    settings: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, row: Mapping[str, str]) -> _Question:
        """What ``row`` asks.

        Raises:
            SpecError: a cell that is empty, or no number where one is due.
        """
        cells = {name: _plain(cell) for name, cell in row.items()}
        for name, other in _ALSO_CALLED.items():
            cells[name] = cells.get(name) or cells.get(other, "")
        empty = [name for name in ("system", "model", "global_batch") if not cells[name]]
        if empty:
            raise SpecError(f"nothing in column {', '.join(empty)}")
        system = SYSTEMS.get(cells["system"])
        return cls(
            cells["system"],
            catalog_model(cells["model"], _optional(_whole, "layers", cells)),
            _whole("global_batch", cells["global_batch"]),
            cells["scenario"] or None,
            (
                _optional(_whole, "devices", cells),
                _optional(_number, "latency_ms", cells),
                _optional(_number, "bandwidth_gbps", cells),
            ),
            tuple((n, cells[n]) for n in (system.settings if system else ()) if cells.get(n)),
        )

    def answer(self) -> tuple[str, str, str]:
        try:
            scenario, topology = place(self.scenario, None, *self.network)
            found = simulate(
                self.system,
                self.model,
                self.global_batch,
                scenario=scenario,
                topology=topology,
                settings=dict(self.settings),
            )
        except InputError as e:
            return _refusal(e)  # as good an answer as any: it need not be sought again
        return f"{found.step_s:.6g}", f"{found.pflops:.6g}", ""


def _refusal(error: InputError) -> tuple[str, str, str]:
    return "", "", " ".join(str(error).split())


def _plain(cell: str) -> str:
    """Without white space, and whole numbers without the ``.0`` that spreadsheets add."""
    return re.sub(r"^(-?\d+)\.0+$", r"\1", cell.strip())


def _optional(
    convert: Callable[[str, str], _Value], name: str, cells: Mapping[str, str]
) -> _Value | None:
    cell = cells.get(name, "")
    return convert(name, cell) if cell else None


def _whole(name: str, cell: str) -> int:
    try:
        return int(cell)
    except ValueError:
        raise SpecError(f"{name} is {cell!r}: give a whole number") from None


def _number(name: str, cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        raise SpecError(f"{name} is {cell!r}: give a number") from None
