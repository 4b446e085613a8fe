"""Whole tables: what is kept, what is filled in, what is refused."""

from __future__ import annotations

import csv
from importlib import resources
from pathlib import Path

import pytest
from system_stand_in import Systems

from ray_train_geo.errors import DataError, StorageError
from ray_train_geo.systems import table as table_module
from ray_train_geo.systems.catalog import SYSTEMS
from ray_train_geo.systems.table import Table, read_table, simulate_table, write_table

HEADER = "scenario,system,model,global_batch"


@pytest.fixture
def systems(monkeypatch: pytest.MonkeyPatch) -> Systems:
    stand_in = Systems({"ours": 4.0, "dtfm_scheduled": 8.0, "dtfm_gpipe": 10.0})
    monkeypatch.setattr(table_module, "simulate", stand_in)
    return stand_in


def filled(tmp_path: Path, text: str) -> list[dict[str, str]]:
    """Through files, as the command does."""
    source, target = tmp_path / "in.csv", tmp_path / "out.csv"
    source.write_text(text, encoding="utf-8")
    write_table(simulate_table(read_table(source)), target)
    with target.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_columns_are_added_and_others_stay(tmp_path: Path, systems: Systems) -> None:
    rows = filled(
        tmp_path,
        "\ufeffnote," + HEADER + ",seconds\n"
        '"a, ""quoted""\nnote",worldwide,ours,gpt3-xl-24,1024, 44.1\n'
        "\n"
        "Größe,regional, dtfm_scheduled ,gpt3-xl-24,2048.0\n",
    )
    assert list(rows[0]) == ["note", *HEADER.split(","), "seconds", "step_s", "pflops", "error"]
    assert rows[0]["note"] == 'a, "quoted"\nnote'
    assert [row["seconds"] for row in rows] == [" 44.1", ""]
    assert [(row["step_s"], row["pflops"], row["error"]) for row in rows] == [
        ("4", "5", ""), ("8", "2.5", ""),
    ]  # fmt: skip
    assert rows[1]["system"] == " dtfm_scheduled "
    assert [asked["global_batch"] for asked in systems.asked] == [1024, 2048]


def test_a_row_that_cannot_be_done_says_why_in_one_line(tmp_path: Path, systems: Systems) -> None:
    rows = filled(
        tmp_path,
        f"{HEADER}\nworldwide,zero_s3,gpt3-xl-24,1024\nworldwide,ours,gpt9,1024\n"
        "worldwide,ours,gpt3-xl-24,many\nworldwide,,gpt3-xl-24,\n,ours,gpt3-xl-24,1024\n"
        "worldwide,ours,gpt3-xl-24,1024\n",
    )
    why = [row["error"] for row in rows]
    assert why[0] == "zero_s3 needs one node: give it less"
    assert why[1].startswith("unknown model 'gpt9'")
    assert why[2] == "global_batch is 'many': give a whole number"
    assert why[3] == "nothing in column system, global_batch"
    assert why[4].startswith("nowhere to simulate")
    assert [row["step_s"] for row in rows] == ["", "", "", "", "", "4"]


def test_equal_questions_are_asked_once(tmp_path: Path, systems: Systems) -> None:
    lines = [
        f"{i},worldwide,{name},gpt3-xl-24,1024"
        for i in range(50)
        for name in ("ours", "torch_pipe")
    ]
    rows = filled(tmp_path, "\n".join([f"run,{HEADER}", *lines]))
    assert len(rows) == 100
    assert [asked["system"] for asked in systems.asked] == ["ours", "torch_pipe"]
    assert {row["error"] for row in rows[1::2]} == {"torch_pipe needs one node: give it less"}


def test_columns_called_like_settings_are_passed_on(tmp_path: Path, systems: Systems) -> None:
    settings = SYSTEMS["dtfm_gpipe"].settings
    assert "stages" in settings
    filled(
        tmp_path,
        f"{HEADER},stages,colour\nworldwide,dtfm_gpipe,gpt3-xl-24,64,12.0,red\n"
        "worldwide,dtfm_gpipe,gpt3-xl-24,64,,\n",
    )
    assert [asked["settings"] for asked in systems.asked] == [{"stages": "12"}, {}]


def test_single_pipelines_say_their_network(tmp_path: Path, systems: Systems) -> None:
    rows = filled(
        tmp_path,
        "system,model,global_batch,devices,latency_ms,bandwidth_gbps\n"
        "dtfm_gpipe,gpt3-xl-24,64,12,50,1\ndtfm_gpipe,gpt3-xl-24,64,12,,1\n"
        "dtfm_gpipe,gpt3-xl-24,64,12,x,1\n",
    )
    where = systems.asked[0]["topology"]
    assert len(where.devices) == 12
    assert where.link(*where.devices[:2]).latency_s == pytest.approx(0.05)
    assert [row["error"].split(":")[0] for row in rows] == [
        "", "latency_ms missing", "latency_ms is 'x'",
    ]  # fmt: skip


def test_the_published_file_as_it_is(tmp_path: Path, systems: Systems) -> None:
    rows = filled(
        tmp_path,
        "source_file,section,case,system,setting,model,layers,batch,seed,seconds\n"
        "a.txt,Case 5,case5,dtfm_scheduled,L32 B1024,GPT3-XL,32,1024,,44.1\n",
    )
    assert rows[0]["step_s"] == "8"
    assert rows[0]["case"] == "case5"
    assert "scenario" not in rows[0]
    assert systems.asked[0]["scenario"] == "worldwide"
    assert systems.asked[0]["model"] == "gpt3-xl-32"


def test_all_of_the_published_file_can_be_answered() -> None:
    path = resources.files("ray_train_geo.systems") / "data" / "dtfm_iteration_seconds.csv"
    with resources.as_file(path) as file:
        published = read_table(file)
    # The others are answered as well, in half a minute: those with placements to be found.
    slow = ("dtfm", "megatron_p8_random")
    quick = [row for row in published.rows if not row["system"].startswith(slow)]
    answered = simulate_table(Table(published.columns, tuple(quick))).rows
    assert len(answered) > 50
    for row in answered:
        assert row["error"] == ""
        assert 0.25 < float(row["step_s"]) / float(row["seconds"]) < 4, row


def test_answers_can_be_asked_again(tmp_path: Path, systems: Systems) -> None:
    text = f"step_s,{HEADER},error\n99,worldwide,ours,gpt3-xl-24,1024,old\n"
    rows = filled(tmp_path, text)
    assert list(rows[0]) == [*HEADER.split(","), "step_s", "pflops", "error"]
    assert (rows[0]["step_s"], rows[0]["error"]) == ("4", "")


def test_progress_counts_rows(systems: Systems) -> None:
    row = dict(zip(HEADER.split(","), ["worldwide", "ours", "gpt3-xl-24", "8"], strict=True))
    seen: list[int] = []
    simulate_table(Table(tuple(row), (row,) * 3), seen.append)
    assert seen == [1, 2, 3]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "has no column system, model, scenario .or case., global_batch .or batch."),
        ("scenario,system,model\nworldwide,ours,x\n", "no column global_batch .or batch.; its hea"),
        (f"{HEADER},model\n", "more than one column is called 'model'"),
        (f"{HEADER}\n", "no rows below its header"),
        (f"{HEADER}\n\n , ,\n", "no rows below its header"),
        (f"{HEADER}\na,b,c,1\n1,2,3,4,5\n", "line 3: 5 cells, but the header names 4 columns"),
        (f'{HEADER}\n"open\n', "line 2: no CSV: unexpected end of data"),
    ],
)
def test_tables_that_are_refused(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "in.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=says):
        read_table(path)


def test_tables_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        read_table(tmp_path / "none.csv")
    with pytest.raises(DataError, match="Is a directory"):
        read_table(tmp_path)
    (tmp_path / "binary.csv").write_bytes(b"\x89PNG\xff\x00")
    with pytest.raises(DataError, match="not UTF-8 text"):
        read_table(tmp_path / "binary.csv")
    with pytest.raises(StorageError, match="Is a directory"):
        write_table(Table(("a",), ()), tmp_path)
