"""``ray-train-geo shape``: scripts for real hosts, tried on emulated ones."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import typer
from labs import needs_lab
from typer.testing import CliRunner, Result

from ray_train_geo.cluster.topology import Device, Link, Topology, Uplink
from ray_train_geo.cluster.topology_file import dump_topology
from ray_train_geo.lab.lab import Lab
from ray_train_geo.shape_command import shape

HOSTS = """
one: {node: a, address: 10.90.0.1, interface: wan0}
two: {region: y, address: 10.90.0.2, interface: wan0}
three: {region: y, address: 10.90.0.3, interface: wan0}
"""
MBIT = 1e6 / 8


def run(*arguments: str) -> Result:
    app = typer.Typer()
    app.command()(shape)
    return CliRunner().invoke(app, arguments)


def scripts(folder: Path, topology: Topology, hosts: str = HOSTS) -> Path:
    """The folder with a script for each of ``hosts``."""
    dump_topology(topology, folder / "topology.yaml")
    (folder / "hosts.yaml").write_text(hosts)
    done = run(
        "--topology", str(folder / "topology.yaml"), "--hosts", str(folder / "hosts.yaml"),
        "--out", str(folder / "out"),
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    return folder / "out"


def three_hosts() -> Topology:
    devices = tuple(Device(f"{n}/0", n, r) for n, r in (("a", "x"), ("b", "y"), ("c", "y")))
    return Topology(
        devices,
        region_links={
            ("x", "y"): Link(0.067, 80 * MBIT),
            ("y", "x"): Link(0.05, 40 * MBIT),
            ("y", "y"): Link(0.001, 900 * MBIT),
        },
        node_uplinks={"a": Uplink(100 * MBIT, 60 * MBIT)},
        region_uplinks={("x", "y"): 70 * MBIT, ("y", "x"): 30 * MBIT},
    )


def test_each_direction_has_its_delay_and_rate(tmp_path: Path) -> None:
    out = scripts(tmp_path, three_hosts())
    one, two = (out / "one.sh").read_text(), (out / "two.sh").read_text()
    assert re.findall(r"netem delay (\d+)us", one) == ["67000"] * 2
    assert sorted(re.findall(r"netem delay (\d+)us", two)) == ["1000", "50000"]
    assert "htb rate 100000000bit ceil 100000000bit" in one, "the NIC"
    assert "ceil 70000000bit" in one, "the uplink is a's alone"
    assert "ceil 15000000bit" in two, "half of what the hosts of y share"
    assert "htb rate 60000000bit" in one.partition("incoming()")[2], "what its NIC takes"
    assert "names no NIC" in two
    assert len(re.findall(r"match ip dst 10\.90\.0\.[23]/32", one)) == 2


def test_promised_rates_never_exceed_what_is_above_them(tmp_path: Path) -> None:
    """HTB gives a class its rate even where its parent has less."""
    for text in (p.read_text() for p in scripts(tmp_path, three_hosts()).iterdir()):
        classes = re.findall(
            r"parent (9e0:\w*) classid (9e0:\w+) htb rate (\d+)bit ceil (\d+)bit", text
        )
        rate = {name: int(r) for _, name, r, _ in classes}
        ceil = {name: int(c) for _, name, _, c in classes}
        for name in rate:
            below = [child for parent, child, _, _ in classes if parent == name]
            assert sum(rate[child] for child in below) <= rate[name] + len(below)
            assert all(rate[child] <= ceil[child] <= ceil[name] for child in below)


def test_scripts_pass_shellcheck(tmp_path: Path) -> None:
    tool = Path(sys.executable).parent / "shellcheck"
    found = sorted(scripts(tmp_path, three_hosts()).iterdir())
    assert [p.name for p in found] == ["one.sh", "three.sh", "two.sh"]
    done = subprocess.run([tool, *found], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


WITHOUT_NETEM = """#!/bin/bash
# This kernel may have no netem: a queue of the same length stands in for it.
words=("$@")
for i in "${!words[@]}"; do
  if [[ "${words[i]}" == netem ]]; then
    exec REAL "${words[@]:0:i}" pfifo limit "${words[@]: -1}"
  fi
done
exec REAL "${words[@]}"
"""


@pytest.mark.skipif(shutil.which("tc") is None, reason="tc (iproute2) is not installed here")
def test_a_host_is_shaped_again_and_as_it_was_before(tmp_path: Path) -> None:
    needs_lab()
    real = shutil.which("tc")
    assert real is not None
    out, tools = scripts(tmp_path, three_hosts()), tmp_path / "tools"
    tools.mkdir()
    (tools / "tc").write_text(WITHOUT_NETEM.replace("REAL", real))
    (tools / "tc").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}

    def on_host(command: Sequence[str], code: int = 0) -> str:
        done = lab.run("a", command, capture_output=True, text=True, env=environment)
        assert done.returncode == code, done.stderr
        return str(done.stdout + done.stderr)

    script = ["bash", str(out / "one.sh")]
    with Lab(Topology((Device("a/0", "a"), Device("b/0", "b")))) as lab:
        before = on_host(["tc", "qdisc", "show"])
        for action in ("clear", "up", "up"):
            on_host([*script, action])
        assert "rate 100Mbit" in on_host([*script, "show"])
        on_host([*script, "clear"])
        assert on_host(["tc", "qdisc", "show"]) == before
        on_host(["sh", "-c", "tc qdisc add dev wan0 root tbf rate 1mbit burst 10k latency 10ms"])
        foreign = on_host(["tc", "qdisc", "show"])
        assert "wan0 is shaped by something else" in on_host([*script, "up"], 1)
        on_host([*script, "clear"])
        assert on_host(["tc", "qdisc", "show"]) == foreign
        assert "usage" in on_host([*script, "down"], 1)
        (tools / "tc").write_text(f'#!/bin/sh\ncase "$*" in *netem*) exit 2;; esac\n{real} "$@"')
        on_host(["tc", "qdisc", "del", "dev", "wan0", "root"])
        assert "all is as it was before" in on_host([*script, "up"], 1)
        assert on_host(["tc", "qdisc", "show"]) == before


@pytest.mark.parametrize(
    ("hosts", "says"),
    [
        ("a: [", "is not valid YAML"),
        ("- a", "hosts are a mapping of at least two"),
        ("one: {region: y, address: 10.0.0.1, interface: e}", "at least two"),
        (HOSTS + "four: {region: y, address: 10.90.0.4, interface: e}", "y has no more nodes"),
        (HOSTS + "four: {region: z, address: 10.90.0.4, interface: e}", "no region 'z'"),
        (HOSTS + "four: {node: z, address: 10.90.0.4, interface: e}", "no node 'z'"),
        (HOSTS + "four: {node: a, address: 10.90.0.4, interface: e}", "plays node a, too"),
        (HOSTS.replace("0.2", "0.1"), "has address 10.90.0.1, too"),
        (HOSTS.replace("10.90.0.2", "tokyo"), "two.address"),
        (HOSTS.replace("region: y, a", "region: y, node: b, a"), "one of node and region"),
        (HOSTS.replace("wan0", "$(rm)"), "one.interface"),
        (HOSTS.replace("one:", "../one:"), "../one"),
        (HOSTS.replace("node: a, ", ""), "give one of node and region"),
    ],
)
def test_wrong_hosts_are_refused(tmp_path: Path, hosts: str, says: str) -> None:
    dump_topology(three_hosts(), tmp_path / "topology.yaml")
    (tmp_path / "hosts.yaml").write_text(hosts)
    done = run(
        "--topology", str(tmp_path / "topology.yaml"), "--hosts", str(tmp_path / "hosts.yaml"),
        "--out", str(tmp_path / "out"),
    )  # fmt: skip
    assert done.exit_code == 2
    assert says in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "give one of --scenario and --topology"),
        (("--scenario", "nowhere"), "no scenario 'nowhere'"),
        (("--scenario", "worldwide"), "can't read the hosts no.yaml"),
        (("--scenario", "worldwide", "--scale", "-1"), "must be above 0"),
    ],
)
def test_wrong_use_is_one_message(tmp_path: Path, arguments: tuple[str, ...], says: str) -> None:
    done = run(*arguments, "--hosts", "no.yaml", "--out", str(tmp_path))
    assert done.exit_code == 2
    assert says in done.stderr
