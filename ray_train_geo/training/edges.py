"""The channels of a stage: which of its plan's edges it is at, and how their messages are coded.

    stage s-1  ══ activations ══▶  stage s  ══ activations ══▶  stage s+1
               ◀══ gradients ════           ◀══ gradients ════

The codec of a hop is named by the plan, on its upstream stage, for both directions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from ray_train_geo.codecs.make import make_codec
from ray_train_geo.codecs.workspace import Workspace
from ray_train_geo.observe.trace import Tracer
from ray_train_geo.training.assignment import Assignment
from ray_train_geo.training.channel import Coding, Receiver, Sender
from ray_train_geo.training.executor import Edges
from ray_train_geo.training.precision import DTYPES
from ray_train_geo.transport.base import Transport

__all__ = ["make_edges"]

_CHANNEL_SENDS = 8


def make_edges(
    assignment: Assignment,
    transports: Mapping[str, Transport],
    workspace: Workspace,
    tracer: Tracer,
) -> Edges:
    """The channels of the worker of ``assignment``.

    Args:
        transports: by the names of :func:`~ray_train_geo.training.groups.groups_of`.
        workspace: on the device that computes.
    """
    a = assignment
    training, rank = a.job.training, a.rank
    pipeline = a.plan.pipelines[a.role.pipeline]
    stage = a.role.stage
    warmup = pipeline.stages[stage].warmup
    shape = (training.microbatch, training.seq_len, a.dims.dim)

    def coding(upstream: int, direction: Literal["down", "up"]) -> Coding | None:
        hop = pipeline.stages[upstream]
        if hop.codec == "none":
            return None
        codec = make_codec(hop.codec, math.prod(shape), workspace, a.job.codecs.rotation)
        return Coding(codec, training.seed, pipeline.first_microbatch, hop.layers[1], direction)

    def receiver(name: str, upstream: int, direction: Literal["down", "up"]) -> Receiver:
        return Receiver(
            transports[name],
            0,
            shape,
            DTYPES[training.precision],
            workspace.device,
            warmup + 2,
            tracer,
            coding(upstream, direction),
        )

    def sender(name: str, upstream: int, direction: Literal["down", "up"]) -> Sender:
        limit = max(_CHANNEL_SENDS, warmup + 1)
        return Sender(transports[name], 1, tracer, limit, coding(upstream, direction))

    first, last = stage == 0, stage == len(pipeline.stages) - 1
    return Edges(
        activation_in=None if first else receiver(f"activations/{rank - 1}", stage - 1, "down"),
        activation_out=None if last else sender(f"activations/{rank}", stage, "down"),
        gradient_in=None if last else receiver(f"gradients/{rank + 1}", stage, "up"),
        gradient_out=None if first else sender(f"gradients/{rank}", stage - 1, "up"),
    )
