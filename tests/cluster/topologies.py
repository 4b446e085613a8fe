"""Random topologies for hypothesis."""

from __future__ import annotations

from hypothesis import strategies as st

from ray_train_geo.cluster.random_topology import random_topology
from ray_train_geo.cluster.topology import Topology

__all__ = ["topologies"]


def topologies(max_devices: int = 64, max_regions: int = 4) -> st.SearchStrategy[Topology]:
    """Topologies that could exist; fewer devices, fewer regions and no noise are simpler."""
    return st.builds(
        random_topology,
        seed=st.integers(0, 2**32 - 1),
        devices=st.integers(1, max_devices),
        regions=st.integers(1, max_regions),
        gpus_per_node=st.sampled_from([(1,), (2,), (1, 2, 4, 8)]),
        noise=st.sampled_from([0.0, 0.1]),
    )
