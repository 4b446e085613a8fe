"""What the chaos command prints is whole, also in a narrow terminal."""

from __future__ import annotations

import io
from dataclasses import replace

from rich.console import Console

from ray_train_geo.chaos.faults import parse_faults
from ray_train_geo.chaos.goodput import Goodput
from ray_train_geo.chaos.recovery import Injection, Recovery
from ray_train_geo.chaos.run import ChaosResult
from ray_train_geo.chaos.verify import Check
from ray_train_geo.chaos_command import show


def test_a_row_a_fault_and_a_line_a_check() -> None:
    (fault,) = parse_faults("kill-coordinator@step:12")
    injection = Injection(fault, 1.0, "rank 10 (pid 4194304)", "backward", 12, 1)
    recovery = Recovery(injection, 0.1, 0.2, 0.3, 0.4, 0.5, 1.5, 1.6, lost_steps=7)
    failed = Check("steps", False, "[red] is no markup here")
    result = ChaosResult(3, "stopped", 20, 2, 0.1, 9.0, "/runs/x", (recovery,), (failed,))
    out = io.StringIO()
    show(Console(file=out, width=40), result)
    (row,) = [line for line in out.getvalue().splitlines() if "kill-coordinator" in line]
    assert row.split() == [
        *("kill-coordinator", "rank", "10", "(pid", "4194304)", "backward", "12"),
        *("0.10", "0.20", "0.30", "0.40", "0.50", "1.50", "1.60", "7"),
    ]
    assert "FAIL steps: [red] is no markup here" in out.getvalue()
    assert "seed 3" in out.getvalue()
    assert not result.passed


def test_goodput_beside_that_of_checkpoint_and_restart() -> None:
    found = Goodput(
        seconds=400.0, mean_devices=6.1, steps=90, tokens=9000, undisturbed_steps=100.0,
        stopped_steps=4.0, unused_steps=5.0, rates={4: 0.2, 8: 0.4}, restart_s=20.0,
        restarted_steps=71.0,
    )  # fmt: skip
    text = printed(found)
    assert "goodput 90.0%: 90 steps (9000 tokens) in 400 s, of 100 that" in text
    assert "4.0% between generations, 5.0% for devices" in text
    assert "by devices: 4: 0.2, 8: 0.4" in text
    assert "checkpoint and restart, computed from the same figures: 71.0%, with 20.0 s" in text
    without = printed(replace(found, restarted_steps=None))
    assert "checkpoint and restart: not computed, the job keeps no checkpoints" in without


def printed(goodput: Goodput) -> str:
    result = ChaosResult(3, "stopped", 90, 2, 0.1, 9.0, "/runs/x", (), (), goodput)
    out = io.StringIO()
    show(Console(file=out, width=40), result)
    return out.getvalue()
