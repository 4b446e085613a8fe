"""What a checkpoint says of itself: ``manifest.json`` (pure)."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Manifest"]


@dataclass(frozen=True, slots=True)
class Manifest:
    """What makes a checkpoint complete, and what of the run's state is not a tensor.

    Args:
        updates: AdamW updates so far (overflowed steps do not count).
        identity: what a run that resumes must agree on; see ``training.identity``.
        checksums: CRC-32 of each tensor's bytes.
        files: size of each file in bytes.
        metadata_checksum: CRC-32 of DCP's own metadata, a pickle that must not be read if damaged.
    """

    step: int
    updates: int
    loss_scale: float
    good_steps: int
    identity: dict[str, Any]
    checksums: dict[str, int]
    files: dict[str, int]
    metadata_checksum: int
    time: float
    plan: dict[str, Any] | None = None
    format: int = 1

    def to_json(self) -> str:
        """JSON that ends with a checksum of its own."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        return json.dumps(fields | {"checksum": _checksum(fields)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Read back what :meth:`to_json` wrote.

        Raises:
            ValueError, TypeError: it is something else, or was changed since.
        """
        fields = dict(json.loads(text))
        if fields.pop("checksum", None) != _checksum(fields):
            raise ValueError("it is not what was written")
        return cls(**fields)


def _checksum(fields: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(fields, sort_keys=True).encode())
