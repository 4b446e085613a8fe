"""Wrong input through the real command line: one clear message, an exit code, and nothing left.

Cases that fail before Ray starts run two at a time in the background; those that need Ray share
one cluster, which stands for one that a user has.
"""

from __future__ import annotations

import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import ray
import yaml
from tmpfs import mounted
from typer.testing import CliRunner
from workplace import (
    TIMEOUT_S,
    Ended,
    Workplace,
    command,
    contents,
    make_workplace,
)

from ray_train_geo.cli import app
from ray_train_geo.connection import connected
from ray_train_geo.observe.run_directory import RunDirectory
from ray_train_geo.spec import parse_job
from ray_train_geo.training.checkpoint import CheckpointStore, read_manifest


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return make_workplace(tmp_path_factory.mktemp("wrong"))


# ------------------------------------------------------------------ refused before Ray starts

OVERRIDES = {
    "misspelt field": (
        ["training.stepz=3"],
        r"training\.stepz: no such field; did you mean 'steps'\?",
    ),
    "batch not divisible": (
        ["training.microbatch=3"],
        r"global_batch \(8\) is not divisible by microbatch \(3\)",
    ),
    "more stages than layers": (
        ["parallelism.stages=5"],
        r"parallelism\.stages \(5\) is more than the model's layers \(4\)",
    ),
    "unknown model": (["model.name=gpt4"], r"unknown model name 'gpt4'"),
    "missing data path": (["data.path={folder}/no.txt"], r"data\.path .*/no\.txt does not exist"),
    "empty data": (["data.path={folder}/empty.txt"], r"empty\.txt is empty"),
    "data shorter than a sequence": (
        ["data.path={folder}/short.txt"],
        r"short\.txt has only 6 tokens, but one sample needs 17",
    ),
}
# Less common ones, through the same command in this process, which saves its imports.
IN_PROCESS = {
    "unknown tokenizer": (["data.tokenizer=bert"], r"unknown tokenizer 'bert'"),
    "vocabulary too small": (["model.vocab_size=100"], r"needs a vocabulary of 257 tokens"),
    "a file in the way of storage": (
        ["run.storage_path={folder}/a-file"],
        r"can't use the run directory .*a-file/finished: not a directory",
    ),
    "a file in the way of the run": (
        ["run.storage_path={folder}", "run.name=a-file"],
        r"can't use the run directory .*/a-file: ",
    ),
    "unknown checkpoint storage": (
        ["checkpoint.storage_path=foo://x", "run.name=foo"],
        r"can't open checkpoint storage foo://x/foo",
    ),
    "topology that is not there": (
        ["scaling.topology=/nowhere.yaml"],
        r"can't read the topology /nowhere\.yaml",
    ),
    "weights that are not there": (
        ["model.init_from={folder}/nowhere"],
        r"no complete checkpoint at .*/nowhere: nothing is there",
    ),
}
RESUMES = {
    "nothing to resume": (["run.name=new"], r"nothing to resume: .*runs/new/checkpoints"),
    "resume with another model": (["model.dim=32"], r"another model: its dim is 16"),
    "resume with another seed": (["training.seed=4"], r"made with training\.seed 3.* has 4"),
    "resume with other data": (["data.path={folder}/other.txt"], r"made with other data"),
}
FILES = {
    "no such file": (None, r"can't read the job spec .*: no such file"),
    "bad YAML": ("model: [1, 2", r"bad_YAML\.yaml is not valid YAML"),
    "not a mapping": ("- model\n- data\n", r"a job spec is a mapping"),
    "nothing in it": ("", r"a job spec is a mapping"),
}


@pytest.fixture(scope="module")
def background(place: Workplace) -> Iterator[dict[str, Future[Ended]]]:
    """All commands that fail before Ray starts, two at a time."""
    jobs: dict[str, Callable[[], Ended]] = {}
    for name, (overrides, _) in OVERRIDES.items():
        filled = [o.format(folder=place.folder) if "{folder}" in o else o for o in overrides]
        jobs[name] = partial(place.train, *filled)
    for name, (overrides, _) in RESUMES.items():
        filled = [o.format(folder=place.folder) for o in overrides]
        jobs[name] = partial(place.train, *filled, more=["--resume"])
    for name, (content, _) in FILES.items():
        path = place.folder / f"{name.replace(' ', '_')}.yaml"
        if content is not None:
            path.write_text(content)
        jobs[name] = partial(command, "train", path)
    jobs["unreachable"] = lambda: place.train(
        "run.name=unreachable", more=["--address", f"127.0.0.1:{closed_port()}"]
    )
    jobs["no head"] = lambda: place.train("run.name=unreachable", more=["--address", not_a_head()])
    before = contents(place.run)
    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(job) for name, job in jobs.items()}
    assert contents(place.run) == before, "the finished run was left alone"


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def not_a_head() -> str:
    """The address of something that answers, but not as Ray does."""
    server = socket.create_server(("", 0))

    def answer() -> None:
        connection, _ = server.accept()
        with server, connection:
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    threading.Thread(target=answer, daemon=True).start()
    return f"127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("name", OVERRIDES)
def test_a_wrong_job(background: dict[str, Future[Ended]], name: str) -> None:
    background[name].result().refuses(OVERRIDES[name][1])


@pytest.mark.parametrize("name", IN_PROCESS)
def test_a_wrong_job_in_this_process(place: Workplace, name: str) -> None:
    overrides, says = IN_PROCESS[name]
    filled = [o.format(folder=place.folder) for o in overrides]
    arguments = ["train", str(place.job), *(a for o in filled for a in ("--set", o))]
    done = CliRunner().invoke(app, arguments)
    Ended(done.exit_code, done.stdout, done.stderr).refuses(says)


@pytest.mark.parametrize("name", RESUMES)
def test_a_wrong_resume(background: dict[str, Future[Ended]], name: str) -> None:
    background[name].result().refuses(RESUMES[name][1])


@pytest.mark.parametrize("name", FILES)
def test_a_wrong_file(background: dict[str, Future[Ended]], name: str) -> None:
    background[name].result().refuses(FILES[name][1])


def test_an_unreachable_address(background: dict[str, Future[Ended]]) -> None:
    background["unreachable"].result().refuses(
        r"can't reach Ray at 127\.0\.0\.1:\d+: connection refused.*--address"
    )


def test_an_address_of_something_else(background: dict[str, Future[Ended]]) -> None:
    background["no head"].result().refuses(r"what answers there is no Ray head")


# ------------------------------------------------------------------ disks


def fill(folder: Path) -> Path:
    """Leave no byte free."""
    path = folder / "filler"
    for size in (65536, 4096, 1):
        with suppress(OSError), path.open("ab", buffering=0) as filler:
            while filler.write(b"x" * size):
                pass
    return path


def test_a_read_only_disk(place: Workplace) -> None:
    with mounted(place.folder / "read-only", "size=1m,ro") as disk:
        place.train(f"run.storage_path={disk}").refuses(
            r"can't use the run directory .*: read-only file system"
        )


def test_a_disk_that_is_full_from_the_start(place: Workplace) -> None:
    with mounted(place.folder / "full", "size=64k") as disk:
        fill(disk)
        place.train(f"run.storage_path={disk}").refuses(r"no space left on device; free some")


# ------------------------------------------------------------------ refused by Ray, or at work


@pytest.fixture(scope="module")
def cluster(place: Workplace) -> Iterator[str]:
    """The address of a Ray cluster with four CPUs, started once."""
    raw = yaml.safe_load(place.job.read_text())
    raw["parallelism"] = {"pipelines": 4, "stages": 2}
    with connected(parse_job(raw), "local"):
        yield ray.get_runtime_context().gcs_address


NO_DEVICES = {
    "too few devices": (
        ["parallelism=auto", "scaling.min_devices=1000"],
        r"no free devices: the job needs 1000",
    ),
    "unknown resource": (
        ["scaling.resources_per_worker={weird: 1}"],
        r"no free devices: the job needs 2 \(of 1 weird each\), Ray has 0",
    ),
    "no such labels": (
        ["scaling.label_selector={ray.io/market-type: spot}"],
        r"1 nodes? lacks? the labels",
    ),
    "model too large": (
        [
            "model={name: gpt3-13b}",
            "scaling.memory_per_worker_bytes=1000000",
        ],
        r"memory",
    ),
}


@pytest.fixture(scope="module")
def on_the_cluster(place: Workplace, cluster: str) -> Iterator[dict[str, Future[Ended]]]:
    before = contents(place.run)
    with ThreadPoolExecutor(2) as pool:
        yield {
            name: pool.submit(
                place.train,
                *overrides,
                f"run.name={name.replace(' ', '-')}",
                more=["--address", cluster],
            )
            for name, (overrides, _) in NO_DEVICES.items()
        }
    assert contents(place.run) == before


@pytest.mark.ray
@pytest.mark.parametrize("name", NO_DEVICES)
def test_no_devices_for_it(on_the_cluster: dict[str, Future[Ended]], name: str) -> None:
    on_the_cluster[name].result().refuses(NO_DEVICES[name][1])


@pytest.mark.ray
def test_a_damaged_checkpoint(place: Workplace, cluster: str) -> None:
    """Only a worker, which reads the tensors, can see it."""
    damaged = place.folder / "runs/damaged"
    shutil.copytree(place.run, damaged)
    location = CheckpointStore(str(damaged / "checkpoints")).newest()
    assert location is not None
    part = max(Path(location).glob("*.distcp"), key=lambda p: p.stat().st_size)
    data = bytearray(part.read_bytes())
    for at in range(200, len(data), 300):
        data[at] ^= 0xFF
    part.write_bytes(data)
    before = contents(damaged / "checkpoints")
    metrics = (damaged / "metrics.jsonl").read_bytes()
    place.train("run.name=damaged", more=["--resume", "--address", cluster]).refuses(
        r"checkpoint .*damaged/checkpoints/step-00000002 (is corrupt|can't be read): \w+\."
    )
    assert contents(damaged / "checkpoints") == before
    assert (damaged / "metrics.jsonl").read_bytes() == metrics


@pytest.mark.ray
def test_a_disk_too_small_for_the_checkpoints(place: Workplace, cluster: str) -> None:
    with mounted(place.folder / "small", "size=300k") as disk:
        place.train(f"run.storage_path={disk}", more=["--address", cluster]).refuses(
            r"checkpoint storage .* has .* MiB free, but 1 checkpoints .* need"
        )


@pytest.mark.ray
def test_a_disk_that_fills_up_while_training(place: Workplace, cluster: str) -> None:
    """The run ends with the reason; its newest checkpoint is complete."""
    with mounted(place.folder / "filling", "size=4m") as disk:
        store = CheckpointStore(str(disk / "finished/checkpoints"))

        def fill_once_it_trains() -> None:
            deadline = time.monotonic() + TIMEOUT_S
            while store.newest() is None and time.monotonic() < deadline:
                time.sleep(0.1)
            fill(disk)

        storage = f"run.storage_path={disk}"
        arguments = ["train", place.job, "--address", cluster, "--set", storage]
        long = ["--set", "training.steps=1000000", "--set", "checkpoint.interval=3"]
        command(*arguments, *long, during=fill_once_it_trains).refuses("no space left on device")
        location = store.newest()
        assert location is not None
        saved = read_manifest(location).step
        assert saved % 3 == 0
        assert CheckpointStore(str(disk / "finished/checkpoints")).complete() == [saved]
        steps = [r["step"] for r in RunDirectory.open(disk / "finished").metrics()]
        assert steps == list(range(1, len(steps) + 1))
        assert len(steps) >= saved


@pytest.mark.ray
def test_a_loss_that_is_no_number_on_a_cluster_of_our_own(place: Workplace) -> None:
    """The run had started: exit code 1.  The Ray that it started is gone with it."""
    earlier = contents(place.run)
    ended = place.train("training.lr=1e30", "training.warmup_steps=0")
    ended.refuses(
        r"step \d+: loss .*; nothing of this step was applied\. Lower training\.lr",
        code=1,
    )
    aside = place.run.with_name("finished.1")
    assert contents(aside) == earlier, "the earlier run of this name was moved aside, whole"
    events = {e["event"]: e for e in RunDirectory.open(place.run).events()}
    assert events["error"]["kind"] == "DivergedError"
    assert events["finish"]["phase"] == "failed"
    shutil.rmtree(place.run)
    aside.rename(place.run)
