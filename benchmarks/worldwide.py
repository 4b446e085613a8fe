"""Training across the world beside training in one room: steps measured on emulated links.

Eight hosts in eight regions of DT-FM's world-wide case (the geo lab: real sockets, real gloo, the
published latencies, bandwidths scaled), two pipelines of four stages.  Devices are emulated, as
two cores can't be eight GPUs: a stage's forward and backward last as long as they should, for the
most part asleep.  Everything else is the runtime's own.

    in one room     no delays                       what all others are held against
    plain           1F1B, all-reduce, fp32 messages
    best            what the planner chooses with int8 activations and int8 gradients
    best, delayed   the same, and sums have the whole of the next step to come round
    local SGD       the same, and pipelines that merge every few steps (DiLoCo)
    torch           torch.distributed.pipelining, GPipe and 1F1B, all-reduce

    python benchmarks/worldwide.py [--steps 3] [--scale 0.0015] [--only NAME] [--json]

Losses are those of the very steps that are timed; ``benchmarks/convergence.py`` trains longer.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pickle
import statistics
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

from ray_train_geo.cluster.topology import Link, Topology
from ray_train_geo.cluster.topology_file import dump_topology
from ray_train_geo.lab.lab import Lab
from ray_train_geo.model.catalog import layer_flops
from ray_train_geo.planning.budget import Budget
from ray_train_geo.planning.plan import Plan
from ray_train_geo.planning.planner import plan as make_plan
from ray_train_geo.planning.predict import predict_plan
from ray_train_geo.spec import JobSpec, parse_job
from ray_train_geo.training.assignment import Assignment
from ray_train_geo.training.groups import flows_of

HOSTS, PIPELINES, STAGES, LAYERS = 8, 2, 4, 8
VOCAB = 257
WARMUP_STEPS = 1
PORT = 29500
QUIET = {"TORCH_CPP_LOG_LEVEL": "ERROR"}  # hosts have no names to look up
AT_ONCE = Link(0.0, 1.25e9)
HERE = Path(__file__).resolve().parent


@dataclass(frozen=True, slots=True)
class Case:
    """What is measured.

    Args:
        shaped: on the links of the scenario, or in one room.
        settings: sections of the job.
        peer: torch's schedule that runs it instead of our runtime.
        round: steps between two merges; whole rounds are measured, and their mean step counts.  A
            step more, in which the run merges everything because it ends, does not.
    """

    name: str
    settings: Mapping[str, Mapping[str, Any]]
    shaped: bool = True
    peer: str | None = None
    round: int = 0


PLAIN: dict[str, dict[str, Any]] = {
    "parallelism": {"gradient_sync": "allreduce", "extra_warmup": 0},
}
BEST: dict[str, dict[str, Any]] = {"codecs": {"activations": "int8", "gradients": "int8"}}
DELAYED = {**BEST, "parallelism": {"delay_steps": 1}}
ROUND, ROUNDS = 2, 4
LOCAL: dict[str, Any] = {
    "inner_steps": ROUND, "fragments": 2, "delay_steps": 1, "carry": True, "mix": 0.0,
    "outer_lr": 1.0, "outer_momentum": 0.0, "codec": "int4",
}  # fmt: skip
MERGED = {**BEST, "local_sgd": LOCAL}
CASES = (
    Case("in one room", PLAIN, shaped=False),
    Case("plain", PLAIN),
    Case("best", BEST),
    Case("best, delayed", DELAYED),
    Case("local SGD", MERGED, round=ROUND),
    Case("torch GPipe", PLAIN, peer="gpipe"),
    Case("torch 1F1B", PLAIN, peer="1f1b"),
)


def job_of(
    settings: Mapping[str, Mapping[str, Any]], arguments: argparse.Namespace, steps: int
) -> JobSpec:
    given: dict[str, Any] = {
        "model": {"layers": LAYERS, "dim": arguments.dim, "heads": 2, "vocab_size": VOCAB,
                  "tied_embeddings": False},
        "data": {"path": str(HERE.parent / "LICENSE")},
        "training": {"steps": WARMUP_STEPS + steps, "microbatch": 1, "lr": 1e-3,
                     "global_batch": arguments.microbatches, "seq_len": arguments.seq_len},
        "checkpoint": {"interval": 0},
        "run": {"name": "worldwide", "storage_path": tempfile.gettempdir(), "trace_steps": 0},
    }  # fmt: skip
    for section, values in settings.items():
        given[section] = {**given.get(section, {}), **values}
    given["parallelism"] = {
        "pipelines": PIPELINES, "stages": STAGES, **given.get("parallelism", {}),
    }  # fmt: skip
    return parse_job(given)


def paced(topology: Topology, job: JobSpec, forward_s: float) -> Topology:
    """``topology`` with devices that need ``forward_s`` for the layers of a stage."""
    flops = LAYERS / STAGES * layer_flops(job.dims(VOCAB), job.training.seq_len, 1)
    return topology.with_devices(
        dataclasses.replace(d, type="cpu", flops_per_s=flops / forward_s, flops_by_precision=())
        for d in topology.devices
    )


def in_one_room(topology: Topology) -> Topology:
    """The same hosts, next to each other."""
    regions = dict.fromkeys(d.region for d in topology.devices)
    links = {(a, b): AT_ONCE for a in regions for b in regions}
    return Topology(topology.devices, region_links=links)


def measure(lab: Lab, case: Case, job: JobSpec, plan: Plan, topology: Topology) -> dict[str, Any]:
    """Run ``plan`` on the lab's hosts: seconds and losses of the steps after the warmup."""
    dims = job.dims(VOCAB)
    address = {host.name: host.address for host in lab.hosts}
    with tempfile.TemporaryDirectory(prefix="rtg-worldwide-") as name:
        folder = Path(name)
        assignments = [
            Assignment(
                job=job,
                dims=dims,
                plan=plan,
                rank=role.rank,
                generation=1,
                hostname=address[plan.devices[role.rank].node],
                deadline_s=600.0,
                checkpoint_root=str(folder / "checkpoints"),
                flows=flows_of(plan, dims, topology),
            )
            for role in plan.roles()
        ]
        (folder / "assignments.pickle").write_bytes(pickle.dumps(assignments))
        dump_topology(topology, folder / "topology.yaml")
        script = "lab_worker.py" if case.peer is None else "torch_worker.py"
        processes = []
        for a in assignments:
            command = [
                sys.executable, str(HERE / script), str(folder), str(a.rank),
                assignments[0].hostname, str(PORT), str(job.training.steps),
                *([case.peer] if case.peer else []),
            ]  # fmt: skip
            processes.append(lab.popen(plan.devices[a.rank].node, command, env=os.environ | QUIET))
        try:
            for process in processes:
                if process.wait():
                    raise SystemExit(f"{case.name}: a worker ended with {process.returncode}")
        finally:
            for process in processes:
                process.kill()
        if case.peer is not None:
            seconds = json.loads((folder / "peer.json").read_text())
            return {"steps_s": seconds[WARMUP_STEPS:], "losses": []}
        records = [json.loads(r) for r in (folder / "records.jsonl").read_text().splitlines()]
    return {
        "steps_s": [r["step_s"] for r in records][WARMUP_STEPS:],
        "losses": [r["loss"] for r in records],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each case")
    parser.add_argument(
        "--scale", type=float, default=0.0015, help="what bandwidths are multiplied by"
    )
    parser.add_argument("--forward-ms", type=float, default=60.0, help="of a stage and microbatch")
    parser.add_argument("--microbatches", type=int, default=128, help="of a step, both pipelines")
    parser.add_argument("--dim", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--only", action="append", choices=[c.name for c in CASES])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    if not arguments.json:
        print(f"{'':14}{'measured s':>11}{'of room':>8}{'simulated':>10}{'of room':>8}"
              f"{'error':>8}{'last loss':>10}{'load':>6}")  # fmt: skip
    base = job_of(PLAIN, arguments, arguments.steps)
    for case in CASES:
        if arguments.only and case.name not in arguments.only:
            continue
        job = job_of(
            case.settings, arguments, ROUNDS * case.round + 1 if case.round else arguments.steps
        )
        with Lab("worldwide", hosts=HOSTS, scale=arguments.scale) as shaped:
            far = paced(shaped.topology, base, arguments.forward_ms / 1000)
        topology = far if case.shaped else in_one_room(far)
        topology = topology.striped(job.parallelism.most_flows)
        plan = make_plan(topology, job, VOCAB, budget=Budget(10.0), prove=False)
        predicted_s = predict_plan(plan, topology, job, VOCAB).step_s
        with Lab(topology) as lab:
            found = measure(lab, case, job, plan, topology)
        steps_s = found["steps_s"][:-1] if case.round else found["steps_s"]
        row = {
            "case": case.name,
            "measured_s": (statistics.mean if case.round else statistics.median)(steps_s),
            "steps_s": steps_s,
            "simulated_s": None if case.peer else predicted_s,
            "losses": found["losses"],
            "gradient_sync": plan.gradient_sync,
            "codecs": sorted({s.codec for p in plan.pipelines for s in p.stages}),
            "load": os.getloadavg()[0],
        }
        rows.append(row)
        if not arguments.json:
            print(line(row, rows[0]), flush=True)
    if arguments.json:
        print(json.dumps({"scale": arguments.scale, "cases": rows}))


def line(row: Mapping[str, Any], room: Mapping[str, Any]) -> str:
    simulated = row["simulated_s"]
    measured = row["measured_s"]
    loss = f"{row['losses'][-1]:10.4f}" if row["losses"] else f"{'':10}"
    by_engine = f"{'':26}"
    if simulated is not None and room["simulated_s"]:
        by_engine = (
            f"{simulated:10.2f}{simulated / room['simulated_s']:8.2f}"
            f"{simulated / measured - 1:+8.1%}"
        )
    return (
        f"{row['case']:14}{measured:11.2f}{measured / room['measured_s']:8.2f}{by_engine}{loss}"
        f"{row['load']:6.1f}"
    )


if __name__ == "__main__":
    main()
