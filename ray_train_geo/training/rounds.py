"""When local SGD merges which layers (pure).

Six inner steps, two fragments, a delay of one step; ``s`` sends, ``m`` merges what came back::

    step        1 2 3 4 5 6 7 8 9 ...
    fragment 0      s m         s m
    fragment 1            s m

A fragment is every ``fragments``-th layer, so each stage has a part in each of them (the strided
pattern of Douillard et al., Streaming DiLoCo, 2025).
"""

from __future__ import annotations

from ray_train_geo.model.catalog import ModelDims
from ray_train_geo.spec_local_sgd import LocalSGDSpec
from ray_train_geo.training.buckets import depth

__all__ = ["due", "fragment_of"]


def due(step: int, spec: LocalSGDSpec) -> tuple[int, ...]:
    """Fragments whose pseudogradients leave once ``step`` (counted from 1) is applied.

    The last fragment's turn is at the multiples of ``inner_steps``, the others' before it.
    """
    within = (step - 1) % spec.inner_steps + 1
    turns = [spec.inner_steps * (f + 1) // spec.fragments for f in range(spec.fragments)]
    return tuple(f for f, turn in enumerate(turns) if turn == within)


def fragment_of(name: str, dims: ModelDims, fragments: int) -> int:
    """The fragment of a weight: its layer's; the embedding goes with layer 0, the head with the
    last.
    """
    layer = min(max(depth(name, dims) - 2, 0), dims.layers - 1)
    return layer % fragments
