"""Names as the published measurements have them, beside this package's own."""

from __future__ import annotations

import difflib

from ray_train_geo.errors import SpecError
from ray_train_geo.model.catalog import CATALOG
from ray_train_geo.systems.published import CASES

__all__ = ["catalog_model", "scenario_name"]


def scenario_name(name: str) -> str:
    """``case5`` is ``worldwide``, and so on; any other name stays as it is."""
    return CASES.get(name.lower(), name)


def catalog_model(name: str, layers: int | None = None) -> str:
    """The catalog's name: ``GPT3-XL`` with 32 layers is ``gpt3-xl-32``.

    Args:
        layers: as a table of measurements has them; None: whatever the catalog says.

    Raises:
        SpecError: the catalog has no such model, or not with so many layers.
    """
    lower = name.lower()
    if layers is None and lower in CATALOG:
        return lower
    for known in (f"{lower}-{layers}", lower):
        if known in CATALOG and CATALOG[known].layers == layers:
            return known
    if lower in CATALOG:
        alike = {n: m.layers for n, m in CATALOG.items() if n == lower or n.startswith(f"{lower}-")}
        depths = ", ".join(f"{n} has {depth}" for n, depth in alike.items())
        raise SpecError(f"no model {name!r} with {layers} layers in the catalog ({depths})")
    close = difflib.get_close_matches(lower, CATALOG, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise SpecError(f"unknown model {name!r}{hint} (there are: {', '.join(CATALOG)})")
