"""The hosts of a lab and the links between them, as the switch is told."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray_train_geo.errors import SpecError
from ray_train_geo.lab.fabric import Shape

__all__ = ["Host", "Network", "Shared"]

Pair = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Host:
    """An emulated machine: a node of the topology."""

    name: str
    address: str
    region: str
    zone: str = ""
    market_type: str = "on-demand"


@dataclass(frozen=True, slots=True)
class Shared:
    """What all packets of some pairs of hosts share: a NIC, or an uplink between regions."""

    name: str
    bytes_per_s: float
    pairs: tuple[Pair, ...]


@dataclass(frozen=True, slots=True)
class Network:
    """The hosts of a lab and the links between them, by number of host."""

    hosts: tuple[Host, ...]
    links: Mapping[Pair, Shape]
    shared: tuple[Shared, ...]

    def numbers(self, name: str) -> list[int]:
        """The host called ``name``, or the hosts of the region of that name.

        Raises:
            SpecError: there is neither.
        """
        found = [i for i, h in enumerate(self.hosts) if h.name == name] or [
            i for i, h in enumerate(self.hosts) if h.region == name
        ]
        if not found:
            known = ", ".join(dict.fromkeys(n for h in self.hosts for n in (h.name, h.region)))
            raise SpecError(f"no host or region {name!r} in this lab: there are {known}")
        return found

    def to_json(self) -> dict[str, Any]:
        """As JSON knows it; :meth:`from_json` takes it."""
        return {
            "hosts": [dataclasses.asdict(h) for h in self.hosts],
            "links": [[*pair, dataclasses.asdict(shape)] for pair, shape in self.links.items()],
            "shared": [dataclasses.asdict(s) for s in self.shared],
        }

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> Network:
        return cls(
            tuple(Host(**h) for h in given["hosts"]),
            {(a, b): Shape(**shape) for a, b, shape in given["links"]},
            tuple(
                Shared(s["name"], s["bytes_per_s"], tuple((a, b) for a, b in s["pairs"]))
                for s in given["shared"]
            ),
        )
