"""``ray-train-geo logs``: its tables, its JSON, and what it refuses."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from commands import invoking, lightly

DATA = Path(__file__).parent / "data"
MEGATRON = DATA / "logs/megatron-52b.log"
STOPPED = DATA / "logs/megatron-207b-stopped.log"
GPT2 = DATA / "measurements/bigscience_gpt2.csv"
CHECKPOINT = DATA / "measurements/bigscience_checkpoint.csv"


invoke = invoking("logs")


@pytest.fixture
def failed(tmp_path: Path) -> Path:
    path = tmp_path / "oom.log"
    path.write_text("loading\nRuntimeError: CUDA out of memory. Tried to allocate 2 GiB\n")
    return path


def test_json_through_the_real_entry_point(failed: Path) -> None:
    """What other tools read; and neither torch nor Ray is needed for it."""
    printed = lightly("logs", MEGATRON, failed, "not/here.log", "--json")
    runs: list[dict[str, Any]] = json.loads(printed)["runs"]
    assert [run["status"] for run in runs] == ["ok", "failed", "error"]
    assert runs[0]["tflops_per_gpu"] == pytest.approx(52.82, abs=0.01)
    assert runs[0]["step_s"] == pytest.approx(128.96, abs=0.01)
    assert runs[1]["reason"].startswith("out of memory: CUDA out of memory")
    assert runs[2]["reason"] == "can't read not/here.log: no such file or directory"


@pytest.mark.parametrize("columns", [80, 120])
def test_a_row_for_each_log(failed: Path, columns: int) -> None:
    lines = invoke(MEGATRON, STOPPED, failed, columns=columns).stdout.splitlines()
    for word in ("log", "status", "step s", "median", "tokens/s", "TFLOPs"):
        assert word in lines[0]
    assert ("GPUs" in lines[0]) == (columns == 120)
    table, remarks = lines[:5], lines[5:]
    assert max(map(len, table)) <= columns
    assert table[2].split()[:3] == ["megatron-52b.log", "ok", "2"]
    assert "52.82" in table[2]
    assert table[4].split()[:4] == ["oom.log", "failed", "0", "-"]
    assert remarks == [
        "megatron-207b-stopped.log: cancelled by Slurm due to time limit",
        "oom.log: out of memory: CUDA out of memory. Tried to allocate 2 GiB",
    ]


def test_options_go_before_the_log() -> None:
    options = ("--size-b", 26, "--seq", 2048, "--gpus", 32, "--global-batch", 512, "--skip", 2)
    [run] = json.loads(invoke(MEGATRON, *options, "--no-recompute", "--json").stdout)["runs"]
    assert (run["timed"], run["skipped"], run["recompute"]) == (1, 2, False)
    assert run["tflops_per_gpu"] == pytest.approx(26 * 6 * 2048 * 512 / (128.8915 * 32 * 1e3))
    assert run["tokens_per_s"] == pytest.approx(2048 * 512 / 128.8915)


def test_logs_of_one_name_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a temporary folder's own name may be too long for a table
    for folder in ("a", "b"):
        Path(folder).mkdir()
        Path(folder, "x.log").write_text(MEGATRON.read_text())
    out = invoke("a/x.log", "b/x.log", columns=140).stdout
    assert "a/x.log" in out
    assert "b/x.log" in out


def test_a_table_is_recomputed(tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    found = invoke("--table", GPT2, "--out", out, columns=120)
    assert "row 31 contradicts itself: 137 s make 49.75 TFLOPs, but tflops is 46.7" in found.stdout
    assert "row 66: no seconds: OOM" in found.stdout
    assert max(map(len, found.stdout.splitlines())) <= 120
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 85
    assert float(rows[0]["tflops_formula"]) == pytest.approx(23.24, abs=0.01)
    assert rows[65]["error"] == "no seconds: OOM"


def test_a_table_as_json() -> None:
    rows = json.loads(invoke("--table", CHECKPOINT, "--json").stdout)["rows"]
    assert len(rows) == 9
    assert rows[1]["gb_per_s"] == pytest.approx(728 / 19.29814)
    assert "GB/s/node" in invoke("--table", CHECKPOINT).stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "no log is given"),
        (("not/here.log",), "can't read not/here.log: no such file"),
        (("not/here.log", "/dev/null"), "none of the 2 logs can be read; the first: can't read"),
        ((MEGATRON, "--table", GPT2), "either logs or --table, not both"),
        ((MEGATRON, "--out", "x.csv"), "--out is for --table"),
        (("--table", GPT2, "--gpus", 4), "a table has sizes, batches and GPUs of its own"),
        (("--table", "not/here.csv"), "can't read the table not/here.csv: no such file"),
        (("--table", MEGATRON), "has no column size_b"),
        (("--table", GPT2, "--out", "no/such/folder.csv"), "can't write the table"),
        ((MEGATRON, "--gpus", 0), "gpus must be a positive number"),
        ((MEGATRON, "--size-b", "nan"), "size_b must be a positive number"),
        ((MEGATRON, "--skip", -1), "skip must be 0 or more"),
    ],
)
def test_wrong_input_is_one_message(arguments: tuple[object, ...], says: str) -> None:
    result = invoke(*arguments, code=2)
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.strip().splitlines()) == 1
    assert says in result.stderr
    assert result.stdout == ""
    told = json.loads(invoke(*arguments, "--json", code=2).stdout)
    assert says in told["error"]["message"]


def test_a_table_of_which_nothing_follows(tmp_path: Path) -> None:
    path = tmp_path / "in.csv"
    path.write_text("size_b,gpus,gbs,seq,seconds\n52,64,1024,1024,\n")
    assert "no row of" in invoke("--table", path, code=2).stderr
