"""What all tests share: one thread of arithmetic, no deadlines, and a token cache of their own."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"

if importlib.util.find_spec("hypothesis"):  # a GPU machine may lack it, too
    from hypothesis import settings

    # On a machine that others load, how long an example takes says nothing.
    settings.register_profile("no deadlines", deadline=None)
    settings.load_profile("no deadlines")


@pytest.fixture(autouse=True, scope="session")
def _token_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["RAY_TRAIN_GEO_CACHE"] = str(tmp_path_factory.mktemp("cache") / "tokens")
    Path(os.environ["RAY_TRAIN_GEO_CACHE"]).mkdir()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with real Ray clusters come early, one between some others each; short ones come last.

    A cluster takes most of a machine: two at a time would be slow, and one left for the end would
    run alone.  (xdist hands files out in this order: ``--no-loadscope-reorder``.)
    """
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    clusters = [f for f in files.values() if any(i.get_closest_marker("ray") for i in f)]
    others = sorted((f for f in files.values() if f not in clusters), key=len, reverse=True)
    each = max(1, len(others) // 3 // max(1, len(clusters)))
    ordered = []
    for number, file in enumerate(others):
        if number % each == 0 and clusters:
            ordered.append(clusters.pop(0))
        ordered.append(file)
    items[:] = [item for file in (*ordered, *clusters) for item in file]


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """``pytest -m gpu`` imports no file without a GPU test: a GPU machine may lack Ray."""
    if config.getoption("markexpr") != "gpu" or not collection_path.name.startswith("test_"):
        return None
    return None if "mark.gpu" in collection_path.read_text() else True
