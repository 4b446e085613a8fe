"""Step time of our runtime beside what the event engine predicts, on this machine, without Ray.

Emulated: devices and links are imitated (``training/emulation.py``, simulated links).  A stage
sleeps for most of its time, so the workers, a process each, do not wait for each other's cores, and
the engine knows every figure beforehand: this tests schedule, links, gradient sync and commit.

Real: a tiny GPT in one process a stage, over unshaped loopback.  What a layer takes depends on who
else computes at that moment, most of all where there are more workers than cores, and so does what
a message takes: whoever waits for it must get a core first.  So the engine gets what each
computation took, and the mean latency of messages that were waited for, from the trace of the very
steps that are timed, and is tested on what it makes of them.  Beside it (``means``) stands what it
makes of each stage's mean computing, and with no more workers than cores (``probe``) the prediction
from a probe before the run, as the trainer makes it.

    python benchmarks/prediction.py [--steps 8] [--only emulated|real] [--case NAME] [--json]

``--case "20 ms hops"`` is the line of four stages, 16 microbatches and 10/20 ms of computation, for
which no 1F1B can take less than 0.690 s.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch

from ray_train_geo.cluster.topology import LOCAL_LINK, Device, Link, Topology
from ray_train_geo.model.catalog import head_flops, layer_flops
from ray_train_geo.observe.trace import Category, Span
from ray_train_geo.planning.cost import backward_s, forward_s, weight_s
from ray_train_geo.planning.plan import Plan
from ray_train_geo.planning.planner import plan as make_plan
from ray_train_geo.planning.predict import predict_plan
from ray_train_geo.spec import JobSpec, parse_job
from ray_train_geo.training.local import LocalResult, run_local
from ray_train_geo.training.measure import sustained_flops_per_s

VOCAB = 257
WARMUP_STEPS = 2
FORWARD_S = 0.01  # of an emulated stage and microbatch; a backward takes twice as long
MESSAGE_BYTES = 1 * 32 * 64 * 4  # of an emulated case: microbatch, sequence, dim, fp32
LAYER_BYTES = 210_000  # of an emulated layer's gradients, and a little more
REAL_MODEL = {"layers": 12, "dim": 128, "seq_len": 64}
REAL_MICROBATCH = 4
REAL_MESSAGE_BYTES = REAL_MICROBATCH * REAL_MODEL["seq_len"] * REAL_MODEL["dim"] * 4
AT_ONCE = Link(0.0, 1.25e9)


@dataclass(frozen=True, slots=True)
class Case:
    """What runs.  A stage's devices, one of each pipeline, are a region of their own.

    Args:
        down, up: between the regions of neighbouring stages (and beyond), towards later stages
            and back.
        within: between the devices of a stage.
        slowdown: ``[stages]``; how many times longer an emulated stage's computation takes.
    """

    name: str
    stages: int
    pipelines: int = 1
    schedule: str = "1f1b"
    gradient_sync: str = "allreduce"
    bucket_bytes: int = 25_000_000
    down: Link = AT_ONCE
    up: Link | None = None
    within: Link = AT_ONCE
    uplink_bytes_per_s: float | None = None
    slowdown: tuple[float, ...] = ()

    @property
    def workers(self) -> int:
        return self.stages * self.pipelines

    def job(
        self,
        folder: Path,
        steps: int,
        *,
        layers: int,
        dim: int,
        seq_len: int,
        microbatch: int,
        microbatches: int,
        traced: bool = False,
    ) -> JobSpec:
        (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 2000)
        return parse_job(
            {
                "model": {
                    "layers": layers,
                    "dim": dim,
                    "heads": 4,
                    "tied_embeddings": False,
                },
                "data": {"path": str(folder / "text.txt")},
                "training": {
                    "steps": WARMUP_STEPS + steps,
                    "global_batch": microbatches * microbatch,
                    "microbatch": microbatch,
                    "seq_len": seq_len,
                    "lr": 1e-3,
                },
                "parallelism": {
                    "pipelines": self.pipelines,
                    "stages": self.stages,
                    "schedule": self.schedule,
                    "gradient_sync": self.gradient_sync,
                    "bucket_bytes": self.bucket_bytes,
                },
                "checkpoint": {"interval": 0},
                "run": {
                    "name": "prediction",
                    "storage_path": str(folder),
                    "trace_steps": WARMUP_STEPS + steps if traced else 0,
                },
            }
        )

    def emulated_topology(self, job: JobSpec) -> Topology:
        """Two layers a stage, on devices that need ``FORWARD_S`` for them (and the head)."""
        dims, training = job.dims(VOCAB), job.training
        devices = []
        for stage in range(self.stages):
            flops = 2 * layer_flops(dims, training.seq_len, training.microbatch)
            if stage == self.stages - 1:
                flops += head_flops(dims, training.seq_len, training.microbatch)
            seconds = FORWARD_S * (self.slowdown[stage] if self.slowdown else 1.0)
            devices += [
                Device(
                    f"s{stage}/{p}", f"node{stage}.{p}", f"r{stage}", flops_per_s=flops / seconds
                )
                for p in range(self.pipelines)
            ]
        pairs = list(product(range(self.stages), repeat=2))
        links = {
            (f"r{a}", f"r{b}"): self.within
            if a == b
            else self.down
            if a < b
            else self.up or self.down
            for a, b in pairs
        }
        uplinks = {
            (f"r{a}", f"r{b}"): self.uplink_bytes_per_s
            for a, b in pairs
            if a != b and self.uplink_bytes_per_s is not None
        }
        return Topology(tuple(devices), region_links=links, region_uplinks=uplinks)


def ms(latency: float, bytes_per_s: float = AT_ONCE.bandwidth_bytes_per_s) -> Link:
    return Link(latency / 1000, bytes_per_s)


EMULATED = (
    Case("no latency", 4),
    Case("20 ms hops", 4, down=ms(20)),
    Case("20 ms hops, GPipe", 4, schedule="gpipe", down=ms(20)),
    Case("no latency, zero-bubble", 4, schedule="zero-bubble"),
    Case("20 ms hops, zero-bubble", 4, schedule="zero-bubble", down=ms(20)),
    Case("unequal, zero-bubble", 3, 1, "zero-bubble", down=ms(20), slowdown=(1.0, 2.0, 1.5)),
    Case("75 ms hops", 3, down=ms(75)),
    Case("hops as busy as stages: 25 ms a message", 3, down=ms(5, MESSAGE_BYTES / 0.025)),
    Case("hops busier than stages: 40 ms a message", 2, down=ms(5, MESSAGE_BYTES / 0.040)),
    Case("5 ms and fast down, 40 ms and slow up", 4, down=ms(5, 2e6), up=ms(40, 5e5)),
    Case("unequal devices", 3, down=ms(20), slowdown=(1.0, 2.0, 1.5)),
    *(
        Case(
            f"{mode}, {buckets}",
            2,
            2,
            gradient_sync=mode,
            bucket_bytes=bucket_bytes,
            down=ms(20, 4e6),
            within=ms(10, 4e6),
        )
        for mode in ("allreduce", "sharded_ps", "central_ps")
        for buckets, bucket_bytes in (("one bucket", 25_000_000), ("a bucket a layer", LAYER_BYTES))
    ),
    Case("two pipelines share an uplink", 2, 2, down=ms(10, 1e6), uplink_bytes_per_s=6e5),
)
REAL = (
    Case("1F1B", 2),
    Case("GPipe", 2, schedule="gpipe"),
    Case("1F1B", 3),
    Case("GPipe", 3, schedule="gpipe"),
    Case("zero-bubble", 3, schedule="zero-bubble"),
    Case("1F1B", 4),
    Case("1F1B, all-reduce", 2, 2),
    Case("GPipe, sharded PS", 2, 2, "gpipe", "sharded_ps"),
)


@dataclass(frozen=True, slots=True)
class Row:
    """A case's figures: medians over the timed steps, in seconds.

    Args:
        error: median of what each step was predicted too long, as a part of it.
        simulated: devices and links were emulated.
        means_s: predicted from each stage's mean computing.
        probe_s: predicted from a probe before the run.
        load: the machine's, averaged over a minute.
    """

    kind: str
    name: str
    stages: int
    pipelines: int
    predicted_s: float
    measured_s: float
    error: float
    fastest_s: float
    slowest_s: float
    simulated: bool
    means_s: float | None
    probe_s: float | None
    load: float

    @classmethod
    def of(
        cls,
        kind: str,
        case: Case,
        result: LocalResult,
        predicted_s: Sequence[float],
        means_s: float | None = None,
        probe_s: float | None = None,
    ) -> Row:
        """Of a run whose timed steps were predicted to take ``predicted_s``."""
        steps_s = [record.step_s for record in result.records[WARMUP_STEPS:]]
        return cls(
            kind=kind,
            name=case.name,
            stages=case.stages,
            pipelines=case.pipelines,
            predicted_s=statistics.median(predicted_s),
            measured_s=statistics.median(steps_s),
            error=statistics.median(
                predicted / measured - 1
                for predicted, measured in zip(predicted_s, steps_s, strict=True)
            ),
            fastest_s=min(steps_s),
            slowest_s=max(steps_s),
            simulated=result.simulated,
            means_s=means_s,
            probe_s=probe_s,
            load=os.getloadavg()[0],
        )

    def __str__(self) -> str:
        means, probe = (
            "" if s is None else f"{s / self.measured_s - 1:+.1%}"
            for s in (self.means_s, self.probe_s)
        )
        return (
            f"{self.kind:8} {self.pipelines} x {self.stages}  {self.name:40} "
            f"{self.predicted_s:9.3f} {self.measured_s:8.3f} {self.error:+7.1%} {means:>7} "
            f"{probe:>7} {self.fastest_s:8.3f} {self.slowest_s:8.3f} {self.load:5.1f}"
        )


HEADING = (
    f"{'':8} {'plan':6} {'case':40} {'predicted':>9} {'measured':>8} {'error':>7} {'means':>7} "
    f"{'probe':>7} {'fastest':>8} {'slowest':>8} {'load':>5}"
)


def emulated(case: Case, folder: Path, steps: int) -> Row:
    model = {"layers": 2 * case.stages, "dim": 64, "seq_len": 32}
    job = case.job(folder, steps, **model, microbatch=1, microbatches=16)
    topology, dims = case.emulated_topology(job), job.dims(VOCAB)
    plan = make_plan(topology, job, VOCAB)
    predicted_s = predict_plan(plan, topology, job, VOCAB).step_s
    shared = case.uplink_bytes_per_s is not None  # among threads only
    result = run_local(job, dims, plan, processes=not shared, emulated=topology)
    return Row.of("emulated", case, result, [predicted_s] * steps)


def real(case: Case, folder: Path, steps: int) -> Row:
    job = case.job(
        folder, steps, **REAL_MODEL, microbatch=REAL_MICROBATCH, microbatches=8, traced=True
    )
    few = case.workers <= (os.cpu_count() or 1)
    speed = probed_flops_per_s(job, case.workers) if few else Device("", "").flops_per_s
    devices = tuple(Device(f"cpu{i}", "here", flops_per_s=speed) for i in range(case.workers))
    topology = Topology(devices)
    plan = make_plan(topology, job, VOCAB)
    result = run_local(job, job.dims(VOCAB), plan)
    timed = range(WARMUP_STEPS + 1, WARMUP_STEPS + steps + 1)
    predicted_s, means_s = [], []
    for step in timed:
        traced = replace(
            topology.with_devices(traced_devices(plan, result, job, step)),
            node_links={("here", "here"): traced_link(plan, result, step)},
        )
        means_s.append(predict_plan(plan, traced, job, VOCAB).step_s)
        pace = traced_pace(plan, result, job, traced, step)
        predicted_s.append(predict_plan(plan, traced, job, VOCAB, pace).step_s)
    probe_s = predict_plan(plan, topology, job, VOCAB).step_s if few else None
    return Row.of("real", case, result, predicted_s, statistics.median(means_s), probe_s)


def traced_devices(plan: Plan, result: LocalResult, job: JobSpec, step: int) -> Iterator[Device]:
    """The plan's devices, as fast as their stages' spans of ``step`` say."""
    dims, training = job.dims(VOCAB), job.training
    for role, device in zip(plan.roles(), plan.devices, strict=True):
        spans = computed(result, role.rank, step)
        layers = plan.stage(role).layers
        microbatches = plan.pipelines[role.pipeline].microbatches
        expected_s = forward_s(dims, training, layers, device)
        expected_s += backward_s(dims, training, layers, device)
        slowdown = sum(span.duration_s for span in spans) / (microbatches * expected_s)
        yield replace(device, flops_per_s=device.flops_per_s / slowdown)


def traced_pace(
    plan: Plan, result: LocalResult, job: JobSpec, traced: Topology, step: int
) -> list[tuple[tuple[float, ...], ...]]:
    """How many times as long as it would in its stage's mean each action of ``step`` took."""
    dims, training = job.dims(VOCAB), job.training
    paces: list[list[tuple[float, ...]]] = [[] for _ in plan.pipelines]
    for role, device in zip(plan.roles(), traced.devices, strict=True):
        layers = plan.stage(role).layers
        usual_s = {"forward": forward_s(dims, training, layers, device)}
        usual_s["backward"] = backward_s(dims, training, layers, device)
        if plan.schedule == "zero-bubble":
            usual_s["weights"] = weight_s(dims, training, layers, device)
            usual_s["backward"] -= usual_s["weights"]
        spans = sorted(computed(result, role.rank, step), key=lambda span: span.start_s)
        paces[role.pipeline].append(tuple(s.duration_s / usual_s[s.category] for s in spans))
    return [tuple(of_pipeline) for of_pipeline in paces]


def computed(result: LocalResult, rank: int, step: int) -> list[Span]:
    """The spans of ``step`` in which the worker computed."""
    kinds = "forward", "backward", "weights"
    return [span for span in result.spans[rank] if span.step == step and span.category in kinds]


def traced_link(plan: Plan, result: LocalResult, step: int) -> Link:
    """Loopback with the mean latency of ``step``'s messages whose receiver was waiting already.

    From the end of the computation that made one to the end of the wait for it, less its transfer.
    """
    found = {
        (role.rank, span.category, span.name): span
        for role in plan.roles()
        for span in result.spans[role.rank]
        if span.step == step
    }
    latencies_s = []
    for (rank, category, name), received in found.items():
        if category != "receive":
            continue
        kind: Category = "forward" if name[0] == "F" else "backward"
        made = found[rank + (-1 if kind == "forward" else 1), kind, name]
        made_s = made.start_s + made.duration_s
        if received.start_s < made_s:
            latencies_s.append(received.start_s + received.duration_s - made_s)
    if not latencies_s:
        return LOCAL_LINK
    transfer_s = REAL_MESSAGE_BYTES / LOCAL_LINK.bandwidth_bytes_per_s
    return replace(LOCAL_LINK, latency_s=max(0.0, statistics.mean(latencies_s) - transfer_s))


def probed_flops_per_s(job: JobSpec, workers: int) -> float:
    """A device's speed by the trainer's probe, in ``workers`` processes at once."""
    context = multiprocessing.get_context("spawn")
    barrier, answers = context.Barrier(workers), context.Queue()
    processes = [
        context.Process(target=_probe, args=(job, barrier, answers)) for _ in range(workers)
    ]
    for process in processes:
        process.start()
    speeds = [answers.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    return statistics.mean(speeds)


def _probe(job: JobSpec, barrier: Any, answers: Any) -> None:
    torch.set_num_threads(1)
    barrier.wait(120)
    answers.put(sustained_flops_per_s(job.dims(VOCAB), job.training, torch.device("cpu")))


def measure(cases: Sequence[tuple[Any, Case]], steps: int, quiet: bool) -> list[Row]:
    rows = []
    for run, case in cases:
        with tempfile.TemporaryDirectory(prefix="rtg-bench-") as folder:
            rows.append(run(case, Path(folder), steps))
        if not quiet:
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=8, help="timed steps a case")
    parser.add_argument("--only", choices=["emulated", "real"], help="one kind of cases")
    parser.add_argument("--case", default="", help="only cases whose names begin with this")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    if args.steps < 1:
        parser.error("--steps must be at least 1")
    torch.set_num_threads(1)
    cases = [(emulated, case) for case in EMULATED if args.only != "real"]
    cases += [(real, case) for case in REAL if args.only != "emulated"]
    cases = [(run, case) for run, case in cases if case.name.startswith(args.case)]
    if not cases:
        parser.error(f"no case begins with {args.case!r}")
    if not args.json:
        print(f"{os.cpu_count()} cores; emulated: simulated devices and links\n{HEADING}")
    rows = measure(cases, args.steps, args.json)
    worst = max(rows, key=lambda row: abs(row.error))
    if args.json:
        result = {
            "cores": os.cpu_count(),
            "worst_error": worst.error,
            "rows": [asdict(row) for row in rows],
        }
        print(json.dumps(result))
    else:
        print(f"largest error {worst.error:+.1%}: {worst.kind} {worst.name}")


if __name__ == "__main__":
    main()
