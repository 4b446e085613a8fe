"""Published tables of training speed: recomputed, and held against themselves (level 0).

Two kinds, told apart by their columns; blank fields are unknown, other columns are kept:

- iterations: ``size_b, gpus, gbs, seq, seconds``, and as far as known ``tp, pp, dp, mbs, gas,
  tflops, recompute`` (yes or no; blank is yes) and ``status``;
- checkpoints: ``size_b, ms``, and as far as known ``nodes`` and ``section``.

Nothing in a row is ever corrected: what does not fit is listed by ``contradictions``.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_train_geo.errors import InputError, StorageError
from ray_train_geo.observe.metrics import checkpoint_bytes, model_tflops_per_gpu, tokens_per_s

__all__ = ["Contradiction", "contradictions", "read_table", "recompute_table", "write_table"]

Row = Mapping[str, str]

_ITERATION_COLUMNS = ("size_b", "gpus", "gbs", "seq", "seconds")
_CHECKPOINT_COLUMNS = ("size_b", "ms")
_BLANK = {"pp": "1", "gas": "1"}
"""What a blank means where it means anything: no pipeline, no accumulation."""

_EXTRA = "fields beyond the header"
_YES, _NO = ("", "y", "yes", "true", "1"), ("n", "no", "false", "0")


@dataclass(frozen=True, slots=True)
class Contradiction:
    """A row whose own figures exclude each other.

    Args:
        row: counted from 1, without the header.
        reason: which figures, and what they would have to be.
    """

    row: int
    reason: str


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file with a header.

    Raises:
        InputError: it can't be read, is no CSV, has no rows, or lacks the columns of both kinds.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, restkey=_EXTRA, restval="", strict=True)
            columns = list(reader.fieldnames or ())
            rows = list(reader)
    except OSError as e:
        raise InputError(f"can't read the table {path}: {(e.strerror or str(e)).lower()}") from None
    except (csv.Error, UnicodeDecodeError) as e:
        raise InputError(f"the table {path} is not a CSV file: {e}") from None
    missing = [c for c in _ITERATION_COLUMNS if c not in columns]
    if missing and not set(_CHECKPOINT_COLUMNS) <= set(columns):
        raise InputError(
            f"the table {path} has no column {', '.join(missing)}: a table of iterations needs "
            f"{', '.join(_ITERATION_COLUMNS)}, one of checkpoints {', '.join(_CHECKPOINT_COLUMNS)}"
        )
    if not rows:
        raise InputError(f"the table {path} has a header and no rows")
    for number, row in enumerate(rows, 1):
        if _EXTRA in row:
            raise InputError(f"the table {path}, row {number}: more fields than the header names")
    return rows


def recompute_table(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows, each with what follows from it.

    Iterations get ``tflops_formula`` (of one GPU, `model_tflops_per_gpu`) and ``tokens_per_s``;
    checkpoints ``checkpoint_gb``, ``gb_per_s`` and ``gb_per_s_per_node`` (1e9 bytes).  All get
    ``contradictions`` and ``error``: why nothing follows, or None.
    """
    found = dict[int, list[str]]()
    for c in contradictions(rows):
        found.setdefault(c.row, []).append(c.reason)
    done = []
    for number, row in enumerate(rows, 1):
        work = _iteration if "seconds" in row else _checkpoint
        try:
            result, error = work(row), None
        except InputError as e:
            result, error = {}, str(e)
        kept = {name: value for name, value in row.items() if name not in result}
        done.append({**kept, **result, "contradictions": found.get(number, []), "error": error})
    return done


def contradictions(rows: Sequence[Row]) -> list[Contradiction]:
    """Rows of an iteration table that can't be true as printed, in their order.

    Three rules, each where its fields are given (a blank ``pp`` or ``gas`` is 1):
    ``gpus = tp pp dp``; ``gbs = mbs gas dp``; and ``tflops`` must follow from ``seconds``, both
    allowed to be rounded.  That equal rows differ in their seconds is no contradiction.
    """
    found = []
    for number, row in enumerate(rows, 1):
        for rule in (_devices, _batch, _speed):
            try:
                reason = rule(row)
            except InputError:
                continue  # not all of its fields are given: nothing to contradict
            if reason is not None:
                found.append(Contradiction(number, reason))
    return found


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write ``rows`` as CSV; contradictions are joined by semicolons, None is blank.

    Raises:
        StorageError: the file can't be written.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row))
    try:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            for row in rows:
                writer.writerow({**row, "contradictions": "; ".join(row["contradictions"])})
    except OSError as e:
        raise StorageError(f"can't write the table {path}: {e.strerror or e}") from None


def _iteration(row: Row) -> dict[str, Any]:
    seconds, seq_len, global_batch = _seconds(row), _count(row, "seq"), _count(row, "gbs")
    return {
        "tflops_formula": _tflops(row, seconds),
        "tokens_per_s": tokens_per_s(seq_len=seq_len, global_batch=global_batch, step_s=seconds),
    }


def _checkpoint(row: Row) -> dict[str, Any]:
    section = row.get("section", "")
    if section and "checkpoint" not in section.lower():
        raise InputError(f"not a checkpoint but {section!r}")
    gb = checkpoint_bytes(parameters=1e9 * _number(row, "size_b")) / 1e9
    speed = gb / (_number(row, "ms") / 1e3)
    each = speed / _number(row, "nodes") if row.get("nodes", "").strip() else None
    return {"checkpoint_gb": gb, "gb_per_s": speed, "gb_per_s_per_node": each}


def _devices(row: Row) -> str | None:
    gpus, tp, pp, dp = (_count(row, c) for c in ("gpus", "tp", "pp", "dp"))
    if tp * pp * dp == gpus:
        return None
    return f"tp x pp x dp is {tp} x {pp} x {dp} = {tp * pp * dp}, but gpus is {gpus}"


def _batch(row: Row) -> str | None:
    gbs, mbs, gas, dp = (_count(row, c) for c in ("gbs", "mbs", "gas", "dp"))
    if mbs * gas * dp == gbs:
        return None
    return f"mbs x gas x dp is {mbs} x {gas} x {dp} = {mbs * gas * dp}, but gbs is {gbs}"


def _speed(row: Row) -> str | None:
    printed, seconds = _number(row, "tflops"), _seconds(row)
    # Tables of floats print 137 s as 137.0: that zero says nothing of how exact it is.
    seconds_off = _rounding(row["seconds"].strip().removesuffix(".0"))
    tflops_off = _rounding(row["tflops"].strip())
    slowest = _tflops(row, seconds + seconds_off) - tflops_off
    fastest = _tflops(row, max(seconds - seconds_off, seconds / 2)) + tflops_off
    if slowest <= printed <= fastest:
        return None
    return f"{seconds:g} s make {_tflops(row, seconds):.2f} TFLOPs, but tflops is {printed:g}"


def _tflops(row: Row, seconds: float) -> float:
    flag = row.get("recompute", "").strip().lower()
    if flag not in _YES + _NO:
        raise InputError(f"recompute must be yes or no, but is {flag!r}")
    return model_tflops_per_gpu(
        size_b=_number(row, "size_b"),
        seq_len=_count(row, "seq"),
        global_batch=_count(row, "gbs"),
        step_s=seconds,
        gpus=_count(row, "gpus"),
        recompute=flag in _YES,
    )


def _seconds(row: Row) -> float:
    status = row.get("status", "").strip()
    if not row["seconds"].strip() and status and status.lower() != "ok":
        raise InputError(f"no seconds: {status}")
    return _number(row, "seconds")


def _count(row: Row, column: str) -> int:
    value = _number(row, column)
    if not value.is_integer():
        raise InputError(f"{column} must be a whole number, but is {row[column]!r}")
    return int(value)


def _number(row: Row, column: str) -> float:
    text = row.get(column, "").strip() or _BLANK.get(column, "")
    if not text:
        raise InputError(f"no {column}")
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise InputError(f"{column} must be a positive number, but is {text!r}")
    return value


def _rounding(text: str) -> float:
    """Half a unit of the last printed digit."""
    return 0.5 * 10.0 ** -len(text.partition(".")[2])
