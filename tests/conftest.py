"""What all tests share: one thread for each process's arithmetic, and a token cache of their own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(autouse=True, scope="session")
def _token_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["RAY_TRAIN_GEO_CACHE"] = str(tmp_path_factory.mktemp("cache") / "tokens")
    Path(os.environ["RAY_TRAIN_GEO_CACHE"]).mkdir()
