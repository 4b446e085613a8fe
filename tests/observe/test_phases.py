"""What a worker tells of its phase is what an onlooker reads."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ray_train_geo.observe.phases import FOLDER_VARIABLE, phase_page, read_phase
from ray_train_geo.observe.trace import Tracer


def test_a_worker_that_is_asked_to_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    page = phase_page()
    assert page is not None
    me = os.getpid()
    assert read_phase(tmp_path, me) == (None, False)
    page.enter("recovery")
    assert read_phase(tmp_path, me) == ("recovery", False)
    page.saving(True)
    tracer = Tracer(enabled=False, phases=page)
    with tracer.span("backward", "B0", 1, 0), tracer.span("send", "B0", 1, 0):
        assert read_phase(tmp_path, me) == ("backward", True)
    page.saving(False)
    with tracer.span("optimizer", "AdamW", 1):
        assert read_phase(tmp_path, me) == ("optimizer", False)
    assert tracer.drain() == [], "spans themselves are off"


def test_nobody_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    assert phase_page() is None
    assert read_phase(tmp_path, 1) == (None, False)
