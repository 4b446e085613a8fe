"""All systems on the same devices and the same batch, measured beside predicted."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import fmean, median
from typing import Any

from ray_train_geo.cluster.scenarios import scenario as named_topology
from ray_train_geo.cluster.topology import Topology
from ray_train_geo.errors import InputError, PlanError, SpecError
from ray_train_geo.model.catalog import CATALOG
from ray_train_geo.systems.catalog import SYSTEMS
from ray_train_geo.systems.figures import FIGURES, figures
from ray_train_geo.systems.names import catalog_model
from ray_train_geo.systems.place import place
from ray_train_geo.systems.published import Measured, measured
from ray_train_geo.systems.simulate import simulate
from ray_train_geo.systems.simulated import Simulated

__all__ = ["Compared", "Comparison", "compare"]

_OURS = "ours"
_MOST_REASONS = 3
_MOST_MEDIANS = 3.0


@dataclass(frozen=True, slots=True)
class Compared:
    """One system of a comparison.

    Args:
        precision: that the system computes in; published systems differ.
        predicted: None where the system can't do it.
        why_not: then the reason, in words; else empty.
        measured_s: published seconds of such a step, run by run; empty where none are.
    """

    system: str
    precision: str
    predicted: Simulated | None
    why_not: str
    measured_s: tuple[float, ...]

    @property
    def mean_measured_s(self) -> float | None:
        """Seconds; None where nothing was published."""
        return fmean(self.measured_s) if self.measured_s else None

    @property
    def prediction_error(self) -> float | None:
        """Predicted over measured, less 1; None where either is missing."""
        if self.predicted is None or not self.measured_s:
            return None
        return self.predicted.step_s / fmean(self.measured_s) - 1

    def to_json(self) -> dict[str, Any]:
        """For programs; what there is not is null."""
        found = dict.fromkeys(FIGURES) if self.predicted is None else figures(self.predicted)
        return {
            "system": self.system,
            "precision": self.precision,
            **found,
            "measured_s": self.mean_measured_s,
            "measurements_s": list(self.measured_s),
            "prediction_error": self.prediction_error,
            "error": self.why_not or None,
        }


@dataclass(frozen=True, slots=True)
class Comparison:
    """Systems side by side: ours first, then the fastest first, last those that can't.

    Args:
        place: the scenario's name, or ``topology``.
        also_measured: (model, global batch) of other published steps on this scenario.
    """

    place: str
    devices: int
    model: str
    global_batch: int
    rows: tuple[Compared, ...]
    also_measured: tuple[tuple[str, int], ...]

    @property
    def chart_s(self) -> float:
        """Seconds that a chart of the steps shows; a few that take far longer are cut off."""
        steps_s = [row.predicted.step_s for row in self.rows if row.predicted is not None]
        return min(max(steps_s), _MOST_MEDIANS * median(steps_s))

    @property
    def refusals(self) -> dict[str, list[str]]:
        """Each reason why a system can't do it, with the systems that it holds for."""
        return _refusals(self.rows)

    @property
    def mean_absolute_error(self) -> float | None:
        """Of the predictions that have a measurement beside them, as a fraction."""
        errors = [abs(e) for e in (row.prediction_error for row in self.rows) if e is not None]
        return fmean(errors) if errors else None

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "scenario": self.place,
            "devices": self.devices,
            "model": self.model,
            "global_batch": self.global_batch,
            "systems": [row.to_json() for row in self.rows],
            "mean_absolute_error": self.mean_absolute_error,
            "also_measured": [
                {"model": model, "global_batch": batch} for model, batch in self.also_measured
            ],
        }


def compare(
    scenario: str | None = None,
    *,
    topology: Topology | str | Path | None = None,
    model: str = "gpt3-xl-24",
    global_batch: int = 1024,
    systems: Iterable[str] | None = None,
    on_system: Callable[[str], None] = lambda name: None,
) -> Comparison:
    """Simulate one step of every system on the same devices.

    Args:
        scenario: a named cluster; only these have measurements beside them.
        topology: in its place, devices and links, or their file.
        model: in the catalog.  Default: the one that the published comparison is about.
        global_batch: sequences of one step.  Default: the published comparison's.
        systems: their names.  Default: all.
        on_system: called before each system with its name.

    Raises:
        SpecError: an unknown name, no place or two, or no batch.
        PlanError: no system can do it; the message has the reasons.
    """
    scenario, devices = place(scenario, topology)
    if scenario is not None:
        named_topology(scenario)  # which refuses a name that there is not
    model = catalog_model(model)
    if global_batch < 1:
        raise SpecError(f"the global batch is {global_batch}: give sequences from 1 on")
    names = _systems(systems)
    public = [] if scenario is None else [(_workload(m), m) for m in measured(scenario)]
    asked = (model, global_batch)
    rows = []
    for name in names:
        on_system(name)
        predicted, why_not = None, ""
        try:
            predicted = simulate(name, model, global_batch, scenario=scenario, topology=devices)
        except InputError as e:
            why_not = " ".join(str(e).split())
        runs = (m.seconds for w, m in public if m.system == name and _same(w, asked))
        seconds = tuple(chain.from_iterable(runs))
        precision = SYSTEMS[name].options["precision"].default
        rows.append(Compared(name, precision, predicted, why_not, seconds))
    if all(row.predicted is None for row in rows):
        raise PlanError(_nobody(rows))
    return Comparison(
        scenario or "topology",
        max(row.predicted.devices for row in rows if row.predicted is not None),
        model,
        global_batch,
        tuple(sorted(rows, key=_rank)),
        tuple(dict.fromkeys(w for w, _ in public if not _same(w, asked))),
    )


def _workload(row: Measured) -> tuple[str, int]:
    return catalog_model(row.model, row.layers), row.global_batch


def _same(a: tuple[str, int], b: tuple[str, int]) -> bool:
    """Two names of one model are the same work."""
    return CATALOG[a[0]] == CATALOG[b[0]] and a[1] == b[1]


def _nobody(rows: Sequence[Compared]) -> str:
    reasons = [f"{why} ({', '.join(names)})" for why, names in _refusals(rows).items()]
    more = f"; and {len(reasons) - _MOST_REASONS} more reasons" * (len(reasons) > _MOST_REASONS)
    return f"no system can do this: {'; '.join(reasons[:_MOST_REASONS])}{more}"


def _refusals(rows: Sequence[Compared]) -> dict[str, list[str]]:
    systems: dict[str, list[str]] = {}
    for row in rows:
        if row.why_not:
            systems.setdefault(row.why_not, []).append(row.system)
    return systems


def _rank(row: Compared) -> tuple[bool, float]:
    """Ours first, then the fastest first; what can't comes last."""
    return row.system != _OURS, math.inf if row.predicted is None else row.predicted.step_s


def _systems(names: Iterable[str] | None) -> list[str]:
    if names is None:
        return list(SYSTEMS)
    wanted = list(dict.fromkeys(names))
    if not wanted:
        raise SpecError(f"no systems to compare: give some of {', '.join(SYSTEMS)}")
    for name in wanted:
        if name not in SYSTEMS:
            close = difflib.get_close_matches(name, SYSTEMS, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise SpecError(f"unknown system {name!r}{hint} (there are: {', '.join(SYSTEMS)})")
    return wanted
