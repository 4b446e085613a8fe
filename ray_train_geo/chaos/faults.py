"""What a chaos run does to its cluster, and when (level 0).

::

    faults  =  fault {"," fault}
    fault   =  [COUNT "*"] KIND [":" SECONDS] ["@" MOMENT]
    KIND    =  kill-worker | kill-node | freeze | partition | drain | join | kill-coordinator
               | fill-disk
    MOMENT  =  random | step:N | time:S | phase:P

    kill-worker@step:10, kill-node@time:30, freeze:5@random, 3*kill-worker@phase:backward
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, cast, get_args

from ray_train_geo.errors import InputError

__all__ = ["KINDS", "PHASES", "Fault", "FaultKind", "Moment", "PhaseName", "parse_faults"]

FaultKind = Literal[
    "kill-worker",
    "kill-node",
    "freeze",
    "partition",
    "drain",
    "join",
    "kill-coordinator",
    "fill-disk",
]
PhaseName = Literal["forward", "backward", "sync", "optimizer", "checkpoint", "recovery"]

PHASES: tuple[PhaseName, ...] = get_args(PhaseName)

KINDS: Mapping[FaultKind, float | None] = {
    "kill-worker": None,
    "kill-node": None,
    "freeze": 10.0,
    "partition": 15.0,
    "drain": 30.0,
    "join": None,
    "kill-coordinator": None,
    "fill-disk": 10.0,
}
"""Every fault, and for how many seconds if nothing else is said; None where it has no length."""

_WORKERS_PHASE: frozenset[FaultKind] = frozenset(
    {"kill-worker", "kill-node", "freeze", "partition", "fill-disk"}
)
"""What befalls one worker, so that it can wait for a phase of that worker; or all of them."""

_MOST = 1000
_FAULT = re.compile(r"(?:(?P<count>[^*@]*)\*)?(?P<what>[^@]*)(?:@(?P<when>.*))?", re.DOTALL)
_SYNTAX = "[COUNT*]KIND[:SECONDS][@random|@step:N|@time:S|@phase:P]"


@dataclass(frozen=True, slots=True)
class Moment:
    """When a fault happens.

    Args:
        kind: ``random``: some steps after the run is at full strength again; ``step``: once that
            step is committed; ``time``: seconds after the first committed step; ``phase``: while
            the worker that it befalls is in that phase of a step.
        at: the step or the seconds.
    """

    kind: Literal["random", "step", "time", "phase"] = "random"
    at: float = 0.0
    phase: PhaseName | None = None

    def __str__(self) -> str:
        match self.kind:
            case "random":
                return "random"
            case "phase":
                return f"phase:{self.phase}"
            case _:
                return f"{self.kind}:{self.at:.10g}"


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong.

    Args:
        seconds: how long it lasts; of a drain: from the notice to the end of the node.
    """

    kind: FaultKind
    seconds: float | None
    moment: Moment

    def __str__(self) -> str:
        length = "" if self.seconds is None else f":{self.seconds:g}"
        return f"{self.kind}{length}@{self.moment}"


def parse_faults(text: str) -> tuple[Fault, ...]:
    """The faults that ``text`` lists, in its order.

    Raises:
        InputError: what is wrong with it.
    """
    faults: list[Fault] = []
    for part in text.split(","):
        if part.strip():
            faults += _parse(part.strip())
            if len(faults) > _MOST:
                raise InputError(f"--faults: more than {_MOST} faults")
    return tuple(faults)


def _parse(part: str) -> list[Fault]:
    match = _FAULT.fullmatch(part)
    assert match is not None  # any text matches
    kind_text, _, seconds_text = match["what"].strip().partition(":")
    kind = cast(FaultKind, _one_of(kind_text.strip(), KINDS, "fault", part))
    seconds = KINDS[kind]
    if seconds_text:
        if seconds is None:
            raise InputError(f"--faults: {part!r}: {kind} has no length; leave :{seconds_text} out")
        seconds = _number(seconds_text, "seconds", part)
    moment = _moment(match["when"], part)
    if moment.kind == "phase" and kind not in _WORKERS_PHASE:
        raise InputError(
            f"--faults: {part!r}: {kind} befalls no single worker, so it can't wait for a phase; "
            "use @step:N, @time:S or @random"
        )
    return [Fault(kind, seconds, moment)] * _count(match["count"], part)


def _count(text: str | None, part: str) -> int:
    if text is None:
        return 1
    count = text.strip()
    if not count.isascii() or not count.isdigit() or not 1 <= int(count) <= _MOST:
        raise InputError(f"--faults: {part!r}: the count {count!r} is none of 1 to {_MOST}")
    return int(count)


def _moment(text: str | None, part: str) -> Moment:
    if text is None or text.strip() == "random":
        return Moment()
    kind, _, value = (s.strip() for s in text.partition(":"))
    match kind:
        case "step":
            if not value.isascii() or not value.isdigit() or int(value) < 1:
                raise InputError(f"--faults: {part!r}: {value!r} is no step: 1, 2 ...")
            return Moment("step", int(value))
        case "time":
            return Moment("time", _number(value, "time", part))
        case "phase":
            return Moment("phase", phase=cast(PhaseName, _one_of(value, PHASES, "phase", part)))
    raise InputError(f"--faults: {part!r}: {text.strip()!r} is no moment; a fault is {_SYNTAX}")


def _number(text: str, what: str, part: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < 0:
        raise InputError(f"--faults: {part!r}: {what} {text.strip()!r} is no number of seconds")
    return value


def _one_of(name: str, names: Iterable[str], what: str, part: str) -> str:
    known = list(names)
    if name in known:
        return name
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
    raise InputError(f"--faults: {part!r}: {name!r} is no {what}; {hint}")
