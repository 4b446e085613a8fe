"""Hours in which everything goes wrong, in minutes: ``make soak`` (SOAK_MINUTES, SOAK_SEED)."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from ray_train_geo.chaos.faults import PHASES, parse_faults
from ray_train_geo.chaos.run import ChaosResult, run_chaos
from ray_train_geo.chaos.spot import followed
from ray_train_geo.cluster.traces import load_trace
from ray_train_geo.spec import JobSpec, parse_job

MINUTES = float(os.environ.get("SOAK_MINUTES", "30"))
SEED = int(os.environ.get("SOAK_SEED", "0"))
TEXT = Path(__file__).parents[2] / "LICENSE"
TWO_BY_TWO = {"pipelines": 2, "stages": 2}

pytestmark = [pytest.mark.soak, pytest.mark.timeout(60 * MINUTES + 1200)]


def tiny_job(folder: Path, **sections: dict[str, int]) -> JobSpec:
    return parse_job(
        {
            "model": {"layers": 4, "dim": 32, "heads": 4, "dropout": 0.1},
            "data": {"path": str(TEXT)},
            "training": {
                "steps": 1_000_000, "global_batch": 8, "microbatch": 2, "seq_len": 32, "seed": 3,
            },
            "checkpoint": {"interval": 10},
            "run": {"name": "soak", "storage_path": str(folder)},
            **sections,
        }
    )  # fmt: skip


def say(text: str) -> None:
    print(text, flush=True)


def shown(result: ChaosResult) -> ChaosResult:
    for check in result.checks:
        print("ok  " if check.passed else "FAIL", check.name, check.detail)
    return result


def soak(folder: Path, faults: list[str], minutes: float, replace: bool) -> ChaosResult:
    job, parsed = tiny_job(folder, parallelism=TWO_BY_TWO), parse_faults(",".join(faults))
    return shown(run_chaos(job, parsed, seed=SEED, limit_s=60 * minutes, replace=replace, say=say))


def test_everything_at_random(tmp_path: Path) -> None:
    """As many faults as fit into the time."""
    rng = random.Random(SEED)
    kinds = [*(f"kill-worker@phase:{p}" for p in PHASES), "kill-worker", "kill-node", "freeze:8"]
    result = soak(tmp_path, rng.choices([*kinds, "drain:20"], k=500), MINUTES, replace=True)
    assert [c for c in result.checks if not c.passed and c.name != "faults"] == []
    assert result.recoveries


def test_fifty_generations_leave_nothing_behind(tmp_path: Path) -> None:
    result = soak(tmp_path, ["kill-worker", "drain:20", "join"] * 13, 2 * MINUTES, replace=False)
    assert [c for c in result.checks if not c.passed] == []
    assert result.generations >= 50


def test_a_spot_trace(tmp_path: Path) -> None:
    """An hour and a half of the AWS trace in two minutes, in which most nodes are taken."""
    trace = followed(load_trace("aws-p3"), speedup=48, max_nodes=6, until_h=1.6)
    result = shown(run_chaos(tiny_job(tmp_path), trace=trace, say=say))
    found = result.goodput
    print(found)
    assert [c for c in result.checks if not c.passed] == []
    assert found is not None
    assert found.restarted_share is not None
    assert found.restarted_share < found.share <= 1.05
