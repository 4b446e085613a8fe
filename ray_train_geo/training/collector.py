"""Gathers the workers' parts of each checkpoint and publishes it once all are there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray_train_geo.training.checkpoint import CheckpointPart, CheckpointStore
from ray_train_geo.training.manifest import Manifest

__all__ = ["CheckpointCollector"]


class CheckpointCollector:
    """The coordinator's side of checkpointing in one generation.

    Args:
        parts: how many make a checkpoint (the number of workers).
        identity: goes into the manifest, as ``plan`` does.
        keep: how many of the newest checkpoints stay.
    """

    def __init__(
        self,
        store: CheckpointStore,
        generation: int,
        parts: int,
        identity: dict[str, Any],
        plan: dict[str, Any],
        keep: int,
    ) -> None:
        self._store = store
        self._generation = generation
        self._parts = parts
        self._identity = identity
        self._plan = plan
        self._keep = keep
        self._waiting: dict[int, dict[int, CheckpointPart]] = {}

    def add(self, step: int, part: CheckpointPart, state: Mapping[str, Any]) -> Manifest | None:
        """Take a part; with the last one, publish and return the manifest.

        Raises:
            StorageError: it could not be published.
        """
        parts = self._waiting.setdefault(step, {})
        parts[part.rank] = part
        if len(parts) < self._parts:
            return None
        del self._waiting[step]
        fields = {**state, "identity": self._identity, "plan": self._plan}
        manifest = self._store.publish(
            step, self._generation, [parts[rank] for rank in sorted(parts)], fields
        )
        self._store.prune(self._keep)
        return manifest
