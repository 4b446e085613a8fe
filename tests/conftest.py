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
    """Files with real Ray clusters come first: over two processes, the short ones then fill up."""
    items.sort(key=lambda item: item.get_closest_marker("ray") is None)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """``pytest -m gpu`` imports no file without a GPU test: a GPU machine may lack Ray."""
    if config.getoption("markexpr") != "gpu" or not collection_path.name.startswith("test_"):
        return None
    return None if "mark.gpu" in collection_path.read_text() else True
