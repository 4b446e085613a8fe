"""What the replay's tests share: a small job, and fleets from a few words."""

from __future__ import annotations

from ray_train_geo.cluster.traces import SpotTrace, TraceEvent
from ray_train_geo.planning.request import PlanRequest, request
from ray_train_geo.replay.fleet import Fleet, Hardware, fleet_of
from ray_train_geo.spec import JobSpec, parse_job

BATCH = 8


def small_job(parallelism: dict[str, object] | None = None, **training: object) -> JobSpec:
    """Four layers; its state is tens of megabytes, its step some tenths of a second on a T4."""
    usual = {"steps": 1, "global_batch": BATCH, "seq_len": 512, "precision": "fp16"}
    return parse_job(
        {
            "model": {"layers": 4, "dim": 512, "heads": 8},
            "data": {"path": "python://stdlib"},
            "training": usual | training,
            "parallelism": parallelism or {},
        }
    )


def trace(text: str, end_s: float) -> SpotTrace:
    """``"0+a 0+b 60-a 90!b"``: at a second, a node comes, goes, or is warned."""
    events = []
    for word in text.split():
        sign = next(c for c in word if c in "+-!")
        time_s, _, node = word.partition(sign)
        op = {"+": "add", "-": "remove", "!": "notice"}[sign]
        events.append(TraceEvent(float(time_s), op, node))
    return SpotTrace("made-up", tuple(events), end_s)


def fleet(text: str, end_s: float, gpus: int = 1, regions: tuple[str, ...] = ("here",)) -> Fleet:
    """Nodes of T4s."""
    return fleet_of(trace(text, end_s), Hardware("T4", gpus, regions))


def asked(there: Fleet, job: JobSpec | None = None) -> PlanRequest:
    return request(job or small_job(), topology=there.topology)
