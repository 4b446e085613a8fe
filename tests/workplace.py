"""Commands run for real, and what they can go wrong on: a job, and a finished run of it."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import yaml

from ray_train_geo.cluster.topology import Device, Topology
from ray_train_geo.data.dataset import open_dataset
from ray_train_geo.observe.run_directory import RunDirectory
from ray_train_geo.planning.planner import plan
from ray_train_geo.spec import parse_job
from ray_train_geo.training.local import run_local

TIMEOUT_S = 100


@dataclass(frozen=True)
class Ended:
    """How a command ended; nothing that it started is left."""

    code: int
    out: str
    err: str

    def refuses(self, says: str, code: int = 2) -> None:
        """It told exactly one thing on stderr, and that is it."""
        assert "Traceback" not in self.out + self.err
        assert self.code == code, (self.code, self.out, self.err)
        assert self.err.startswith("error: "), self.err
        assert self.err.count("error: ") == 1, self.err
        assert len(self.err.strip().splitlines()) == 1, self.err
        assert re.search(says, self.err, re.IGNORECASE), self.err


def command(*arguments: object, during: Callable[[], None] | None = None) -> Ended:
    """Run ``ray-train-geo ARGUMENTS``; meanwhile, ``during`` in this thread."""
    mark = uuid.uuid4().hex
    # Short, as Ray makes sockets in it.
    folder = tempfile.mkdtemp(prefix="wi-", dir="/tmp")
    process = subprocess.Popen(
        [sys.executable, "-m", "ray_train_geo", *map(str, arguments)],
        env={**os.environ, "RTG_TEST_MARK": mark, "TMPDIR": folder},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        if during is not None:
            during()
        out, err = process.communicate(timeout=TIMEOUT_S)
        assert processes_with(mark) == []
        assert [p.name for p in Path(folder).glob("rtg-*")] == []
    finally:
        process.kill()
        process.communicate()
        shutil.rmtree(folder, ignore_errors=True)
    return Ended(process.returncode, out, err)


def processes_with(mark: str) -> list[str]:
    """Processes that the command started and left, after a moment to end."""
    deadline = time.monotonic() + 10
    while True:
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get("RTG_TEST_MARK") == mark:
                    found.append(" ".join(process.cmdline()))
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.2)


@dataclass(frozen=True)
class Workplace:
    """A valid job that is then made wrong, and a finished run of its name to leave alone."""

    folder: Path
    job: Path

    @property
    def run(self) -> Path:
        return self.folder / "runs/finished"

    def train(self, *overrides: str, more: Sequence[str] = ()) -> Ended:
        return command("train", self.job, *(a for o in overrides for a in ("--set", o)), *more)


def make_workplace(folder: Path) -> Workplace:
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    (folder / "other.txt").write_text("the lazy dog sleeps under the quick brown fox. " * 40)
    (folder / "empty.txt").write_text("")
    (folder / "short.txt").write_text("short")
    (folder / "a-file").write_text("in the way")
    raw = {
        "model": {"layers": 4, "dim": 16, "heads": 2, "dropout": 0.1},
        "data": {"path": str(folder / "text.txt")},
        "training": {"steps": 4, "global_batch": 8, "seq_len": 16, "seed": 3},
        "parallelism": {"pipelines": 1, "stages": 2},
        "scaling": {"resources_per_worker": {"CPU": 0.5}},
        "checkpoint": {"interval": 1, "keep": 1},
        "run": {"name": "finished", "storage_path": str(folder / "runs")},
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(raw))
    job = parse_job(raw)
    data = open_dataset(job.data, 16)
    run = RunDirectory.create(job.run.directory)
    topology = Topology(tuple(Device(f"d{i}", "n") for i in range(2)))
    result = run_local(
        job,
        job.dims(data.vocab_size),
        plan(topology, job, data.vocab_size),
        processes=False,
        until=2,
        data_fingerprint=data.fingerprint,
    )
    for record in result.records:
        run.append_metrics({"step": record.step, "loss": record.loss, "time": record.time})
    run.append_event("start")
    run.write_text("job.yaml", job.to_yaml())
    return Workplace(folder, path)


def contents(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }
