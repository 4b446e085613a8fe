"""A simulated step as numbers with names, for programs."""

from __future__ import annotations

import math
from typing import Any

from ray_train_geo.systems.simulated import Simulated

__all__ = ["FIGURES", "figures", "known_price"]

FIGURES = (
    "step_s",
    "pflops",
    "efficiency",
    "breakdown",
    "tokens_per_s",
    "dollars_per_million_tokens",
    "pflop",
    "devices",
    "notes",
)
"""The keys of :func:`figures`, in their order."""


def figures(found: Simulated) -> dict[str, Any]:
    """What a JSON object can hold of ``found``; a price that nobody knows is null."""
    return {
        **{name: getattr(found, name) for name in FIGURES},
        "dollars_per_million_tokens": known_price(found),
        "notes": list(found.notes),
    }


def known_price(found: Simulated) -> float | None:
    """Dollars per million tokens; None where the devices have no prices."""
    price = found.dollars_per_million_tokens
    return price if 0 < price < math.inf else None
