"""Spot traces: which nodes a market gave and took back, and when.

Four shapes of file are understood; blank lines, and lines that begin with ``#``, are skipped::

    0,add,node1               Bamboo's AWS traces: milliseconds, add or remove, node
    420000,remove,node1

    2021-12-11, 11:11:30, 55  Bamboo's GCP traces: date, time, how many nodes are up
    2021-12-11, 11:15:50, 54

    time_s,op,node,region,gpu         our own: seconds; region and gpu may be left out.
    0,add,a,ohio,V100-16G             A notice says that the node will soon be taken back.
    600,notice,a
    720,remove,a

    - {time_s: 0, op: add, node: a}   the same in YAML
"""

from __future__ import annotations

import csv
import math
import random
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from importlib import resources
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, cast, get_args

import yaml

from ray_train_geo.errors import SpecError

__all__ = ["TRACES", "SpotTrace", "TraceEvent", "TraceOp", "load_trace"]

TraceOp = Literal["add", "remove", "notice"]

TRACES: Mapping[str, str] = {"aws-p3": "aws-p3.csv", "gcp-a100": "gcp-a100.txt"}
"""Traces that come with the package, by name; each file says where it is from."""

_OPS = get_args(TraceOp)
_REQUIRED = ("time_s", "op", "node")
_COLUMNS = (*_REQUIRED, "region", "gpu")
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}$")
_SHAPES = (
    "a trace is one of: MILLISECONDS,add|remove,NODE; DATE, TIME, NODES UP; a header "
    f"{','.join(_REQUIRED)}[,region,gpu] with such rows below; a YAML list of mappings with these"
)


@dataclass(frozen=True, slots=True)
class TraceEvent:
    """A node comes, goes, or is about to go.

    Args:
        region, gpu: of a node that is added, where the trace says so.
    """

    time_s: float
    op: TraceOp
    node: str
    region: str | None = None
    gpu: str | None = None


@dataclass(frozen=True, slots=True)
class SpotTrace:
    """Events in the order of time, and when the record ends.

    A node is added before it is removed or given notice; it may be added again afterwards.
    """

    name: str
    events: tuple[TraceEvent, ...]
    end_s: float

    def until(self, end_s: float) -> SpotTrace:
        """The same record to ``end_s``; beyond its end, what is there stays."""
        return replace(self, events=tuple(e for e in self.events if e.time_s < end_s), end_s=end_s)

    def with_notice(self, notice_s: float) -> SpotTrace:
        """The same record, with each removal announced so long before, or when the node is added.

        Notices that the trace has stay as they are.
        """
        added: dict[str, float] = {}
        told: set[str] = set()
        notices: list[TraceEvent] = []
        for e in self.events:
            if e.op == "add":
                added[e.node] = e.time_s
                told.discard(e.node)
            elif e.op == "notice":
                told.add(e.node)
            elif e.node not in told:
                at = max(added[e.node], e.time_s - notice_s)
                if at < e.time_s:
                    notices.append(TraceEvent(at, "notice", e.node))
        # Stable: a notice comes behind what happens at the same time, so behind the node's add.
        both = sorted((*self.events, *notices), key=lambda e: e.time_s)
        return replace(self, events=tuple(both))

    def faster(self, factor: float) -> SpotTrace:
        """The same record, ``factor`` times as fast."""
        events = tuple(replace(e, time_s=e.time_s / factor) for e in self.events)
        return replace(self, events=events, end_s=self.end_s / factor)

    def thinned(self, nodes: int) -> SpotTrace:
        """What a share of the market gave and took: at most ``nodes`` at once.

        The record's nodes come to as many places as are ever taken at once, each to the one that
        has been free for longest; kept are those of ``nodes`` places, spread evenly.  So a place
        is empty as often as in the whole record, and its nodes come and go as often.
        """
        places = deque(range(self._most_at_once()))
        if nodes >= len(places):
            return self
        kept = {p for p in places if (p + 1) * nodes // len(places) > p * nodes // len(places)}
        at: dict[str, int] = {}
        events: list[TraceEvent] = []
        for e in self.events:
            if e.op == "add":
                at[e.node] = places.popleft()
            if at[e.node] in kept:
                events.append(e)
            if e.op == "remove":
                places.append(at[e.node])
        return replace(self, events=tuple(events))

    def _most_at_once(self) -> int:
        changes = (1 if e.op == "add" else -1 for e in self.events if e.op != "notice")
        return max(accumulate(changes), default=0)


def load_trace(path: str | Path, seed: int = 0) -> SpotTrace:
    """Read a trace: a file, or one of :data:`TRACES` by its name.

    Args:
        seed: of which nodes go, where a file tells only how many are left.

    Raises:
        SpecError: the file can't be read or has no events; or what is wrong, and in which line: an
            unknown operation, time that runs backwards, a node removed that is not there.
    """
    packed = TRACES.get(str(path))
    source = Path(path)
    try:
        if packed is not None:
            text = (resources.files("ray_train_geo.cluster") / "data" / packed).read_text()
        else:
            text = source.read_text()
    except OSError as e:
        names = ", ".join(TRACES)
        raise SpecError(
            f"can't read the trace {path}: {e.strerror or e} (traces by name: {names})"
        ) from None
    except UnicodeDecodeError:
        raise SpecError(f"{path} is not text; {_SHAPES}") from None
    try:
        events, end_s = _read(text, source.suffix.lower() in (".yaml", ".yml"), seed)
        _check(events)
    except _FaultError as e:
        raise SpecError(f"{path}: {e}") from None
    return SpotTrace(source.stem, tuple(event for _, event in events), end_s)


class _FaultError(Exception):
    """What is wrong with a trace, and where."""


_Placed = tuple[str, TraceEvent]
"""Where it stands in the file, and the event."""


def _read(text: str, is_yaml: bool, seed: int) -> tuple[list[_Placed], float]:
    if is_yaml:
        return _ended([_event(where, row) for where, row in _yaml_rows(text)])
    lines = [
        (f"line {n}", [cell.strip() for cell in cells])
        for n, cells in enumerate(csv.reader(text.splitlines()), start=1)
        if cells and "".join(cells).strip() and not cells[0].lstrip().startswith("#")
    ]
    if not lines:
        raise _FaultError(f"the trace is empty; {_SHAPES}")
    where, first = lines[0]
    if "time_s" in first:
        rows = _header_rows(where, first, lines[1:])
        return _ended([_event(place, row) for place, row in rows])
    if len(first) == 3 and _DATE.match(first[0]):
        return _from_counts(lines, seed)
    if len(first) == 3 and _number(first[0]) is not None:
        return _ended([_bamboo_event(place, cells) for place, cells in lines])
    raise _FaultError(f"{where}: {','.join(first)!r} is of no known shape; {_SHAPES}")


def _ended(events: list[_Placed]) -> tuple[list[_Placed], float]:
    """Such a record ends with its last event."""
    if not events:
        raise _FaultError("the trace has no events; add at least one node")
    return events, events[-1][1].time_s


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _bamboo_event(where: str, cells: list[str]) -> _Placed:
    if len(cells) != 3:
        raise _FaultError(f"{where}: {len(cells)} columns, not 3: MILLISECONDS,add|remove,NODE")
    time_ms = _number(cells[0])
    if time_ms is None:
        raise _FaultError(f"{where}: {cells[0]!r} is no number of milliseconds")
    return _event(where, {"time_s": time_ms / 1e3, "op": cells[1], "node": cells[2]})


def _header_rows(
    where: str, header: list[str], lines: Iterable[tuple[str, list[str]]]
) -> Iterator[tuple[str, dict[str, Any]]]:
    _check_columns(where, header)
    for place, cells in lines:
        if len(cells) > len(header):
            raise _FaultError(f"{place}: {len(cells)} columns, but the header has {len(header)}")
        yield place, {name: cell for name, cell in zip(header, cells, strict=False) if cell}


def _check_columns(where: str, names: Iterable[str]) -> None:
    names = list(names)
    if unknown := [n for n in names if n not in _COLUMNS]:
        raise _FaultError(f"{where}: unknown {', '.join(unknown)}; there are {', '.join(_COLUMNS)}")
    if len(set(names)) < len(names):
        raise _FaultError(f"{where}: a column is named twice")


def _yaml_rows(text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        raw = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as e:
        raise _FaultError(f"not valid YAML: {e}") from None
    if raw is None:
        raise _FaultError(f"the trace is empty; {_SHAPES}")
    if not isinstance(raw, list):
        raise _FaultError(f"not a list of events; {_SHAPES}")
    for n, row in enumerate(raw, start=1):
        if not isinstance(row, dict):
            raise _FaultError(f"event {n}: not a mapping with {', '.join(_REQUIRED)}: {row!r}")
        _check_columns(f"event {n}", map(str, row))
        yield f"event {n}", row


def _event(where: str, row: Mapping[str, Any]) -> _Placed:
    if missing := [name for name in _REQUIRED if row.get(name) in (None, "")]:
        raise _FaultError(f"{where}: it does not say {' and '.join(missing)}")
    time_s = None if isinstance(row["time_s"], bool) else _number(str(row["time_s"]))
    if time_s is None or not math.isfinite(time_s):
        raise _FaultError(f"{where}: the time {row['time_s']!r} is no number")
    op = str(row["op"])
    if op not in _OPS:
        raise _FaultError(f"{where}: unknown operation {op!r}; there are {', '.join(_OPS)}")
    given = {name: str(row[name]) for name in ("region", "gpu") if row.get(name) is not None}
    if given and op != "add":
        raise _FaultError(f"{where}: {' and '.join(given)} belong to the add, not to {op}")
    return where, TraceEvent(time_s, cast(TraceOp, op), str(row["node"]), **given)


def _from_counts(lines: list[tuple[str, list[str]]], seed: int) -> tuple[list[_Placed], float]:
    """Nodes that keep to the counts: new ones come, and which go is drawn by lot."""
    rng = random.Random(seed)
    there: list[str] = []
    events: list[_Placed] = []
    made, start, now_s = 0, None, 0.0
    for where, cells in lines:
        if len(cells) != 3:
            raise _FaultError(f"{where}: {len(cells)} columns, not 3: DATE, TIME, NODES UP")
        try:
            moment = datetime.strptime(" ".join(cells[:2]), "%Y-%m-%d %H:%M:%S")
        except ValueError:
            wrong = ", ".join(cells[:2])
            raise _FaultError(
                f"{where}: {wrong!r} is no date and time as 2021-12-11, 11:11:30"
            ) from None
        if not cells[2].isascii() or not cells[2].isdigit():
            raise _FaultError(f"{where}: {cells[2]!r} is no number of nodes")
        start = start or moment
        before_s, now_s = now_s, (moment - start).total_seconds()
        if now_s < before_s:
            raise _FaultError(f"{where}: time runs backwards, by {before_s - now_s:g} s")
        count = int(cells[2])
        while len(there) > count:
            gone = there.pop(rng.randrange(len(there)))
            events.append((where, TraceEvent(now_s, "remove", gone)))
        while len(there) < count:
            made += 1
            there.append(f"node{made}")
            events.append((where, TraceEvent(now_s, "add", there[-1])))
    if not events:
        raise _FaultError("no node is ever up")
    return events, now_s


def _check(events: Iterable[_Placed]) -> None:
    """Time goes on, and nobody leaves who is not there."""
    there: set[str] = set()
    before_s = 0.0
    for where, e in events:
        if e.time_s < 0:
            raise _FaultError(f"{where}: the time is negative: {e.time_s:g} s")
        if e.time_s < before_s:
            raise _FaultError(
                f"{where}: time runs backwards, from {before_s:g} s to {e.time_s:g} s; sort the "
                "events by time"
            )
        before_s = e.time_s
        if e.op == "add":
            if e.node in there:
                raise _FaultError(f"{where}: {e.node} is added, but it is there already")
            there.add(e.node)
        elif e.node not in there:
            raise _FaultError(f"{where}: {e.op} of {e.node}, which is not there")
        elif e.op == "remove":
            there.remove(e.node)
