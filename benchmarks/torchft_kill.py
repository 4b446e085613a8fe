"""torchft's own answer to a killed replica: seconds from kill -9 to the survivor's next commit.

    python benchmarks/torchft_kill.py [--kills 5]

It needs ``pip install torchft`` (written for 0.2.0), not Ray.  For each kill, a lighthouse and two
replica groups of one process start to train a tiny model on gloo, and one is killed at a moment::

    between steps   both have committed a step, and neither has asked for the next quorum
    forward         both are in the quorum of a step, and neither has begun to all-reduce
    all-reduce      the survivor waits in its all-reduce for the other, which is late

A moment is held for ``HOLD_S``; a survivor that is alone holds no more, and its steps take
milliseconds.  One that ends, or has not committed after ``LIMIT_S``, is counted apart.  With the
DDP of 0.2.0 it ends, as its hook asserts that no all-reduce failed: so there is "no DDP", too.
"""

from __future__ import annotations

import argparse
import itertools
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("RUST_LOG", "error")  # or the lighthouse tells of every quorum

import torch
from torch.distributed import TCPStore
from torchft import DistributedDataParallel, Manager, Optimizer, ProcessGroupGloo
from torchft.coordination import LighthouseServer

MOMENTS = ("between steps", "forward", "all-reduce")
WARMUP_STEPS = 3  # that both have committed together before the kill
HOLD_S = 0.4
START_S = 120.0
LIMIT_S = 90.0  # longer than any of torchft's default timeouts
_HOST = "localhost"


class Setting(NamedTuple):
    """What differs from torchft's defaults, in the lighthouse and in the replicas.

    ``--timeout-s`` is that of collectives and calls; ``--by-hand`` calls ``Manager.allreduce``
    after the backward pass, in place of torchft's DDP.
    """

    name: str
    lighthouse: dict[str, int]
    options: tuple[str, ...]


SHORT = {"heartbeat_timeout_ms": 1000, "quorum_tick_ms": 10}
SETTINGS = (
    Setting("defaults", {}, ()),
    Setting("defaults, no DDP", {}, ("--by-hand",)),
    Setting("short timeouts", SHORT, ("--timeout-s=2",)),
    Setting("short timeouts, no DDP", SHORT, ("--timeout-s=2", "--by-hand")),
)


def replica(args: argparse.Namespace) -> None:
    """Trains until killed; says ``held STEPS_TOGETHER TIME`` and ``committed BY_HOW_MANY TIME``."""
    limits = {} if args.timeout_s is None else {"timeout": timedelta(seconds=args.timeout_s)}
    store = TCPStore(_HOST, 0, is_master=True, wait_for_workers=False)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))
    manager = Manager(
        pg=ProcessGroupGloo(**limits),
        load_state_dict=model.load_state_dict,
        state_dict=model.state_dict,
        min_replica_size=1,
        rank=0,
        world_size=1,
        store_addr=_HOST,
        store_port=store.port,
        lighthouse_addr=args.lighthouse,
        replica_id=args.name,
        hostname=_HOST,
        **limits,
    )
    forward = model if args.by_hand else DistributedDataParallel(manager, model)
    optimizer = Optimizer(manager, torch.optim.SGD(model.parameters(), lr=1e-3))
    together, parent = 0, os.getppid()

    def hold(moment: str) -> None:
        if moment == args.moment and manager.num_participants() == 2:
            print("held", together, time.monotonic(), flush=True)
            time.sleep(HOLD_S)

    while os.getppid() == parent:
        optimizer.zero_grad()  # asks for a quorum
        hold("forward")
        loss = forward(torch.rand(8, 64)).square().mean()
        if args.name == "victim":
            hold("all-reduce")
        loss.backward()
        if args.by_hand:
            for parameter in model.parameters():
                manager.allreduce(parameter.grad).wait()
        before = manager.current_step()
        optimizer.step()
        if manager.current_step() > before:
            together += manager.num_participants() == 2
            print("committed", manager.num_participants(), time.monotonic(), flush=True)
        hold("between steps")


class Replica:
    """A process of :func:`replica`."""

    def __init__(self, folder: Path, name: str, options: list[str]) -> None:
        self._out, self._err = folder / f"{name}.out", folder / f"{name}.err"
        command = [sys.executable, __file__, f"--name={name}", *options]
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self._process = subprocess.Popen(command, stdout=out, stderr=err)

    def time_of(self, word: str, wanted: Callable[[int, float], bool], limit_s: float) -> float:
        """When it first says ``word`` with a ``wanted`` number and time; else a RuntimeError."""
        deadline_s = time.monotonic() + limit_s
        while time.monotonic() < deadline_s:
            status = self._process.poll()  # before the reading, so that no last word is missed
            for line in self._out.read_text().rpartition("\n")[0].splitlines():
                said, number, at_s = line.split()
                if said == word and wanted(int(number), float(at_s)):
                    return float(at_s)
            if status is not None:
                how = f"killed by {signal.Signals(-status).name}" if status < 0 else "it failed"
                break
            time.sleep(0.005)
        else:
            how = f"it hung for {limit_s:.0f} s"
        last_words = self._err.read_text(errors="replace").strip().rpartition("\n")[2]
        raise RuntimeError(f"{how}: {last_words[:160]}")

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


def kill_once(setting: Setting, moment: str) -> float | str:
    """Seconds from the kill to the next commit, or why there was none."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="torchft_kill")))
        server = LighthouseServer(bind="[::]:0", min_replicas=1, **setting.lighthouse)
        stack.callback(server.shutdown)
        port = server.address().rpartition(":")[2]
        options = [f"--moment={moment}", f"--lighthouse=http://{_HOST}:{port}", *setting.options]
        victim, survivor = (Replica(folder, name, options) for name in ("victim", "survivor"))
        stack.callback(victim.kill)
        stack.callback(survivor.kill)
        victim.time_of("held", lambda steps, _: steps >= WARMUP_STEPS, START_S)
        time.sleep(HOLD_S / 2)
        killed_s = time.monotonic()
        victim.kill()
        try:
            alone = survivor.time_of("committed", lambda n, at: n == 1 and at > killed_s, LIMIT_S)
        except RuntimeError as error:
            return str(error)
        return alone - killed_s


def measure(setting: Setting, moment: str, kills: int) -> None:
    results = [kill_once(setting, moment) for _ in range(kills)]
    seconds = [result for result in results if isinstance(result, float)]
    failures = [result for result in results if isinstance(result, str)]
    text = f"torchft, {setting.name}, {moment}:"
    if seconds:
        text += f" {statistics.median(seconds):.2f} s to the next commit (median), of "
        text += ", ".join(f"{one:.2f}" for one in sorted(seconds))
    if failures:
        text += f" SURVIVOR LOST, {len(failures)} of {kills}: {failures[-1]}"
    print(text, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=5, help="of each setting and moment")
    for hidden, kind in {"name": str, "moment": str, "lighthouse": str, "timeout-s": float}.items():
        parser.add_argument(f"--{hidden}", type=kind, help=argparse.SUPPRESS)
    parser.add_argument("--by-hand", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.name:
        replica(args)
        return
    for setting, moment in itertools.product(SETTINGS, MOMENTS):
        measure(setting, moment, args.kills)


if __name__ == "__main__":
    main()
