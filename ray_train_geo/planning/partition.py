"""An even cut of a model into stages.

Boundaries of ``s`` stages are ``s + 1`` layer ids: stage ``i`` holds ``boundaries[i]`` up to, not
including, ``boundaries[i + 1]``.
"""

from __future__ import annotations

__all__ = ["even"]


def even(layers: int, stages: int) -> tuple[int, ...]:
    """As even as can be; the first stages take what is left over.

    Raises:
        ValueError: not one layer for each stage.
    """
    if not 1 <= stages <= layers:
        raise ValueError(f"can't cut {layers} layers into {stages} stages of at least one layer")
    share, more = divmod(layers, stages)
    return tuple(s * share + min(s, more) for s in range(stages + 1))
