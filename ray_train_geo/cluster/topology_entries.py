"""What may stand in a topology file, entry by entry; ``topology_file`` puts the entries together.

Where people write one unit and programs another, either may be given: ``latency_ms`` or
``latency_s``, ``bandwidth_gbps`` or ``bandwidth_bytes_per_s``, ``window_mb`` or ``window_bytes``,
``memory_gb`` or ``memory_bytes``, ``gbps`` or ``bytes_per_s``.  Giga and mega are decimal.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)

from ray_train_geo.cluster.gpus import GpuPrecision, gpu
from ray_train_geo.cluster.topology import Device, Link, MarketType, Uplink
from ray_train_geo.errors import SpecError

__all__ = [
    "UPLINK_KINDS",
    "LinkEntry",
    "NodeUplinkEntry",
    "RegionUplinkEntry",
    "TopologyEntries",
]

_GBPS = 1e9 / 8  # bytes per second

UPLINK_KINDS = NODE_UPLINK, REGION_UPLINK = "of a node", "of regions"
"""What pydantic calls the two kinds of uplinks in the place of an error."""


def _whole(value: Any) -> Any:
    """YAML 1.1 reads 8e10 as a string; a number of bytes may be written so."""
    try:
        return int(float(value)) if isinstance(value, str) else value
    except (ValueError, OverflowError):
        return value


Name = Annotated[str, Field(min_length=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1, le=100_000)]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def given(self, *fields: str) -> str | None:
        """Which one of ``fields`` is given.

        Raises:
            ValueError: more than one is.
        """
        there = [f for f in fields if getattr(self, f) is not None]
        if len(there) > 1:
            raise ValueError(f"give only one of {', '.join(there)}")
        return there[0] if there else None


class _Hardware(_Entry):
    """What devices are; figures that are left out are the catalog's of their type."""

    region: str = "local"
    zone: str = ""
    market_type: MarketType = "on-demand"
    type: str = "cpu"
    flops_per_s: Positive | None = None
    flops_by_precision: dict[GpuPrecision, Positive] | None = None
    memory_bytes: Annotated[int, Field(gt=0), BeforeValidator(_whole)] | None = None
    memory_gb: Positive | None = None
    price_per_hour: Annotated[float, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _enough(self) -> _Hardware:
        memory = self.given("memory_bytes", "memory_gb")
        if self.type.lower().startswith("cpu"):
            return self
        if memory is None or (self.flops_per_s is None and not self.flops_by_precision):
            try:
                gpu(self.type)
            except SpecError as e:
                raise ValueError(f"{e}; or give flops_per_s and memory_bytes") from None
        return self

    def at(self, device_id: str, node: str) -> Device:
        """One such device."""
        device = Device(device_id, node, self.region, self.zone, self.market_type, self.type)
        try:
            known = gpu(self.type).device(device_id, node, market_type=self.market_type)
        except SpecError:
            known = device
        rates = known.flops_by_precision if self.flops_per_s is None else ()
        if self.flops_by_precision is not None:
            rates = tuple(self.flops_by_precision.items())
        speed = self.flops_per_s
        if speed is None:
            speed = dict(rates).get("fp16", max(dict(rates).values(), default=known.flops_per_s))
        memory = self.memory_bytes
        if memory is None:
            memory = known.memory_bytes if self.memory_gb is None else int(self.memory_gb * 1e9)
        price = known.price_per_hour if self.price_per_hour is None else self.price_per_hour
        return Device(
            id=device_id,
            node=node,
            region=self.region,
            zone=self.zone,
            market_type=self.market_type,
            type=self.type,
            flops_per_s=speed,
            memory_bytes=memory,
            price_per_hour=price,
            flops_by_precision=rates,
        )


class DeviceEntry(_Hardware):
    """One device."""

    id: Name
    node: Name

    def devices(self) -> list[Device]:
        return [self.at(self.id, self.node)]


class NodesEntry(_Hardware):
    """One node, or ``count`` equal ones: ``a-0``, ``a-1``, ..., with devices ``a-0/0``, ..."""

    node: Name
    gpus: Count = 1
    count: Count | None = None

    def devices(self) -> list[Device]:
        nodes = [self.node]
        if self.count is not None:
            nodes = [f"{self.node}-{n}" for n in range(self.count)]
        return [self.at(f"{node}/{i}", node) for node in nodes for i in range(self.gpus)]


class _LinkFigures(_Entry):
    latency_ms: Annotated[float, Field(ge=0)] | None = None
    latency_s: Annotated[float, Field(ge=0)] | None = None
    bandwidth_gbps: Positive | None = None
    bandwidth_bytes_per_s: Positive | None = None
    window_mb: Positive | None = None
    window_bytes: Positive | None = None

    @model_validator(mode="after")
    def _complete(self) -> _LinkFigures:
        if self.given("latency_ms", "latency_s") is None:
            raise ValueError("latency_ms is missing")
        if self.given("bandwidth_gbps", "bandwidth_bytes_per_s") is None:
            raise ValueError("bandwidth_gbps is missing")
        self.given("window_mb", "window_bytes")
        return self

    def link(self) -> Link:
        latency_s, rate, window = self.latency_s, self.bandwidth_bytes_per_s, self.window_bytes
        if latency_s is None:
            latency_s = (self.latency_ms or 0.0) / 1e3
        if rate is None:
            rate = (self.bandwidth_gbps or math.inf) * _GBPS
        if window is None:
            window = math.inf if self.window_mb is None else float(round(self.window_mb * 1e6))
        return Link(latency_s, rate, window)


class _Pair(_Entry):
    """From one place to another, and back if ``symmetric``."""

    source: Name = Field(alias="from")
    target: Name = Field(alias="to")
    symmetric: bool = True

    def directions(self) -> list[tuple[str, str]]:
        there = self.source, self.target
        return sorted({there, there[::-1]}) if self.symmetric else [there]


class LinkEntry(_Pair, _LinkFigures):
    """A link between two regions, between two nodes, or inside each node of a region."""

    between: Literal["regions", "nodes", "devices"] = "regions"

    @model_validator(mode="after")
    def _inside(self) -> LinkEntry:
        if self.between == "devices" and self.source != self.target:
            raise ValueError(
                "between: devices is inside each node of a region, which is both from and to"
            )
        return self


class DefaultLinkEntry(_LinkFigures):
    """The link of all pairs that no link names."""


class NodeUplinkEntry(_Entry):
    """The NIC of a node, of each node of a region, or (``node: "*"``) of each node."""

    node: Name | None = None
    region: Name | None = None
    gbps: Positive | None = None
    out_gbps: Positive | None = None
    in_gbps: Positive | None = None
    out_bytes_per_s: Positive | None = None
    in_bytes_per_s: Positive | None = None

    @model_validator(mode="after")
    def _complete(self) -> NodeUplinkEntry:
        if self.given("node", "region") is None:
            raise ValueError(
                'say whose it is: node, region, or from and to; node: "*" is all nodes'
            )
        for way in ("out", "in"):
            if self.given("gbps", f"{way}_gbps", f"{way}_bytes_per_s") is None:
                raise ValueError(f"gbps (or {way}_gbps) is missing")
        return self

    def uplink(self) -> Uplink:
        out, into = self.out_bytes_per_s, self.in_bytes_per_s
        if out is None:
            out = (self.out_gbps or self.gbps or math.inf) * _GBPS
        if into is None:
            into = (self.in_gbps or self.gbps or math.inf) * _GBPS
        return Uplink(out, into)


class RegionUplinkEntry(_Pair):
    """What all flows from one region to another share."""

    gbps: Positive | None = None
    bytes_per_s: Positive | None = None

    @model_validator(mode="after")
    def _complete(self) -> RegionUplinkEntry:
        if self.source == self.target:
            raise ValueError("an uplink is between two regions; inside one, nodes have theirs")
        if self.given("gbps", "bytes_per_s") is None:
            raise ValueError("gbps is missing")
        return self

    def rate_bytes_per_s(self) -> float:
        if self.bytes_per_s is not None:
            return self.bytes_per_s
        return (self.gbps or math.inf) * _GBPS


def _uplink_kind(raw: Any) -> str:
    named = isinstance(raw, dict) and ({"from", "to"} & raw.keys())
    return REGION_UPLINK if named or isinstance(raw, RegionUplinkEntry) else NODE_UPLINK


class TopologyEntries(_Entry):
    """A whole file."""

    devices: list[DeviceEntry] = []
    nodes: list[NodesEntry] = []
    links: list[LinkEntry] = []
    uplinks: list[
        Annotated[
            Annotated[NodeUplinkEntry, Tag(NODE_UPLINK)]
            | Annotated[RegionUplinkEntry, Tag(REGION_UPLINK)],
            Discriminator(_uplink_kind),
        ]
    ] = []
    default_link: DefaultLinkEntry | None = None
