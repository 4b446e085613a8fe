"""ZeRO (Rajbhandari et al., SC 2020): data parallelism with sharded states.

Stage 3 gathers every layer's parameters for its forward and again for its backward and scatters
its gradients, for every microbatch, around one ring of all devices.  Stage 1 all-reduces gradients
in buckets once a step and gathers the updated parameters.
"""

from __future__ import annotations

import math

from ray_train_geo.errors import SpecError
from ray_train_geo.model.catalog import embedding_parameters, layer_parameters, total_parameters
from ray_train_geo.systems.case import Case, Outcome
from ray_train_geo.systems.collectives import ring_of_all

__all__ = ["stage_1", "stage_3"]

_HOST_BYTES_PER_S = 12e9
"""PCIe 3.0 x16, as measured by NVIDIA's bandwidthTest on V100 instances: 11-13 GB/s."""
_OPTIMIZER_BYTES = 16
"""Moved between host and device per parameter and step where the optimizer is on the host:
gradient down and weight up, and the host's own reads and writes of its fp32 states at that rate."""


def stage_3(case: Case) -> Outcome:
    """Parameters, gradients and optimizer sharded over all devices."""
    figures = case.constants.zero_3
    rounds, compute_s = _compute(case)
    per_byte, around_s = _ring(case)
    per_byte /= figures.bandwidth_share
    devices = len(case.topology.devices)
    share = (devices - 1) / devices
    layer = case.element_bytes * layer_parameters(case.dims)
    rest = case.element_bytes * embedding_parameters(case.dims)
    bucket = 1e6 * case.values.whole("bucket_mb")
    collectives = case.dims.layers * max(1, math.ceil(layer / bucket)) + max(
        1, math.ceil(rest / bucket)
    )
    once_s = share * (case.dims.layers * layer + rest) * per_byte + collectives * around_s
    return Outcome(
        {
            "compute": compute_s,
            "parameter_gather": 2 * rounds * once_s,
            "gradient_sync": rounds * once_s,
            **_offload(case, devices),
        }
    )


def stage_1(case: Case) -> Outcome:
    """Only the optimizer is sharded."""
    _, compute_s = _compute(case)
    per_byte, around_s = _ring(case)
    per_byte /= case.constants.zero_3.bandwidth_share
    devices = len(case.topology.devices)
    size = case.element_bytes * total_parameters(case.dims)
    buckets = max(1, math.ceil(size / (1e6 * case.values.whole("bucket_mb"))))
    once_s = (devices - 1) / devices * size * per_byte + buckets * around_s
    return Outcome(
        {
            "compute": compute_s,
            "gradient_sync": once_s,
            "parameter_gather": once_s,
            **_offload(case, devices),
        }
    )


def _compute(case: Case) -> tuple[int, float]:
    """(microbatches of a device, seconds for all of them)."""
    devices = len(case.topology.devices)
    rounds = case.microbatches(devices)
    slowest_rate = min(case.rates(list(range(devices)))) * case.constants.zero_3.compute_factor
    return rounds, rounds * sum(case.stage_s(slowest_rate, case.dims.layers, head=True))


def _ring(case: Case) -> tuple[float, float]:
    """Seconds per byte of the ring of all devices, and for a chunk to go around it."""
    if len(case.topology.devices) < 2:
        raise SpecError("ZeRO shards over several devices: one has nothing to share")
    return ring_of_all(case.collectives)


def _offload(case: Case, devices: int) -> dict[str, float]:
    if not case.values.flag("cpu_offload"):
        return {}
    each = total_parameters(case.dims) / devices
    return {"optimizer": _OPTIMIZER_BYTES * each / _HOST_BYTES_PER_S}
