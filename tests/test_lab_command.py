"""``ray-train-geo lab`` and ``lab-do``: what they refuse, and a lab that is made and changed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from labs import needs_lab

from ray_train_geo.cluster.topology import Device, Topology
from ray_train_geo.cluster.topology_file import dump_topology

COMMAND = [sys.executable, "-m", "ray_train_geo"]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "give one of --scenario and --topology"),
        (("--scenario", "worldwide", "--topology", "x.yaml"), "give one of"),
        (("--scenario", "wordwide"), "did you mean worldwide?"),
        (("--scenario", "worldwide", "--hosts", "65"), "the topology has 64 nodes"),
        (("--scenario", "worldwide", "--scale", "0"), "must be above 0"),
        (("--topology", "no.yaml"), "can't read the topology no.yaml"),
        (("--scenario", "worldwide", "--train", "no.yaml"), "no.yaml"),
        (("--scenario", "worldwide", "--train", "no.yaml", "--", "true"), "one of them"),
        (("--scenario", "worldwide", "--on", "tokyo-0"), "give one after --"),
        (("--scenario", "worldwide", "--set", "run.name=x"), "also give one with --train"),
    ],
)
def test_wrong_use_is_one_message(arguments: tuple[str, ...], says: str) -> None:
    done = run("lab", *arguments)
    assert done.returncode == 2
    assert says in done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("cut", "a"), "which lab? Give --lab"),
        (("cut", "a", "--lab", "/nowhere/control"), "no lab answers at /nowhere/control"),
    ],
)
def test_a_lab_that_is_none(arguments: tuple[str, ...], says: str) -> None:
    done = run("lab-do", *arguments, GEO_LAB="")
    assert done.returncode == 2
    assert says in done.stderr


SCRIPT = """
hostname
$0 -m ray_train_geo lab-do cut Tokyo
$0 -m ray_train_geo lab-do shape Oregon Ohio latency_s=0.2 loss=0.5
$0 -m ray_train_geo lab-do traffic | grep -c bytes
for wrong in "cut Mars" "cut Tokyo x=1" "fly" "shape Ohio Tokyo" "shape Ohio Tokyo loss=a"; do
    $0 -m ray_train_geo lab-do $wrong 2>&1
done
exit 7
"""


def test_a_command_in_a_lab_changes_it() -> None:
    needs_lab()
    done = run(
        "lab", "--scenario", "worldwide", "--hosts", "4", "--on", "ohio-0", "--",
        "sh", "-c", SCRIPT, sys.executable,
    )  # fmt: skip
    assert done.returncode == 7, done.stderr
    name, links, *refusals = done.stdout.splitlines()
    assert (name, links) == ("ohio-0", "12")
    assert [r.partition(":")[0] for r in refusals] == ["error"] * 5
    for word in ("no host or region 'Mars'", "takes no x=", "fly", "FIELD=VALUE", "no number"):
        assert any(word in r for r in refusals)
    assert re.search(r"tokyo-0 +Tokyo +10\.90\.0\.4 +\d+ to \d+ +\d+ to \d+", done.stderr)


def test_without_a_command_it_waits_for_ctrl_c(tmp_path: Path) -> None:
    needs_lab()

    file = tmp_path / "two.yaml"
    dump_topology(Topology((Device("a/0", "a"), Device("b/0", "b"))), file)
    waiting = subprocess.Popen(
        [*COMMAND, "lab", "--topology", str(file)], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "COLUMNS": "200"},
    )  # fmt: skip
    assert waiting.stdout is not None
    said = ""
    while "lab-do" not in said:
        line = waiting.stdout.readline()
        assert line, said
        said += line
    control = re.search(r"--lab (\S+)", said)
    assert control is not None
    assert run("lab-do", "kill", "b", "--lab", control[1]).returncode == 0
    waiting.send_signal(signal.SIGINT)
    waiting.communicate(timeout=20)
    assert waiting.returncode == 0
    assert not Path(control[1]).exists()
