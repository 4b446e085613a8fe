"""An emulated link changes with its file, while messages are on their way."""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path

import pytest

from ray_train_geo.cluster.topology import Device
from ray_train_geo.cluster.topology_file import load_topology
from ray_train_geo.errors import GeoError, PlanError
from ray_train_geo.training.emulated_links import EmulatedLinks

DEVICES = (Device("a/0", "a", "ohio"), Device("b/0", "b", "tokyo"), Device("c/0", "c", "tokyo"))


LATER = itertools.count(0.0, 1000.0)
"""When messages are sent, by the links' clock: each long after the one before."""


def write(path: Path, gbps: float) -> None:
    written = path.with_suffix(".new")
    written.write_text(
        f"links: [{{from: ohio, to: tokyo, latency_ms: 10, bandwidth_gbps: {gbps}}}]\n"
        "default_link: {latency_ms: 1, bandwidth_gbps: 1}\n"
    )
    os.replace(written, path)


def wait_until_it_takes(links: EmulatedLinks, wanted_s: float) -> None:
    """Until a megabyte from a to b takes so long."""
    path = links.emulation._shaper.path("a/0", "b/0")
    until_s = time.monotonic() + 10
    for ready_s in LATER:
        took_s = list(path.leave(10**6, ready_s))[-1] - ready_s
        if took_s == pytest.approx(wanted_s):
            return
        assert time.monotonic() < until_s, f"it takes {took_s} s"
        time.sleep(0.05)


def test_a_change_of_the_file_changes_the_links(tmp_path: Path) -> None:
    file = tmp_path / "links.yaml"
    write(file, 0.08)
    links = EmulatedLinks(file, DEVICES)
    try:
        wait_until_it_takes(links, 0.1)
        write(file, 0.008)
        wait_until_it_takes(links, 1.0)
        file.write_text("links: [{from: ohio")
        time.sleep(0.6)
        wait_until_it_takes(links, 1.0)
        file.unlink()
        time.sleep(0.6)
        write(file, 0.08)
        wait_until_it_takes(links, 0.1)
        carried = links.emulation.carried("a/0")
        assert set(carried) == {"b"}
        assert carried["b"].size_bytes >= 4 * 10**6
        assert links.emulation.carried("a/0")["b"].size_bytes == 0, "since the last call"
    finally:
        links.close()


def test_what_cant_be_read_to_begin_with_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(GeoError):
        EmulatedLinks(tmp_path / "nowhere.yaml", DEVICES)


def test_a_link_that_is_gone_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "links.yaml"
    write(file, 0.08)
    links = EmulatedLinks(file, DEVICES)
    links.close()
    wait_until_it_takes(links, 0.1)
    file.write_text("default_link: null\n")
    without = load_topology(file)
    with pytest.raises(PlanError, match="no link from device a/0"):
        links.emulation.change(without)
    wait_until_it_takes(links, 0.1)
