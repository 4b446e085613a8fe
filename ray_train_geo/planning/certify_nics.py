"""What gradient sync over NICs that devices share takes at least.

Of the devices of a node, the one that begins its last backward first opens the node's sync, and
the node's NIC then carries all bytes of its members.  So in a step of ``T``, with speed ``v``::

    that device    work + NIC seconds - last backward <= T          times v, over all nodes:
    every other    work                               <= T    all work + NIC v - ... <= T sum v

This holds whatever the plan, so it is weak where one light stage a node costs little.
"""

from __future__ import annotations

import numpy as np

from ray_train_geo.model.catalog import head_parameters, layer_parameters
from ray_train_geo.planning.certify_chains import DeviceClasses
from ray_train_geo.planning.link_table import Ints
from ray_train_geo.planning.problem import Problem
from ray_train_geo.spec import GradientSyncName

__all__ = ["nic_bound_s"]

_GRADIENT_BYTES = 4


def nic_bound_s(
    problem: Problem, classes: DeviceClasses, mode: GradientSyncName, pipelines: tuple[int, int]
) -> float:
    """No plan of so many pipelines (fewest, most) steps in less; in seconds."""
    dims, table = problem.dims, problem.table
    parameters = dims.layers * layer_parameters(dims) + head_parameters(dims)
    sizes = np.sort(np.bincount(table.node))[::-1]
    copies = min(_copies(mode, n, sizes) for n in range(pipelines[0], pipelines[1] + 1))

    # In units of one layer's work, which all devices agree on.
    speed = np.empty(len(table.devices))
    for group, layer in zip(classes.devices, classes.layer_s, strict=True):
        speed[list(group)] = 1 / layer.sum()
    layer, head = classes.layer_s[0], classes.head_s[0]
    work = problem.job.training.total_microbatches * (dims.layers + head.sum() / layer.sum())
    slowest = np.full(len(table.nodes), np.inf)
    np.minimum.at(slowest, table.node, speed)
    nic = np.maximum(table.out_seconds_per_byte, table.in_seconds_per_byte) * slowest
    held = max(int(most.max()) for most in classes.most_layers(problem, 1))
    last_backward = len(table.nodes) * (held * layer[1] + head[1]) / layer.sum()
    sent = copies * _GRADIENT_BYTES * parameters * float(nic.min())
    return float((work + max(0.0, sent - last_backward)) / speed.sum())


def _copies(mode: GradientSyncName, members: int, sizes: Ints) -> float:
    """How often, summed over nodes, a layer's gradients leave a node; if as few as can be do.

    Args:
        sizes: devices of each node, descending: a group fills the largest nodes.
    """
    together = np.minimum(sizes, np.maximum(members - (np.cumsum(sizes) - sizes), 0))
    nodes = int((together > 0).sum())
    if mode == "central_ps" or nodes < 2:
        return 0.0
    if mode == "allreduce":  # a ring leaves every node that it enters
        return nodes * 2 * (members - 1) / members
    return float(2 * (members - (together**2).sum() / members))
