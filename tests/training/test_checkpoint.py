"""Checkpoints: complete or invisible, and never resumed from when damaged."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest
import torch
import torch.distributed.checkpoint as dcp
from tmpfs import mounted

from ray_train_geo.errors import CheckpointError, StorageError
from ray_train_geo.training.checkpoint import (
    CheckpointPart,
    CheckpointStore,
    read_manifest,
    read_tensors,
    write_part,
)
from ray_train_geo.training.collector import CheckpointCollector
from ray_train_geo.training.manifest import Manifest

FIELDS = {"updates": 3, "loss_scale": 2.0, "good_steps": 1, "identity": {"seed": 7}}


def tensors_of(rank: int, step: int, elements: int = 200) -> dict[str, torch.Tensor]:
    return {
        f"model.layers.{2 * rank + i}.weight": torch.arange(float(elements)).view(2, -1) + step
        for i in range(2)
    }


def write(
    store: CheckpointStore, step: int, rank: int, generation: int = 1, elements: int = 200
) -> CheckpointPart:
    return write_part(store.writing(step, generation), rank, tensors_of(rank, step, elements))


def save(store: CheckpointStore, step: int, elements: int = 200) -> Manifest:
    parts = [write(store, step, rank, elements=elements) for rank in (0, 1)]
    return store.publish(step, 1, parts, FIELDS)


def check(store: CheckpointStore, step: int) -> None:
    """The checkpoint of ``step`` is found, and holds what was written."""
    location = store.location(step)
    manifest = read_manifest(location)
    assert (manifest.step, manifest.updates, manifest.identity) == (step, 3, {"seed": 7})
    expected = tensors_of(0, step) | tensors_of(1, step)
    found = {name: torch.empty_like(t) for name, t in expected.items()}
    read_tensors(location, manifest, found)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.fixture(params=["folder", "file", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(
        {
            "folder": str(tmp_path / "checkpoints"),
            "file": f"file://{tmp_path}/checkpoints",
            "memory": f"memory://{uuid.uuid4().hex}/checkpoints",
        }[request.param]
    )


@pytest.fixture
def local(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(str(tmp_path / "checkpoints"))


def test_what_was_written_is_read(store: CheckpointStore) -> None:
    assert store.newest() is None
    save(store, 5)
    save(store, 20)
    assert store.complete() == [5, 20]
    assert store.newest() == store.location(20)
    check(store, 5)
    check(store, 20)


def test_a_reader_takes_the_tensors_that_it_needs(store: CheckpointStore) -> None:
    manifest = save(store, 1)
    part = {"model.layers.2.weight": torch.empty(2, 100)}
    read_tensors(store.location(1), manifest, part)
    assert torch.equal(part["model.layers.2.weight"], tensors_of(1, 1)["model.layers.2.weight"])


def test_is_an_ordinary_dcp_checkpoint(local: CheckpointStore) -> None:
    save(local, 1)
    metadata = dcp.FileSystemReader(local.location(1)).read_metadata()
    assert set(metadata.state_dict_metadata) == set(tensors_of(0, 1) | tensors_of(1, 1))


def test_is_invisible_until_published(store: CheckpointStore) -> None:
    save(store, 1)
    parts = [write(store, 2, rank) for rank in (0, 1)]
    assert store.newest() == store.location(1)
    with pytest.raises(CheckpointError, match=r"no complete checkpoint at .*step-00000002"):
        read_manifest(store.location(2))
    store.publish(2, 1, parts, FIELDS)
    assert store.newest() == store.location(2)
    check(store, 2)


def test_a_missing_part_is_never_published(local: CheckpointStore) -> None:
    save(local, 1)
    parts = [write(local, 2, rank) for rank in (0, 1)]
    lost = next(Path(local.writing(2, 1)).glob("__1_*.distcp"))
    lost.unlink()
    with pytest.raises(StorageError, match=r"not shared by all nodes: __1_0\.distcp"):
        local.publish(2, 1, parts, FIELDS)
    assert local.newest() == local.location(1)


def test_unfinished_folders_are_cleaned_up_and_complete_ones_are_not(
    local: CheckpointStore,
) -> None:
    save(local, 1)
    write(local, 2, 0)
    write(local, 3, 0, generation=4)
    local.clean()
    assert sorted(p.name for p in Path(local.root).iterdir()) == ["step-00000001"]
    check(local, 1)


def test_the_same_step_again_replaces_it(store: CheckpointStore) -> None:
    """After a restart from before it, on other weights."""
    save(store, 4)
    parts = [write_part(store.writing(4, 2), 0, {"model.x": torch.ones(3)})]
    store.publish(4, 2, parts, FIELDS)
    manifest = read_manifest(store.location(4))
    assert set(manifest.checksums) == {"model.x"}
    assert store.complete() == [4]


def test_keeps_the_newest(store: CheckpointStore) -> None:
    for step in (1, 2, 3, 4):
        save(store, step)
    store.prune(2)
    assert store.complete() == [3, 4]
    check(store, 3)
    store.prune(5)
    assert store.complete() == [3, 4]


def test_pruning_leaves_what_is_being_written(local: CheckpointStore) -> None:
    save(local, 1)
    parts = [write(local, 2, rank) for rank in (0, 1)]
    local.prune(1)
    local.publish(2, 1, parts, FIELDS)
    check(local, 2)


def test_later_checkpoints_are_set_aside_not_lost(store: CheckpointStore) -> None:
    for step in (1, 2, 3):
        save(store, step)
    assert store.set_aside_after(1) == [2, 3]
    assert store.newest() == store.location(1)
    fs, path = fsspec.core.url_to_fs(store.root)
    aside = [p for p in fs.ls(path, detail=False) if "superseded" in p]
    assert len(aside) == 2
    assert all(fs.exists(f"{p}/manifest.json") for p in aside)


def test_a_probe_is_seen_where_storage_is_shared(store: CheckpointStore, tmp_path: Path) -> None:
    probe = store.probe()
    assert CheckpointStore(store.root).sees(probe)
    assert not CheckpointStore(str(tmp_path / "elsewhere")).sees(probe)
    store.remove_probe(probe)
    assert not store.sees(probe)


def test_free_space(store: CheckpointStore) -> None:
    store.remove_probe(store.probe())  # makes the folder
    free = store.free_bytes()
    assert free is None if "://" in store.root else free is not None and free > 0


def test_the_collector_publishes_with_the_last_part_and_prunes(local: CheckpointStore) -> None:
    collector = CheckpointCollector(local, 1, 2, {"seed": 7}, {"layers": 4}, keep=1)
    state = {"updates": 3, "loss_scale": 2.0, "good_steps": 1}
    first = {step: write(local, step, 0) for step in (1, 2)}
    assert collector.add(1, first[1], state) is None
    assert collector.add(2, first[2], state) is None, "parts of two steps may cross"
    assert local.newest() is None
    manifest = collector.add(1, write(local, 1, 1), state)
    assert manifest is not None
    assert manifest.plan == {"layers": 4}
    assert local.complete() == [1]
    collector.add(2, write(local, 2, 1), state)
    assert local.complete() == [2]
    check(local, 2)


# ------------------------------------------------------------------ damage


def flip(path: Path, at: int, bit: int = 3) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


def refused(store: CheckpointStore, step: int = 1) -> str:
    with pytest.raises(CheckpointError) as error:
        check(store, step)
    message = str(error.value)
    assert store.location(step) in message
    assert "\n" not in message
    assert "Traceback" not in message
    return message


def damage_found(store: CheckpointStore) -> str | None:
    try:
        check(store, 1)
    except CheckpointError as e:
        return str(e)
    return None


def test_a_flipped_byte_in_a_tensor_names_the_tensor(local: CheckpointStore) -> None:
    save(local, 1)
    path = Path(local.location(1), "__1_0.distcp")
    value = torch.tensor([[50.0 + 1, 51.0 + 1]]).numpy().tobytes()
    flip(path, path.read_bytes().index(value))
    assert "model.layers.2.weight is not what was written" in refused(local)


def test_any_flipped_byte_is_refused_or_harmless(
    local: CheckpointStore, capfd: pytest.CaptureFixture[str]
) -> None:
    """Some bytes of a .distcp file are padding; whatever is read is what was written."""
    save(local, 1)
    wrong = 0
    for path in sorted(Path(local.location(1)).iterdir()):
        whole = path.read_bytes()
        for at in range(0, len(whole), max(1, len(whole) // 25)):
            flip(path, at, bit=at % 8)
            message = damage_found(local)
            path.write_bytes(whole)
            if message is None:
                assert path.suffix == ".distcp", f"{path.name} changed at {at} unnoticed"
            else:
                wrong += 1
                assert path.name in message or "model.layers." in message, message
                assert "\n" not in message
    assert wrong > 50
    assert "Traceback" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata"])
def test_a_truncated_file_is_named(local: CheckpointStore, name: str) -> None:
    save(local, 1)
    path = Path(local.location(1), name)
    size = path.stat().st_size
    os.truncate(path, size // 2)
    assert f"{name} has {size // 2} bytes instead of {size}" in refused(local)


@pytest.mark.parametrize("name", ["__1_0.distcp", ".metadata"])
def test_a_missing_file_is_named(local: CheckpointStore, name: str) -> None:
    save(local, 1)
    Path(local.location(1), name).unlink()
    assert f"{name} is missing" in refused(local)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: "{}",
        lambda text: "null",
        lambda text: text.replace('"step": 1', '"step": 2'),
        lambda text: text.replace('"loss_scale": 2.0', '"loss_scale": 4.0'),
        lambda text: text.replace('"updates"', '"update"'),
        lambda text: text + "x",
    ],
)
def test_a_damaged_manifest_is_named(local: CheckpointStore, damage: Callable[[str], str]) -> None:
    save(local, 1)
    path = Path(local.location(1), "manifest.json")
    text = path.read_text()
    assert damage(text) != text
    path.write_text(damage(text))
    assert "manifest.json" in refused(local)


def test_a_tensor_of_another_model(local: CheckpointStore) -> None:
    manifest = save(local, 1)
    with pytest.raises(CheckpointError, match=r"has no 'model\.x'"):
        read_tensors(local.location(1), manifest, {"model.x": torch.empty(2)})
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.weight"):
        read_tensors(local.location(1), manifest, {"model.layers.0.weight": torch.empty(7)})


@pytest.mark.parametrize("location", ["nothing/here", "a-file/below", "foo://bucket/x"])
def test_where_there_can_be_no_checkpoint(tmp_path: Path, location: str) -> None:
    (tmp_path / "a-file").write_text("")
    where = location if "://" in location else str(tmp_path / location)
    with pytest.raises((CheckpointError, StorageError), match=location):
        read_manifest(where)


def test_the_manifest_reads_back() -> None:
    manifest = Manifest(
        step=3,
        updates=2,
        loss_scale=65536.0,
        good_steps=4,
        identity={"model": {"norm_eps": 1e-5}},
        checksums={"model.x": 1},
        files={"__0_0.distcp": 10},
        metadata_checksum=5,
        time=1.5e9 + 0.1,
        plan={"layers": 1},
    )
    assert Manifest.from_json(manifest.to_json()) == manifest
    changed = json.loads(manifest.to_json()) | {"step": 4}
    with pytest.raises(ValueError, match="not what was written"):
        Manifest.from_json(json.dumps(changed))


# ------------------------------------------------------------------ a writer that dies, a full disk


def _write_for_ever(root: str) -> None:
    store, step = CheckpointStore(root), 1
    while True:
        save(store, step)
        parts = [write(store, step + 1, rank, elements=12_000_000) for rank in (0, 1)]
        store.publish(step + 1, 1, parts, FIELDS)
        step += 1


def test_a_writer_killed_half_way_leaves_the_older_one(local: CheckpointStore) -> None:
    process = multiprocessing.get_context("spawn").Process(
        target=_write_for_ever, args=(local.root,)
    )
    process.start()
    assert process.pid is not None
    half = Path(local.writing(2, 1), "__0_0.distcp")
    deadline = time.monotonic() + 60
    while not (half.exists() and half.stat().st_size > 2**20):
        assert time.monotonic() < deadline
        assert process.is_alive()
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.join(30)
    assert half.exists(), "killed while it wrote"
    assert half.stat().st_size < 2 * 12_000_000 * 4
    assert local.complete() == [1]
    assert local.newest() == local.location(1)
    check(local, 1)
    local.clean()
    assert not half.exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    with mounted(tmp_path / "small", "size=2m") as folder:
        yield folder


def test_a_full_disk_leaves_the_older_one(small_disk: Path) -> None:
    store = CheckpointStore(str(small_disk))
    save(store, 1)
    with pytest.raises(StorageError, match="no space left on device; free some space"):
        write(store, 2, 0, elements=300_000)
    assert store.newest() == store.location(1)
    check(store, 1)
    store.clean()
    save(store, 2)
    check(store, 2)


def test_a_disk_that_fills_up_before_publishing_leaves_the_older_one(small_disk: Path) -> None:
    store = CheckpointStore(str(small_disk))
    save(store, 1)
    parts = [write(store, 2, rank) for rank in (0, 1)]
    with contextlib.suppress(OSError), (small_disk / "filler").open("wb") as filler:
        while True:
            filler.write(b"x" * 4096)
            filler.flush()
    with pytest.raises(StorageError, match="no space left on device"):
        store.publish(2, 1, parts, FIELDS)
    assert store.newest() == store.location(1)
    check(store, 1)
    with pytest.raises(StorageError, match="can't use checkpoint storage"):
        store.probe()
    (small_disk / "filler").unlink()
    store.publish(2, 1, parts, FIELDS)
    check(store, 2)


def test_storage_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = CheckpointStore(str(tmp_path / "file"))
    with pytest.raises(StorageError, match="can't use checkpoint storage"):
        store.probe()
    with pytest.raises(StorageError, match="can't write the checkpoint"):
        write(store, 1, 0)


def test_an_unknown_protocol() -> None:
    with pytest.raises(StorageError, match="can't open checkpoint storage foo://x"):
        CheckpointStore("foo://x")
