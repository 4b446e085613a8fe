"""Small jobs on real text for the tests of this folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ray_train_geo.cluster.topology import Device, Topology
from ray_train_geo.planning.plan import Plan
from ray_train_geo.planning.planner import plan as make_plan
from ray_train_geo.spec import JobSpec, parse_job
from ray_train_geo.training.assignment import Start, StepRecord
from ray_train_geo.training.local import LocalResult, run_local

LICENSE = Path(__file__).parents[2] / "LICENSE"  # English text that never changes
VOCAB = 257
GPT = {"layers": 6, "dim": 32, "heads": 4, "dropout": 0.1, "tied_embeddings": True}
LLAMA = {**GPT, "family": "llama", "kv_heads": 2}


def make_job(folder: Path, *overrides: str, model: dict[str, Any] | None = None) -> JobSpec:
    """A job whose sums come out differently if a sample, a mask or a gradient is misplaced."""
    text = folder / "text.txt"
    if not text.exists():
        text.write_text(LICENSE.read_text())
    raw = {
        "model": model or GPT,
        "data": {"path": str(text)},
        "training": {
            "steps": 30,
            "global_batch": 16,
            "microbatch": 2,
            "seq_len": 16,
            "lr": 3e-3,
            "warmup_steps": 5,
            "grad_clip": 0.5,
            "seed": 7,
        },
        "parallelism": {"bucket_bytes": 20_000},
        "checkpoint": {"interval": 0},
        "run": {"name": "test", "storage_path": str(folder)},
    }
    return parse_job(raw, overrides)


def plan_for(job: JobSpec, devices: int = 8, regions: int = 1) -> Plan:
    topology = Topology(
        tuple(Device(f"d{i}", f"n{i}", region=f"r{i % regions}") for i in range(devices))
    )
    return make_plan(topology, job, VOCAB)


def train(
    job: JobSpec, start: Start | None = None, until: int | None = None, plan: Plan | None = None
) -> LocalResult:
    """Run under the plan that the job's parallelism asks for, ranks as threads over real gloo."""
    plan = plan or plan_for(job)
    return run_local(job, job.dims(VOCAB), plan, processes=False, start=start, until=until)


def curve(records: list[StepRecord]) -> list[tuple[float, float]]:
    return [(r.loss, r.grad_norm) for r in records]


def worst_difference(a: list[StepRecord], b: list[StepRecord]) -> float:
    """Largest relative difference of loss or gradient norm over all steps."""
    assert [r.step for r in a] == [r.step for r in b]
    return max(
        abs(x - y) / abs(y)
        for left, right in zip(curve(a), curve(b), strict=True)
        for x, y in zip(left, right, strict=True)
    )
