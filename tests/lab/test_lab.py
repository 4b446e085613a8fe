"""Emulated hosts, for real: what their links give on a busy machine, and that nothing is left."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from labs import MBIT, hosts, lab, needs_lab, until

from ray_train_geo.cluster.topology import Link
from ray_train_geo.errors import ClusterError, DeadlineError, SpecError
from ray_train_geo.lab.control import Control
from ray_train_geo.lab.lab import Lab
from ray_train_geo.lab.measure import rate_bytes_per_s, round_trip_s


@contextlib.contextmanager
def busy_machine() -> Iterator[None]:
    """More processes that compute than there are processors."""
    burners = [
        subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"])
        for _ in range(2 * (os.cpu_count() or 1))
    ]
    try:
        yield
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()


def alive(pids: dict[str, int | None]) -> list[int]:
    return [p for p in pids.values() if p is not None and psutil.pid_exists(p)]


def test_round_trips_and_rates_hold_on_a_busy_machine() -> None:
    needs_lab()
    near, far = Link(0.005, 50 * MBIT), Link(0.1, 20 * MBIT)
    topology = hosts(
        "a", "b", "c", node_links={("a", "b"): near, ("b", "a"): near, ("a", "c"): far}
    )
    with Lab(topology) as found, busy_machine():
        assert found.real_time
        for a, b, asked_s in (("a", "b", 0.01), ("a", "c", 0.1), ("b", "c", 0.0)):
            allowed_s = max(3e-3, 0.05 * asked_s)
            assert asked_s <= round_trip_s(found, a, b) <= asked_s + allowed_s
        for a, b, asked in (("a", "b", near), ("a", "c", far)):
            rate = rate_bytes_per_s(found, a, b, seconds=1.5)
            assert 0.85 <= rate / asked.bandwidth_bytes_per_s <= 1.02


def test_cut_heal_and_shape() -> None:
    with lab(hosts("a", "b", "c")) as found:
        found.cut("a", "B")
        with pytest.raises(DeadlineError, match="no answer to 1 pings from a to b"):
            round_trip_s(found, "a", "b", samples=1)
        round_trip_s(found, "a", "c", samples=1)
        with Control(found.control_path) as other:
            other.heal("a")
            other.shape("a", "b", latency_s=0.05)
            assert other.shapes()["a", "b"].latency_s == 0.05
        assert 0.05 <= round_trip_s(found, "a", "b", samples=3) < 0.055
        assert found.traffic()["b", "a"].packets >= 3


def test_a_command_ends_as_it_would_anywhere(tmp_path: Path) -> None:
    with lab(hosts("a", "b")) as found:
        done = found.run(
            "a", ["sh", "-c", "hostname; pwd; exit 3"], cwd=tmp_path, stdout=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        assert done.returncode == 3
        assert done.stdout.split() == ["a", str(tmp_path)]
        assert found.run("b", ["no-such-command"], stderr=subprocess.DEVNULL).returncode == 127
        sleeping = found.popen("a", ["sleep", "100"])
        sleeping.send_signal(signal.SIGTERM)
        assert sleeping.wait(10) == -signal.SIGTERM
        trap = found.popen(
            "a", ["sh", "-c", "trap 'exit 5' TERM; echo; while :; do sleep 0.05; done"],
            stdout=subprocess.PIPE,
        )  # fmt: skip
        assert trap.stdout is not None
        trap.stdout.readline()
        trap.terminate()
        assert trap.wait(10) == 5


def test_a_host_without_power_comes_back_empty() -> None:
    with lab(hosts("a", "b")) as found:
        running = found.popen("a", ["sh", "-c", "echo; sleep 100"], stdout=subprocess.PIPE)
        assert running.stdout is not None
        running.stdout.readline()
        found.kill("a")
        assert running.wait(10) == -signal.SIGKILL
        with pytest.raises(ClusterError, match="host a is dead; boot it first"):
            found.run("a", ["true"])
        found.boot("a")
        with pytest.raises(SpecError, match="host a runs"):
            found.boot("a")
        assert round_trip_s(found, "b", "a", samples=1) < 0.1


def test_nothing_is_left() -> None:
    with lab(hosts("a", "b")) as found:
        pids, folder = found.pids(), found.folder
        found.popen("a", ["sleep", "100"], start_new_session=True)
    assert not alive(pids)
    assert not folder.exists()
    with pytest.raises(ClusterError, match="the lab has ended"):
        found.pids()


OWNER = """
import sys, time
from ray_train_geo.cluster.topology import Device, Topology
from ray_train_geo.lab.lab import Lab
lab = Lab(Topology((Device("a/0", "a"), Device("b/0", "b"))))
lab.popen("a", ["setsid", "sleep", "12321"])
print(lab.folder, *lab.pids().values(), lab._switch.pid, flush=True)
time.sleep(100)
"""


def test_nothing_is_left_after_kill_9() -> None:
    needs_lab()
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    folder, *pids = owner.stdout.readline().split()
    namespace = os.readlink(f"/proc/{pids[0]}/ns/net")
    inside = until(lambda: [p for p in psutil.process_iter() if network_of(p.pid) == namespace])
    assert len(inside) >= 1
    owner.kill()
    owner.communicate()
    until(lambda: not any(psutil.pid_exists(int(p)) for p in pids))
    until(lambda: not Path(folder).exists())
    assert not [p for p in psutil.process_iter() if network_of(p.pid) == namespace]


def network_of(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/net")
    except OSError:
        return ""


def test_a_dead_switch_is_told() -> None:
    with lab(hosts("a", "b")) as found:
        pids = found.pids()
        found._switch.kill()
        found._switch.wait()
        with pytest.raises(ClusterError, match="the lab has ended"):
            found.cut("a")
        until(lambda: not alive(pids))
    assert not found.folder.exists()


def test_wrong_names_are_refused() -> None:
    with lab(hosts("a", "b")) as found:
        with pytest.raises(SpecError, match="no host 'x': there are a, b"):
            found.run("x", ["true"])
        with pytest.raises(SpecError, match="no host or region 'x'"):
            found.cut("x")
        with pytest.raises(SpecError, match="a link has no 'speed'"):
            found.shape("a", "b", speed=3)
        with pytest.raises(SpecError, match="loss=2 is out of range"):
            found.shape("a", "b", loss=2)
    with pytest.raises(ClusterError, match="no lab answers at"):
        Control(found.control_path)


def test_a_machine_without_the_right_says_so() -> None:
    needs_lab()
    done = subprocess.run(
        ["setpriv", "--bounding-set=-sys_admin", sys.executable, "-m", "ray_train_geo.lab.probe"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "no lab can be made here" in done.stderr
    assert "Operation not permitted" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_machine_with_the_right_says_nothing() -> None:
    needs_lab()
    done = subprocess.run(
        [sys.executable, "-m", "ray_train_geo.lab.probe"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_fault_of_ours_is_not_taken_for_a_refusal() -> None:
    """What the kernel does not know, it calls invalid: that is for us to hear of."""
    needs_lab()
    broken = "from ray_train_geo.lab import kernel, probe; kernel._NEW_NETWORK = -1; probe._main()"
    done = subprocess.run([sys.executable, "-c", broken], capture_output=True, text=True)
    assert done.returncode == 1
    assert "no lab can be made here" not in done.stderr
    assert "Invalid argument" in done.stderr
