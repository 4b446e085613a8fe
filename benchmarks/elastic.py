"""What elasticity costs while nothing happens, and how soon training goes on when something does.

    python benchmarks/elastic.py overhead [--rounds 5] [--steps 30]
    python benchmarks/elastic.py kills [--faults FAULTS] [--seed N]
    python benchmarks/elastic.py peer

``overhead``: the same two stages on two devices, in turns: as plain processes without Ray (no
coordinator, no heartbeats, no reports, no copies), and as a service on a Ray cluster of two nodes,
without and with in-memory copies.  The sum that commits a step is in all of them: clipping needs
the norm anyway.  Machines are shared and noisy, so the ratio of turns counts, not the seconds.
Beside it stands what all processes (Ray's, too) computed for a step, which neighbours change less:
as two workers keep two cores busy, what is more of that makes a step longer by as much.

``kills``: random faults in a job of two pipelines on four nodes; seconds from the fault to the next
committed step, by phase.

``peer``: torchft's own answer to a killed replica, where torchft is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import psutil

from ray_train_geo.chaos.faults import parse_faults
from ray_train_geo.chaos.local_cluster import local_cluster
from ray_train_geo.chaos.processes import in_session
from ray_train_geo.chaos.recovery import Recovery
from ray_train_geo.chaos.run import run_chaos
from ray_train_geo.data.dataset import open_dataset
from ray_train_geo.planning.plan import Plan
from ray_train_geo.spec import JobSpec, parse_job
from ray_train_geo.training.local import run_local

WARMUP_STEPS = 5
TEXT = Path(__file__).resolve().parents[1] / "LICENSE"
KILLS = ",".join(
    [
        "kill-worker@random",
        *(f"kill-worker@phase:{phase}" for phase in ("forward", "backward", "sync", "optimizer")),
        "kill-worker@phase:checkpoint",
        "kill-worker@phase:recovery",
        "kill-node",
        "freeze:8",
    ]
)
TORCHFT = Path(__file__).resolve().parent / "torchft_kill.py"


def overhead_job(folder: Path, name: str, steps: int, copies: int) -> JobSpec:
    return parse_job(
        {
            "model": {"layers": 8, "dim": 256, "heads": 8},
            "data": {"path": str(TEXT)},
            "training": {
                "steps": WARMUP_STEPS + steps,
                "global_batch": 16,
                "microbatch": 2,
                "seq_len": 128,
            },
            "parallelism": {"pipelines": 1, "stages": 2},
            "checkpoint": {"interval": 0},
            "failure": {"memory_copies": copies},
            "run": {"name": name, "storage_path": str(folder), "trace_steps": 0},
        }
    )


class Step(NamedTuple):
    """Medians of a turn: seconds of a step, and what all processes computed for one."""

    wall_s: float
    cpu_s: float


class CpuClock:
    """What some processes have computed so far, all together, as it was at any time."""

    def __init__(self, pids: Callable[[], Sequence[int]]) -> None:
        self._pids = pids
        self._of: dict[int, float] = {}  # also of those that have ended
        self._times_s: list[float] = []
        self._totals_s: list[float] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample)

    def __enter__(self) -> CpuClock:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._ended.wait(0.5):
            for pid in self._pids():
                with contextlib.suppress(psutil.Error):
                    times = psutil.Process(pid).cpu_times()
                    self._of[pid] = times.user + times.system
            self._times_s.append(time.time())
            self._totals_s.append(sum(self._of.values()))

    def rate(self, begin_s: float, end_s: float) -> float:
        """Seconds of computing a second, between two times."""
        at_begin, at_end = np.interp([begin_s, end_s], self._times_s, self._totals_s)
        return float((at_end - at_begin) / (end_s - begin_s))


def plain_step(folder: Path, plan: Path, steps: int) -> Step:
    """Of the plan's stages as processes of their own."""
    command = [sys.executable, __file__, "plain", "--steps", str(steps)]
    child = subprocess.Popen(
        [*command, "--plan", str(plan), "--folder", str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with CpuClock(lambda: in_session(child.pid)) as clock:
        text, _ = child.communicate()
    if child.returncode:
        raise SystemExit(child.returncode)
    wall_s, end_s = map(float, text.split())
    # In the midst of them: processes begin and end, too.
    return Step(
        wall_s, wall_s * clock.rate(end_s - 0.75 * steps * wall_s, end_s - 0.25 * steps * wall_s)
    )


def plain(args: argparse.Namespace) -> None:
    """The child of :func:`plain_step_s`."""
    job = overhead_job(Path(args.folder), "plain", args.steps, 0)
    dims = job.dims(open_dataset(job.data, job.training.seq_len).vocab_size)
    plan = Plan.from_json(json.loads(Path(args.plan).read_text()))
    records = run_local(job, dims, plan).records
    print(statistics.median(r.step_s for r in records[WARMUP_STEPS:]), time.time())


def overhead(args: argparse.Namespace) -> None:
    plains, ratios = list[Step](), defaultdict[str, list[Step]](list)
    with tempfile.TemporaryDirectory(prefix="rtgb") as name, local_cluster(2) as cluster:
        folder = Path(name)

        def served(label: str, copies: int) -> Step:
            path, log = folder / f"{label}.yaml", folder / f"{label}.log"
            job = overhead_job(folder, label, args.steps, copies)
            path.write_text(job.to_yaml())
            train = [sys.executable, "-m", "ray_train_geo", "train", str(path)]
            driver = cluster.spawn([*train, f"--address={cluster.address}"], log)
            with CpuClock(lambda: [*cluster.processes(), *in_session(driver.pid)]) as clock:
                if driver.wait():
                    raise SystemExit(log.read_text())
            lines = (job.run.directory / "metrics.jsonl").read_text().splitlines()
            records = [json.loads(line) for line in lines][WARMUP_STEPS:]
            wall_s = statistics.median(r["step_s"] for r in records)
            return Step(wall_s, wall_s * clock.rate(records[0]["time"], records[-1]["time"]))

        for turn in range(args.rounds):
            without = served(f"without{turn}", 0)
            alone = plain_step(folder, folder / f"without{turn}" / "plan.json", args.steps)
            copied = served(f"with{turn}", 1)
            plains.append(alone)
            for what, more, less in (
                ("service", without, alone),
                ("service and copies each step", copied, alone),
                ("copies alone", copied, without),
            ):
                ratios[what].append(Step(more.wall_s / less.wall_s, more.cpu_s / less.cpu_s))
            print(
                f"turn {turn}: plain {alone.wall_s:.4f} s (computing {alone.cpu_s:.4f}), service "
                f"{without.wall_s:.4f} ({without.cpu_s:.4f}), with copies {copied.wall_s:.4f} "
                f"({copied.cpu_s:.4f}); 1-minute load {os.getloadavg()[0]:.1f}",
                flush=True,
            )
    alone = [statistics.median(values) for values in zip(*plains, strict=True)]
    print(f"plain processes: median step {alone[0]:.4f} s, computing {alone[1]:.4f} s")
    for what, steps in ratios.items():
        wall, cpu = ([step[i] for step in steps] for i in (0, 1))
        print(
            f"{what}: {statistics.median(wall) - 1:+.1%} (turns {sorted_percent(wall)}); computing "
            f"{statistics.median(cpu) - 1:+.1%} (turns {sorted_percent(cpu)})"
        )


def sorted_percent(ratios: list[float]) -> str:
    return ", ".join(f"{ratio - 1:+.1%}" for ratio in sorted(ratios))


def kills_job(folder: str) -> JobSpec:
    return parse_job(
        {
            "model": {"layers": 4, "dim": 64, "heads": 4, "dropout": 0.1},
            "data": {"path": str(TEXT)},
            "training": {"steps": 100_000, "global_batch": 8, "microbatch": 2, "seq_len": 64},
            "parallelism": {"pipelines": 2, "stages": 2},
            "checkpoint": {"interval": 20},
            "run": {"name": "kills", "storage_path": folder},
        }
    )


def kills(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(prefix="rtgb") as folder:
        result = run_chaos(
            kills_job(folder),
            parse_faults(args.faults),
            seed=args.seed,
            limit_s=args.limit_s,
            say=lambda text: print(text, flush=True),
        )
    step_s = result.median_step_s
    rows = defaultdict[str, list[Recovery]](list)
    for recovery in result.recoveries:
        injection = recovery.injection
        rows[f"{injection.fault.kind} in {injection.phase or '-'}"].append(recovery)
        rows[f"{injection.fault.kind}, all"].append(recovery)
    print(f"{'fault':34} {'n':>3} {'median s':>9} {'worst s':>9} {'lost':>5}  less two steps")
    for name, found in sorted(rows.items()):
        seconds = [r.commit_s for r in found if r.commit_s is not None]
        if not seconds:
            print(f"{name:34} {len(found):3}  never")
            continue
        median, worst = statistics.median(seconds), max(seconds)
        lost = max(r.lost_steps or 0 for r in found)
        beyond = f"{median - 2 * step_s:6.2f} {worst - 2 * step_s:6.2f}"
        print(f"{name:34} {len(found):3} {median:9.2f} {worst:9.2f} {lost:5}  {beyond}")
    print(f"median step {step_s:.3f} s, 1-minute load {os.getloadavg()[0]:.1f}")
    for check in result.checks:
        print(f"{'ok  ' if check.passed else 'FAIL'} {check.name}: {check.detail}")
    peer(args)
    if not result.passed:
        raise SystemExit(1)


def peer(args: argparse.Namespace) -> None:
    del args
    if importlib.util.find_spec("torchft") is None:
        print("torchft: not installed (pip install torchft); its kill test was not run")
        return
    sys.stdout.flush()
    subprocess.run([sys.executable, str(TORCHFT)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("overhead", "kills", "peer", "plain"))
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side")
    parser.add_argument("--steps", type=int, default=30, help="timed steps a turn")
    parser.add_argument("--faults", default=KILLS, help="as ray-train-geo chaos takes them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit-s", type=float, default=1800.0)
    parser.add_argument("--plan", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    {"overhead": overhead, "kills": kills, "peer": peer, "plain": plain}[args.what](args)


if __name__ == "__main__":
    main()
