"""Codecs by the names that plans and specs know."""

from __future__ import annotations

from ray_train_geo.codecs.base import Codec
from ray_train_geo.codecs.bf16 import Bf16Codec
from ray_train_geo.codecs.groupwise import GroupwiseCodec
from ray_train_geo.codecs.workspace import Workspace

__all__ = ["make_codec"]


def make_codec(name: str, elements: int, workspace: Workspace, rotated: bool = False) -> Codec:
    """The codec called ``name`` (``planning.codecs``) for tensors of ``elements`` values.

    Args:
        rotated: groups of int8 and int4 are rotated before they are rounded.

    Raises:
        ValueError: there is no such codec; ``none`` is none.
    """
    match name:
        case "bf16":
            return Bf16Codec(elements)
        case "int8" | "int4":
            return GroupwiseCodec(name, elements, workspace, rotated)
    raise ValueError(f"no codec is called {name!r}")
