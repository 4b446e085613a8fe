"""A made-up run with everything in it: two pipelines of two stages, 300 steps, one lost worker."""

from __future__ import annotations

import math
import random
from typing import Any

from ray_train_geo.cluster.topology import Device
from ray_train_geo.observe.run_directory import RunDirectory
from ray_train_geo.observe.trace import Span, chrome_trace, worker_name
from ray_train_geo.planning.plan import Certificate, PipelinePlan, Plan, StagePlan

T0 = 1.75e9
STAGES, MICROBATCHES, FORWARD_S, BACKWARD_S, HOP_S = 2, 4, 0.02, 0.04, 0.005


def plan() -> Plan:
    devices = tuple(
        Device(
            id=f"{name}/0",
            node=name,
            region=region,
            market_type="spot" if i % 2 else "on-demand",
            type="A100-80G",
            memory_bytes=80 * 2**30,
        )
        for i, (name, region) in enumerate(
            [("a1", "us-east"), ("a2", "us-east"), ("b1", "us-east"), ("c1", "eu-west")]
        )
    )
    pipelines = tuple(
        PipelinePlan(
            stages=tuple(
                StagePlan(
                    devices[p * STAGES + s].id,
                    (s * 6, s * 6 + 6),
                    warmup=2 - s,
                    memory_bytes=(20 + 9 * s) * 2**30,
                )
                for s in range(STAGES)
            ),
            microbatches=MICROBATCHES,
            first_microbatch=p * MICROBATCHES,
        )
        for p in range(2)
    )
    certificate = Certificate("step-time", 0.41, 0.38)
    return Plan(12, pipelines, "1f1b", "allreduce", devices, 0.41, certificate, 1.2)


def trace(steps: int = 4) -> dict[str, Any]:
    """1F1B on two stages, with receives, sends, gradient sync and optimizer."""
    workers = {}
    orders = {0: "F0 F1 B0 F2 B1 F3 B2 B3", 1: "F0 B0 F1 B1 F2 B2 F3 B3"}
    for pipeline in range(2):
        spans: dict[int, list[Span]] = {0: [], 1: []}
        for step in range(steps):
            clock = {0: T0 + step * 0.5, 1: T0 + step * 0.5}
            done: dict[tuple[int, str], float] = {}
            queue = {s: orders[s].split() for s in orders}
            while queue[0] or queue[1]:
                for s in (0, 1):
                    if not queue[s]:
                        continue
                    action = queue[s][0]
                    source = 1 - s if (action[0] == "F") == (s == 1) else None
                    if source is not None and (source, action) not in done:
                        continue
                    queue[s].pop(0)
                    m = pipeline * MICROBATCHES + int(action[1])
                    if source is not None:
                        sent = done[source, action]
                        spans[s].append(Span("receive", action, sent, HOP_S, step, m))
                        clock[s] = max(clock[s], sent + HOP_S)
                    kind, length = (
                        ("forward", FORWARD_S) if action[0] == "F" else ("backward", BACKWARD_S)
                    )
                    spans[s].append(Span(kind, action, clock[s], length, step, m))
                    clock[s] += length
                    done[s, action] = clock[s]
                    if (action[0] == "F") == (s == 0):
                        spans[s].append(Span("send", action, clock[s], HOP_S, step, m))
            end = max(clock.values())
            for s in (0, 1):
                spans[s].append(Span("sync", "layers", end, 0.03, step))
                spans[s].append(Span("optimizer", "step", end + 0.03, 0.01, step))
        for s in (0, 1):
            rank = pipeline * STAGES + s
            name = worker_name(rank, pipeline, s, (s * 6, s * 6 + 6), f"node-{rank}")
            workers[rank] = (name, spans[s])
    return chrome_trace(workers)


def records(steps: int = 300) -> list[dict[str, Any]]:
    rng = random.Random(0)
    made = []
    for step in range(steps):
        loss = 1.3 + 4.2 * math.exp(-step / 60) + rng.gauss(0, 0.06)
        step_s = 3.1 if step == 0 else 0.42 + rng.gauss(0, 0.012) + 0.08 * (step >= 200)
        made.append(
            {
                "time": T0 + step * 0.45,
                "step": step,
                "loss": loss,
                "tokens": 8192,
                "step_s": step_s,
                "predicted_step_s": 0.41 if step < 200 else 0.52,
                "tokens_per_s": 8192 / step_s,
                "grad_norm": 1.0,
                "lr": 3e-4,
                "generation": 0 if step < 200 else 1,
                "bits_per_byte": loss / math.log(2),
                "skipped": False,
            }
        )
    return made


def events() -> list[dict[str, Any]]:
    workers = [
        {
            "rank": r,
            "pid": 1000 + r,
            "node_id": f"{r:x}" * 56,
            "host": f"10.0.0.{r}",
            "region": "us-east",
            "pipeline": r // 2,
            "stage": r % 2,
            "layers": [r % 2 * 6, r % 2 * 6 + 6],
            "device": f"node-{r}/0",
        }
        for r in range(4)
    ]
    return [
        {"event": "start", "steps": 300, "time": T0 - 5},
        {"event": "generation", "generation": 0, "workers": workers, "time": T0 - 1},
        {"event": "checkpoint", "step": 100, "path": "checkpoints/100", "seconds": 1.25,
         "bytes": 3 * 2**20, "time": T0 + 45},
        {"event": "checkpoint", "step": 200, "path": "checkpoints/200", "seconds": 1.5,
         "bytes": 3 * 2**20, "time": T0 + 90},
        {"event": "error", "message": "rank 3 <script>alert(1)</script> was lost",
         "traceback": "Traceback:\n  <b>boom</b>", "time": T0 + 91},
        {"event": "generation", "generation": 1, "workers": workers[:2], "time": T0 + 92},
        {"event": "finish", "step": 300, "time": T0 + 140},
    ]  # fmt: skip


def fill(run: RunDirectory) -> None:
    for record in records():
        run.append_metrics(record)
    for event in events():
        run.append_event(**event)
    run.write_json("plan.json", plan().to_json())
    run.write_json("trace.json", trace(), indent=None)
    run.write_text("job.yaml", "model:\n  name: gpt3-small\n")
    run.write_error("rank-3", "Traceback (most recent call last):\n  <i>oom</i>")
