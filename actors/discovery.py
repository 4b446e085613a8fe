"""What devices Ray has for a job: its nodes, their labels and what is free on them."""

from __future__ import annotations

import itertools
import re
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import ray

from ray_train_geo.cluster.gpus import gpu_variants
from ray_train_geo.cluster.topology import Device, MarketType
from ray_train_geo.errors import ClusterError
from ray_train_geo.spec import ScalingSpec

__all__ = ["Node", "devices_on", "draining_nodes", "live_nodes", "matches", "wait_for_devices"]

_REGION_LABELS = ("ray.io/availability-region", "ray.io/region")
_ZONE_LABELS = ("ray.io/availability-zone", "ray.io/zone")
_MARKET_LABEL = "ray.io/market-type"
_THIS_MACHINE = ("127.0.0.1", "::1", "localhost")
_FREEING_S = 30.0
_SETTLED_S = 1.5
_POLL_S = 0.25
# Until its worker has measured them.
_CPU_FLOPS_PER_S = 2e10
_UNKNOWN_GPU_FLOPS_PER_S = 1e13
_UNKNOWN_GPU_MEMORY_BYTES = 2**50


@dataclass(frozen=True, slots=True)
class Node:
    """A live Ray node.

    Args:
        machine: what stays the same when it leaves Ray and comes back as another node.
    """

    id: str
    hostname: str
    machine: tuple[str, ...]
    labels: Mapping[str, str]
    total: Mapping[str, float]
    free: Mapping[str, float]

    def label(self, *names: str) -> str:
        return next((self.labels[n] for n in names if self.labels.get(n)), "")

    @property
    def region(self) -> str:
        return self.label(*_REGION_LABELS) or "local"


def live_nodes() -> list[Node]:
    """All live nodes, in the order of their ids."""
    from ray._private.state import available_resources_per_node

    free = available_resources_per_node()
    alive = [n for n in ray.nodes() if n["Alive"]]
    at = Counter(n["NodeManagerAddress"] for n in alive)
    return sorted(
        (
            Node(
                id=n["NodeID"],
                hostname=n["NodeManagerHostname"],
                machine=_machine(n, at[n["NodeManagerAddress"]] == 1),
                labels=n.get("Labels", {}),
                total=n["Resources"],
                free=free.get(n["NodeID"], {}),
            )
            for n in alive
        ),
        key=lambda n: n.id,
    )


def _machine(node: Mapping[str, Any], alone: bool) -> tuple[str, ...]:
    """What names the machine of ``node``; ``alone``: no other node is at its address."""
    address = node["NodeManagerAddress"]
    if not alone or address in _THIS_MACHINE:
        return (node["NodeID"],)  # a cluster on one machine: nothing tells its nodes apart
    return (address, node.get("NodeName", ""))


def matches(labels: Mapping[str, str], selector: Mapping[str, str]) -> bool:
    """Whether a node's labels satisfy a selector, by Ray's rules.

    A value is ``v``, ``!v``, ``in(a, b)`` or ``!in(a, b)``.
    """
    for key, wanted in selector.items():
        negated = wanted.startswith("!")
        text = wanted.removeprefix("!").strip()
        found = re.fullmatch(r"in\((.*)\)", text)
        values = [v.strip() for v in found.group(1).split(",")] if found else [text]
        if (labels.get(key) in values) == negated:
            return False
    return True


def draining_nodes() -> set[str]:
    """Ids of the nodes that Ray is draining: their time is running out."""
    from ray._private.state import state

    return set(state.get_draining_nodes())


def devices_on(
    node: Node, scaling: ScalingSpec, wanted: int | None, taken: Collection[str] = ()
) -> list[Device]:
    """The devices that are free on ``node``.

    Args:
        wanted: how many the job can use at most; a CPU node's memory is shared by so many.
        taken: ids of devices that are in use.
    """
    needs = {k: v for k, v in scaling.resources_per_worker.items() if v > 0}
    # Ray counts in 1/10000; what floats add to that must not cost a device.
    count = min(int(node.free.get(k, 0.0) / v + 1e-6) for k, v in needs.items())
    if count < 1:
        return []
    gpu = needs.get("GPU", 0.0)
    accelerator = node.label("ray.io/accelerator-type") or next(
        (k.removeprefix("accelerator_type:") for k in node.total if k.startswith("accelerator_")),
        "",
    )
    market: MarketType = "spot" if node.labels.get(_MARKET_LABEL) == "spot" else "on-demand"
    if gpu:
        flops_per_s, memory, price_per_hour = _gpu_guess(accelerator, gpu, market)
    else:
        here = count + sum(d.startswith(f"{node.id[-12:]}/") for d in taken)
        sharing = min(here, wanted) if wanted else here
        flops_per_s, price_per_hour = _CPU_FLOPS_PER_S, 0.0
        memory = int(node.total.get("memory", 4 * 2**30) / sharing)
    if scaling.memory_per_worker_bytes is not None:
        memory = scaling.memory_per_worker_bytes
    names = (f"{node.id[-12:]}/{i}" for i in itertools.count())
    return [
        Device(
            id=name,
            node=node.id,
            region=node.region,
            zone=node.label(*_ZONE_LABELS),
            market_type=market,
            type=(accelerator or "gpu") if gpu else "cpu",
            flops_per_s=flops_per_s,
            memory_bytes=memory,
            price_per_hour=price_per_hour,
        )
        for name in itertools.islice((n for n in names if n not in taken), count)
    ]


def _gpu_guess(accelerator: str, gpus: float, market: MarketType) -> tuple[float, int, float]:
    """FLOP/s, memory in bytes and dollars an hour of a worker with ``gpus`` of a GPU (or more)."""
    variants = gpu_variants(accelerator)
    if not variants:
        return _UNKNOWN_GPU_FLOPS_PER_S, _UNKNOWN_GPU_MEMORY_BYTES, 0.0
    # Ray says "A100" of 40 and of 80 GB.  Taken for the larger one: too little memory would have a
    # plan refused before the worker has measured what there is.
    known, share = variants[-1], min(1.0, gpus)
    return (
        share * known.sustained_flops_per_s("fp16"),
        int(share * known.memory_bytes),
        gpus * known.price_per_hour(market),
    )


def wait_for_devices(
    scaling: ScalingSpec,
    needed: int,
    wanted: int | None,
    after_loss: bool = False,
    watch: Callable[[], None] = lambda: None,
) -> list[Device]:
    """All free devices, once there are ``needed``; asks the autoscaler for what is missing.

    Args:
        wanted: as :func:`devices_on`.
        after_loss: a crew was just dismissed: Ray takes a moment to free what its workers had.
        watch: called while waiting; what it raises ends the wait.

    Raises:
        ClusterError: they did not come within ``scaling.wait_s``.
    """
    patience_s = max(scaling.wait_s, _FREEING_S if after_loss else 0.0)
    deadline, asked = time.monotonic() + patience_s, False
    count, since = -1, 0.0
    while True:
        nodes = live_nodes()
        fitting = [n for n in nodes if matches(n.labels, scaling.label_selector)]
        devices = [d for n in fitting for d in devices_on(n, scaling, wanted)]
        if len(devices) != count:
            count, since = len(devices), time.monotonic()
        settled = not after_loss or time.monotonic() - since > _SETTLED_S
        if len(devices) >= needed and (settled or count == wanted):
            return devices
        if time.monotonic() >= deadline:
            raise ClusterError(_shortage(scaling, needed, nodes, fitting, devices))
        if not asked and len(devices) < needed:
            _ask_autoscaler(scaling, needed)
            asked = True
        watch()
        time.sleep(_POLL_S)


def _ask_autoscaler(scaling: ScalingSpec, needed: int) -> None:
    from ray.autoscaler.sdk import request_resources

    bundle: Any = dict(scaling.resources_per_worker)
    request: dict[str, Any] = {"bundles": [bundle] * needed}
    if scaling.label_selector:
        request["bundle_label_selectors"] = [dict(scaling.label_selector)] * needed
    request_resources(**request)


def _shortage(
    scaling: ScalingSpec, needed: int, nodes: list[Node], fitting: list[Node], devices: list[Device]
) -> str:
    per_worker = ", ".join(f"{v:g} {k}" for k, v in scaling.resources_per_worker.items())
    free = "; ".join(
        f"{n.hostname}: "
        + ", ".join(
            f"{n.free.get(k, 0):g} of {n.total.get(k, 0):g} {k} free"
            for k in scaling.resources_per_worker
        )
        for n in fitting
    )
    selected = (
        f"; {len(nodes) - len(fitting)} nodes lack the labels {dict(scaling.label_selector)}"
        if len(fitting) < len(nodes)
        else ""
    )
    waited = f" after {scaling.wait_s:g} s" if scaling.wait_s else ""
    return (
        f"no free devices: the job needs {needed} (of {per_worker} each), Ray has {len(devices)}"
        f"{waited} ({free or 'no node'}{selected}). Add nodes, ask for less in "
        "scaling.resources_per_worker, or wait for them with scaling.wait_s"
    )
