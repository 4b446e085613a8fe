"""What regions take that share uplinks: a cut, two sides A | B, and its bytes per second.

Per microbatch, a pipeline that crosses sends a message each way.  A layer that is held on both
sides (a *mixed* layer) is synchronised over the cut once the last of all pipelines begins its last
backward through it: then all activations have passed, but perhaps not all gradients.  A plan is
one of these:

- Every pipeline crosses:  ``T >= all messages``.
- Some layer is on side A in every pipeline.  Then whatever is on B is mixed, a pipeline that uses
  it crosses between it and that layer, and so, if the pipelines that cross in one direction do at
  most a part ``y`` of the microbatches::

      T >= y * messages, in the slower direction
      T >= y * messages, in the faster direction + mixed layers * sync
      work on B <= y * mixed layers * microbatches

  or likewise with the sides exchanged.  Without mixed layers, one side does all.
- All layers are mixed: stages behind ``l`` layers begin their sync before those of ``l`` others
  (`certify_time` looks at this case).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ray_train_geo.model.catalog import layer_parameters
from ray_train_geo.planning.certify_chains import DeviceClasses
from ray_train_geo.planning.link_table import LinkTable
from ray_train_geo.planning.problem import Problem
from ray_train_geo.spec import GradientSyncName

__all__ = ["Cut", "layer_sync_s", "least_s", "region_cuts"]

_TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class Cut:
    """A region against all others.

    Args:
        inside, outside: layers per second that the devices of either side can compute.
        seconds_per_byte, faster_seconds_per_byte: over all uplinks between the sides, in the
            slower and in the faster direction.
    """

    inside: float
    outside: float
    seconds_per_byte: float
    faster_seconds_per_byte: float


def region_cuts(table: LinkTable, classes: DeviceClasses) -> list[Cut]:
    """Every region that has an uplink, shared by all flows, to and from every other."""
    speed = np.zeros(len(table.regions))
    for group, layer in zip(classes.devices, classes.layer_s, strict=True):
        np.add.at(speed, table.region[list(group)], 1 / layer.sum())
    found = []
    for region in range(len(speed)):
        others = np.arange(len(speed)) != region
        out = table.uplink_seconds_per_byte[region, others]
        into = table.uplink_seconds_per_byte[others, region]
        if len(out) and out.all() and into.all():
            faster, slower = sorted((1 / float((1 / out).sum()), 1 / float((1 / into).sum())))
            found.append(Cut(float(speed[region]), float(speed[others].sum()), slower, faster))
    return found


def layer_sync_s(problem: Problem, cut: Cut, mode: GradientSyncName, members: int) -> float:
    """What a mixed layer's sync takes over the cut, in seconds."""
    if members < 2:
        return 0.0
    share = 1.0 if mode == "central_ps" else 2 * (members - 1) / members
    size = problem.gradient_bytes * float(layer_parameters(problem.dims))
    return share * size * cut.seconds_per_byte


def least_s(
    problem: Problem, cut: Cut, classes: DeviceClasses, message_bytes: float, sync_s: float
) -> float:
    """No plan steps in less unless all of its layers are mixed; in seconds.

    Args:
        message_bytes: of the smallest message between stages.
        sync_s: of a mixed layer.
    """
    many, layers = problem.job.training.total_microbatches, problem.dims.layers
    messages_s = many * message_bytes * cut.seconds_per_byte
    activations_s = many * message_bytes * cut.faster_seconds_per_byte
    head = float(classes.head_s[0].sum() / classes.layer_s[0].sum())  # in layers
    work = many * (layers + head)
    mixed = np.arange(layers)

    def possible(time_s: float, home: float, away: float) -> bool:
        part = (time_s - mixed * sync_s) / activations_s
        part = np.clip(np.minimum(part, time_s / messages_s), 0, 1)
        helped = np.minimum(away * time_s, part * many * (mixed + head) * (mixed > 0))
        return bool((home * time_s + helped)[mixed * sync_s <= time_s].max() >= work)

    best = messages_s
    for home, away in ((cut.inside, cut.outside), (cut.outside, cut.inside)):
        low, high = work / (home + away), work / home
        while high > low * (1 + _TOLERANCE):
            middle = (low * high) ** 0.5
            if possible(middle, home, away):
                high = middle
            else:
                low = middle
        best = min(best, low)
    return best
