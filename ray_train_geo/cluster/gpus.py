"""A catalog of GPU types: what a device of a type computes, holds and costs before it is measured.

The figures and their sources are in ``data/gpus.yaml``.  What a GPU sustains is its data sheet's
dense peak times what published training runs reach on its generation.  A card without bf16 computes
bf16 at its fp32 rate.
"""

from __future__ import annotations

import difflib
import functools
import re
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal, get_args

import yaml

from ray_train_geo.cluster.topology import Device, MarketType
from ray_train_geo.errors import SpecError

__all__ = ["GpuPrecision", "GpuType", "gpu", "gpu_types", "gpu_variants"]

GpuPrecision = Literal["fp32", "fp16", "bf16"]

_MAKERS_WORDS = frozenset({"NVIDIA", "TESLA", "GEFORCE", "GPU"})
_SIZE = re.compile(r"(\d+)GI?B?")


@dataclass(frozen=True, slots=True)
class GpuType:
    """One row of the catalog.

    Args:
        name: such as ``A100-80G``.
        words: what other spellings of the name may add to it, such as ``SXM4``.
        nominal_gb: the size by which the maker sells it.
        memory_bytes: that size in binary units, less what error-correcting codes take of it.
        peak_flops_per_s: dense, by precision; without those that the card lacks.
        sustained_fraction: of the peak, in training.
        usd_per_hour: by market type.
        source, sustained_source, price_source: of peaks and memory, of the fraction, of the prices.
    """

    name: str
    generation: str
    words: frozenset[str]
    nominal_gb: int
    memory_bytes: int
    peak_flops_per_s: tuple[tuple[GpuPrecision, float], ...]
    sustained_fraction: float
    usd_per_hour: tuple[tuple[MarketType, float], ...]
    source: str
    sustained_source: str
    price_source: str

    @property
    def model(self) -> str:
        """The name without the size: ``A100`` of ``A100-80G``."""
        return self.name.partition("-")[0]

    def sustained_flops_per_s(self, precision: GpuPrecision) -> float:
        """What training sustains at ``precision``; in fp32 if the card lacks it."""
        peaks = dict(self.peak_flops_per_s)
        return self.sustained_fraction * peaks.get(precision, peaks["fp32"])

    def price_per_hour(self, market_type: MarketType) -> float:
        """In US dollars."""
        return dict(self.usd_per_hour)[market_type]

    def device(
        self,
        device_id: str,
        node: str,
        region: str = "local",
        zone: str = "",
        market_type: MarketType = "on-demand",
    ) -> Device:
        """A device of this type; its ``flops_per_s`` is that of fp16."""
        return Device(
            id=device_id,
            node=node,
            region=region,
            zone=zone,
            market_type=market_type,
            type=self.name,
            flops_per_s=self.sustained_flops_per_s("fp16"),
            memory_bytes=self.memory_bytes,
            price_per_hour=self.price_per_hour(market_type),
            flops_by_precision=tuple(
                (p, self.sustained_flops_per_s(p)) for p in get_args(GpuPrecision)
            ),
        )


@functools.cache
def gpu_types() -> tuple[GpuType, ...]:
    """The catalog."""
    path = resources.files("ray_train_geo.cluster") / "data" / "gpus.yaml"
    raw = yaml.safe_load(path.read_text())
    return tuple(_row(name, row, raw["generations"]) for name, row in raw["types"].items())


def _row(name: str, row: dict[str, Any], generations: dict[str, Any]) -> GpuType:
    generation = generations[row["generation"]]
    size = row["gb"] * 2**30
    return GpuType(
        name=name,
        generation=row["generation"],
        words=frozenset(row["words"]),
        nominal_gb=row["gb"],
        memory_bytes=size * 15 // 16 if row.get("ecc") else size,
        peak_flops_per_s=tuple((p, t * 1e12) for p, t in row["peak_tflops"].items()),
        sustained_fraction=generation["sustained_fraction"],
        usd_per_hour=tuple(row["usd"].items()),
        source=row["source"],
        sustained_source=generation["source"],
        price_source=row["price_source"],
    )


def gpu_variants(name: str) -> tuple[GpuType, ...]:
    """The types that ``name`` may mean, the smallest first; none if the catalog has no such type.

    Spellings of the driver (``NVIDIA A100-SXM4-80GB``), of clouds (``nvidia-tesla-v100``) and of
    Ray (``A100-80G``, ``V100``) are understood; those without a size mean all sizes.
    """
    tokens = re.findall(r"[A-Z0-9]+", name.upper())
    sizes = {int(size[1]) for token in tokens if (size := _SIZE.fullmatch(token))}
    words = {t for t in tokens if not _SIZE.fullmatch(t)} - _MAKERS_WORDS
    if "RTX" in words:  # RTX 3090, RTX-3090 and RTX3090 are one name
        words = {f"RTX{w}" if w.isdigit() else w for w in words} - {"RTX"}
    found = [
        t
        for t in gpu_types()
        if t.model in words and words <= {t.model} | t.words and sizes <= {t.nominal_gb}
    ]
    return tuple(sorted(found, key=lambda t: t.memory_bytes))


def gpu(name: str) -> GpuType:
    """The type called ``name``, in any usual spelling; the smallest where the size is left open.

    Raises:
        SpecError: the catalog has no such type.
    """
    found = gpu_variants(name)
    if found:
        return found[0]
    known = [t.name for t in gpu_types()]
    close = difflib.get_close_matches(name.upper(), known, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise SpecError(f"no GPU type {name!r} in the catalog: {hint}it has {', '.join(known)}")
