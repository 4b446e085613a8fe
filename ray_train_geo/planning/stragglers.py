"""Devices that compute persistently slower than their plan was made for.

A stage is held against itself and against the others::

    slowness    observed / predicted seconds of a microbatch
    own         slowness, beside what it was at the generation's first samples
    relative    slowness over the median of all others', beside what that was

What predictions miss by was there from the start; what slows all devices alike (a machine under
load) is in all others' slowness.  So only a device that has changed on its own stands out in both.
One that was slow from the start stands out, later, from others with the same layers.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from ray_train_geo.planning.drift import Drift
from ray_train_geo.planning.plan import Plan

__all__ = ["Straggler", "StragglerWatch"]

_FACTOR = 1.5
_PERSIST_S = 15.0
_TWINS = 2
"""So many other stages of the same layers say what a device should take."""

_TWINS_PERSIST_S = 60.0


@dataclass(frozen=True, slots=True)
class Straggler:
    """A device whose speed is not what it was.

    Args:
        ratio: of its time to what was usual; below 1 it has become faster.
        observed_s, predicted_s: of one microbatch, forward and backward.
    """

    device: str
    ratio: float
    observed_s: float
    predicted_s: float


class StragglerWatch:
    """Of one generation.

    Args:
        predicted_s: by device, forward and backward of one microbatch.
        before: of the generation before: who has the same layers still has the same usual time.
    """

    def __init__(
        self, plan: Plan, predicted_s: Mapping[str, float], before: StragglerWatch | None = None
    ) -> None:
        self._predicted_s = dict(predicted_s)
        stages = [s for p in plan.pipelines for s in p.stages]
        self._layers = {s.device: s.layers for s in stages}
        twins = {
            s.device: [t.device for t in stages if t.layers == s.layers and t is not s]
            for s in stages
        }
        self._twins = {device: those for device, those in twins.items() if len(those) >= _TWINS}
        known = {} if before is None else before._usual_s()
        self._own = {
            device: Drift(
                _FACTOR,
                _PERSIST_S,
                usual=[s / predicted_s[device] for s in known.get((device, run), ())],
            )
            for device, run in self._layers.items()
        }
        self._relative = {device: Drift(_FACTOR, _PERSIST_S) for device in self._layers}
        self._beside_twins = {
            device: Drift(_FACTOR, _TWINS_PERSIST_S, usual=[1.0] * 8) for device in self._twins
        }

    def _usual_s(self) -> dict[tuple[str, tuple[int, int]], list[float]]:
        """What a microbatch usually takes, by device and layers, as far as that is known."""
        return {
            (device, run): [level * self._predicted_s[device] for level in self._own[device].usual]
            for device, run in self._layers.items()
        }

    def add(self, now_s: float, observed_s: Mapping[str, float]) -> list[Straggler]:
        """What the latest samples, seconds of one microbatch by device, give away."""
        slowness = {
            device: seconds / self._predicted_s[device]
            for device, seconds in observed_s.items()
            if device in self._predicted_s
        }
        found = []
        for device, level in slowness.items():
            others = [other for name, other in slowness.items() if name != device]
            self._own[device].add(now_s, level)
            self._relative[device].add(now_s, level / statistics.median(others or [1.0]))
            twins = [slowness[t] for t in self._twins.get(device, ()) if t in slowness]
            if len(twins) >= _TWINS:
                self._beside_twins[device].add(now_s, level / statistics.median(twins))
            ratio = self._ratio(device)
            if ratio is not None:
                self._settle(device)
                found.append(
                    Straggler(device, ratio, observed_s[device], self._predicted_s[device])
                )
        return found

    def _ratio(self, device: str) -> float | None:
        own, relative = self._own[device].ratio, self._relative[device].ratio
        if own is not None and relative is not None and (own > 1) == (relative > 1):
            return min(own, relative) if own > 1 else max(own, relative)
        beside = self._beside_twins.get(device)
        ratio = None if beside is None else beside.ratio
        return ratio if ratio is not None and ratio > 1 else None

    def _settle(self, device: str) -> None:
        """Told once: from here on this is usual, whatever the twins do."""
        self._own[device].settle()
        self._relative[device].settle()
        self._beside_twins.pop(device, None)
        self._twins.pop(device, None)
