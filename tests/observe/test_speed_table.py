"""Published tables recomputed, and their contradictions listed."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from ray_train_geo.errors import InputError, StorageError
from ray_train_geo.observe.speed_table import (
    contradictions,
    read_table,
    recompute_table,
    write_table,
)

MEASUREMENTS = Path(__file__).parents[1] / "data/measurements"
GPT2 = MEASUREMENTS / "bigscience_gpt2.csv"
CHECKPOINT = MEASUREMENTS / "bigscience_checkpoint.csv"

GOOD = {
    "size_b": "52", "gpus": "64", "tp": "4", "pp": "16", "dp": "1", "mbs": "4", "gas": "256",
    "gbs": "1024", "seq": "1024", "seconds": "129", "tflops": "52.8", "status": "ok",
}  # fmt: skip

TFLOPS = {31, 36, 68}
"""Rows whose TFLOPs are not those of their seconds."""


def test_every_row_of_bigsciences_table_is_recomputed_within_rounding() -> None:
    rows = recompute_table(read_table(GPT2))
    done = [(number, row) for number, row in enumerate(rows, 1) if row["error"] is None]
    assert len(rows) == 85
    assert len(done) == 83
    for number, row in done:
        # One decimal, of seconds that were mostly rounded, or cut, to whole ones.
        off = 0.5 / float(row["seconds"]) if row["seconds"].endswith(".0") else 0.001
        slack = 0.05 + off * row["tflops_formula"]
        fits = abs(float(row["tflops"]) - row["tflops_formula"]) <= slack
        assert fits == (number not in TFLOPS), row
        assert row["tflops_formula"] == pytest.approx(float(row["tflops_recomputed"]), abs=0.006)


def test_rows_that_ran_out_of_memory_say_so() -> None:
    rows = recompute_table(read_table(GPT2))
    errors = {number: row["error"] for number, row in enumerate(rows, 1) if row["error"]}
    assert errors == {66: "no seconds: OOM", 85: "no seconds: OOM"}


def test_the_rows_that_contradict_themselves_are_pinned() -> None:
    found = contradictions(read_table(GPT2))
    devices = {11, 12, 13, 16, 17, 30, 45}
    batch = {5, 32, 33}
    assert {c.row for c in found if "but gpus is" in c.reason} == devices
    assert {c.row for c in found if "but gbs is" in c.reason} == batch
    assert {c.row for c in found if "but tflops is" in c.reason} == TFLOPS
    assert len(found) == len(devices | batch | TFLOPS)
    assert found[0].reason == "mbs x gas x dp is 1 x 4 x 4 = 16, but gbs is 4"
    assert found[-1].reason == "79 s make 43.14 TFLOPs, but tflops is 38.3"


def test_checkpoints_of_bigscience() -> None:
    rows = recompute_table(read_table(CHECKPOINT))
    saved = [row for row in rows if row["error"] is None]
    sizes = [25.0, 52.0, 52.0, 52.0, 97.0, 97.0, 181.0]
    assert [float(row["size_b"]) for row in saved] == sizes
    assert saved[0]["checkpoint_gb"] == pytest.approx(350)
    assert saved[0]["gb_per_s"] == pytest.approx(350 / 17.96068)
    assert saved[0]["gb_per_s_per_node"] == pytest.approx(350 / 17.96068 / 8)
    assert max(row["gb_per_s"] for row in saved) == pytest.approx(2534 / 19.49531)
    assert [row["error"][:34] for row in rows if row["error"]] == [
        "not a checkpoint but '1-node itera"
    ] * 2


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"pp": "", "gas": "", "tp": "64", "mbs": "1024"}, None),
        ({"tflops": "", "tp": "", "mbs": ""}, None),
        ({"seconds": "129.0"}, None),
        ({"seconds": "129.1"}, None),
        ({"seconds": "129.9"}, "129.9 s make 52.47 TFLOPs, but tflops is 52.8"),
        ({"recompute": "no"}, "129 s make 39.63 TFLOPs, but tflops is 52.8"),
        ({"recompute": "no", "tflops": "39.6"}, None),
        ({"gpus": "128", "tflops": "26.4"}, "tp x pp x dp is 4 x 16 x 1 = 64, but gpus is 128"),
        ({"dp": "2", "pp": "8"}, "mbs x gas x dp is 4 x 256 x 2 = 2048, but gbs is 1024"),
        ({"size_b": "0"}, None),  # an error of the row, nothing to contradict
    ],
)
def test_contradictions_of_one_row(changes: dict[str, str], reason: str | None) -> None:
    found = [c.reason for c in contradictions([GOOD | changes])]
    assert found == ([] if reason is None else [reason])


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"seconds": ""}, "no seconds"),
        ({"seconds": "", "status": "OOM"}, "no seconds: OOM"),
        ({"seconds": "fast"}, "seconds must be a positive number, but is 'fast'"),
        ({"seconds": "nan"}, "seconds must be a positive number, but is 'nan'"),
        ({"seconds": "-3"}, "seconds must be a positive number, but is '-3'"),
        ({"gpus": "6.5"}, "gpus must be a whole number, but is '6.5'"),
        ({"gbs": ""}, "no gbs"),
        ({"recompute": "maybe"}, "recompute must be yes or no, but is 'maybe'"),
    ],
)
def test_what_nothing_follows_from(changes: dict[str, str], error: str) -> None:
    [row] = recompute_table([GOOD | changes])
    assert row["error"] == error
    assert "tflops_formula" not in row
    assert row["size_b"] == "52"


def test_a_row_keeps_its_columns_and_gets_more() -> None:
    [row] = recompute_table([GOOD | {"mine": "x"}])
    assert row["mine"] == "x"
    assert row["seconds"] == "129"
    assert row["tokens_per_s"] == pytest.approx(1024 * 1024 / 129)
    assert row["contradictions"] == []


def test_a_written_table_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    bad = GOOD | {"gpus": "128", "gbs": "1000", "seconds": "140"}
    rows = recompute_table([GOOD, bad, GOOD | {"seconds": ""}])
    write_table(path, rows)
    again = read_table(path)
    assert [r["size_b"] for r in again] == ["52"] * 3
    assert again[1]["contradictions"].count("; ") == 2
    assert again[2]["error"] == "no seconds"
    assert again[2]["tflops_formula"] == ""
    assert float(again[0]["tflops_formula"]) == pytest.approx(52.84, abs=0.01)
    with pytest.raises(StorageError, match="can't write the table"):
        write_table(tmp_path / "no" / "out.csv", rows)


def test_a_data_frames_index_does_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "in.csv"
    path.write_text(",size_b,gpus,gbs,seq,seconds\n0,52,64,1024,1024,129\n")
    [row] = recompute_table(read_table(path))
    assert row["error"] is None


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "no such file"),
        (b"", "no column size_b, gpus, gbs, seq, seconds: a table of iterations needs"),
        (b"a,b\n1,2\n", "no column size_b"),
        (b"size_b,gpus,gbs,seq,seconds\n", "a header and no rows"),
        (b"size_b,gpus,gbs,seq,seconds\n1,2,3,4,5,6\n", "row 1: more fields than the header"),
        (b"\xff\xfe\x00", "not a CSV file"),
        (b'size_b,gpus,gbs,seq,seconds\n"1', "not a CSV file"),
    ],
)
def test_what_is_no_table(tmp_path: Path, content: bytes | None, says: str) -> None:
    path = tmp_path / "in.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=says):
        read_table(path)


def test_the_table_is_a_plain_copy() -> None:
    """Blank fields are kept blank: they are not zeros."""
    with GPT2.open() as file:
        assert list(csv.DictReader(file)) == read_table(GPT2)
