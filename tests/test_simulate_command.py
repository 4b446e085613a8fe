"""``ray-train-geo simulate``: JSON, text, traces, tables, and what it refuses."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from commands import invoking, lightly, strict

from ray_train_geo import simulate
from ray_train_geo.systems.catalog import SYSTEMS

WORK = ("--model", "gpt3-xl-24", "--global-batch", 1024)
WORLD = ("--scenario", "worldwide", *WORK)
NETWORK = ("--devices", 12, "--latency-ms", 10, "--bandwidth-gbps", 1)
PIPELINE = (*NETWORK, "--model", "gpt3-xl-24", "--global-batch", 64, "--system", "dtfm_gpipe")


invoke = invoking("simulate")


def test_json_through_the_real_entry_point() -> None:
    """What other tools read; and neither torch nor Ray nor matplotlib is needed for it."""
    printed = lightly("simulate", *WORLD, "--system", "dtfm_random", "--json")
    assert len(printed.splitlines()) == 1
    found = strict(printed)
    assert list(found)[:4] == ["step_s", "pflops", "efficiency", "breakdown"]
    assert sum(found["breakdown"].values()) == pytest.approx(found["step_s"])
    assert found["pflops"] == pytest.approx(found["pflop"] / found["step_s"])
    assert 0 < found["efficiency"] < 1
    assert found["devices"] == 64
    assert (found["system"], found["scenario"]) == ("dtfm_random", "worldwide")


def test_the_python_function_finds_the_same() -> None:
    found = strict(invoke(*WORLD, "--system", "megatron_p8", "--json").stdout)
    step = simulate("megatron_p8", "gpt3-xl-24", 1024, scenario="worldwide")
    assert found["step_s"] == step.step_s
    assert found["breakdown"] == step.breakdown


def test_ours_is_planned_on_so_many_equal_devices() -> None:
    network = ("--devices", 4, "--latency-ms", 1, "--bandwidth-gbps", 10)
    found = strict(invoke(*network, *WORK, "--system", "ours", "--json").stdout)
    assert found["devices"] == 4
    assert found["step_s"] > found["breakdown"]["compute"] > 0


def test_published_names_are_understood() -> None:
    arguments = ("--scenario", "case5", "--model", "GPT3-XL-24", "--global-batch", 1024)
    assert (
        invoke(*arguments, "--system", "megatron_p8").stdout
        == invoke(*WORLD, "--system", "megatron_p8").stdout
    )


@pytest.mark.parametrize("columns", [80, 120])
def test_text(columns: int) -> None:
    text = invoke(*WORLD, "--system", "dtfm_random", columns=columns).stdout
    assert max(map(len, text.splitlines())) <= columns
    for word in ("dtfm_random on worldwide, 64 devices", "PFLOPS", "per million tokens",
                 "where it goes", "1024 sequences a step"):  # fmt: skip
        assert word in text


def test_one_pipeline_on_a_network_and_its_trace(tmp_path: Path) -> None:
    path = tmp_path / "step.json"
    arguments = (*PIPELINE, "--stages", 12, "--replicas", 1, "--json")
    found = strict(invoke(*arguments, "--trace", path).stdout)
    assert found["devices"] == 12
    assert found["scenario"] is None
    events = strict(path.read_text())["traceEvents"]
    actions = [e for e in events if e["ph"] == "X" and e["cat"] in ("forward", "backward")]
    assert {e["pid"] for e in actions} == set(range(12))
    assert len(actions) == 2 * 12 * 64
    last_us = max(e["ts"] + e["dur"] for e in events if e["ph"] == "X")
    assert last_us <= found["step_s"] * 1e6 + 12
    slow = strict(invoke(*arguments, "--set", "microbatch=2").stdout)
    assert slow["step_s"] != found["step_s"]


def test_all_systems_and_their_settings_are_listed() -> None:
    listed = strict(invoke("--list", "--json").stdout)["systems"]
    assert list(listed) == list(SYSTEMS)
    text = invoke("--list").stdout
    for name, known in listed.items():
        assert name in text
        assert known["description"]
        assert list(known["settings"]) == list(SYSTEMS[name].settings)


def test_a_table(tmp_path: Path) -> None:
    source, target = tmp_path / "in.csv", tmp_path / "out.csv"
    source.write_text(
        "scenario,system,model,global_batch,measured\n"
        "worldwide,dtfm_random,gpt3-xl-24,1024,91\n"
        "worldwide,dtfm_random,gpt3-xl-24,1024,92\n"
        "case5,megatron_p8,GPT3-XL-24,1024,\n"
        "worldwide,nobody,gpt3-xl-24,1024,\n"
        "worldwide,megatron_p8,gpt3-xl-24,1023,\n"
    )
    result = invoke("--table", source, "--out", target, "--json")
    assert strict(result.stdout) == {"rows": 5, "done": 3, "refused": 2, "out": str(target)}
    with target.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["measured"] for row in rows] == ["91", "92", "", "", ""]
    assert float(rows[0]["step_s"]) == float(rows[1]["step_s"]) > 0
    found = strict(invoke(*WORLD, "--system", "megatron_p8", "--json").stdout)
    assert float(rows[2]["step_s"]) == pytest.approx(found["step_s"], rel=1e-5)
    assert float(rows[2]["pflops"]) == pytest.approx(found["pflops"], rel=1e-5)
    assert [bool(row["error"]) for row in rows] == [False, False, False, True, True]
    assert "dtfm_scheduled" in rows[3]["error"], "the valid choices"
    assert "1023" in rows[4]["error"]
    assert "3 of 5 rows; 2 can't" in invoke("--table", source, "--out", target).stdout


def test_a_table_of_which_no_row_can_be_done(tmp_path: Path) -> None:
    source, target = tmp_path / "in.csv", tmp_path / "out.csv"
    source.write_text("scenario,system,model,global_batch\nworldwide,nobody,gpt3-xl-24,1024\n")
    result = invoke("--table", source, "--out", target, code=2)
    assert result.stderr.startswith(f"error: no row of {source} could be done; the first: ")
    assert "nobody" in target.read_text()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "--system, --model, --global-batch missing"),
        ((*WORLD,), "--system missing: a step is that of a system"),
        ((*WORK, "--system", "ours"), "nowhere to simulate"),
        ((*WORLD, "--system", "megatron-p8"), "megatron_p8"),
        ((*WORLD, "--system", "ours", "--topology", "x.yaml"), "a scenario and a topology"),
        ((*WORLD, "--system", "ours", "--devices", 4), "a scenario and devices"),
        ((*WORK, "--system", "ours", "--devices", 4), "latency_ms and bandwidth_gbps missing"),
        ((*WORK, "--system", "ours", "--scenario", "world-wide"), "did you mean worldwide"),
        ((*WORLD[:2], "--model", "gpt3xl", *WORLD[4:], "--system", "ours"), "mean 'gpt3-xl'"),
        ((*WORLD, "--global-batch", 1023, "--system", "megatron_p8"), "1023"),
        ((*WORLD, "--global-batch", 0, "--system", "megatron_p8"), "0"),
        ((*PIPELINE, "--stages", 5, "--replicas", 2), "12"),
        ((*PIPELINE, "--stages", 0), "stages"),
        ((*WORLD, "--system", "megatron_p8", "--set", "colour=red"), "no setting 'colour'"),
        ((*WORLD, "--system", "ours", "--set", "colour"), "--set colour: write KEY=VALUE"),
        ((*PIPELINE, "--stages", 12, "--set", "stages=6"), "'stages' is given twice: 12 and 6"),
        ((*PIPELINE, "--trace", "no/such/step.json"), "there is no folder no/such"),
        (("--table", "in.csv"), "--table without --out"),
        (("--out", "out.csv"), "also give --table"),
        (("--table", "none.csv", "--out", "x.csv"), "can't read the table none.csv"),
        (("--table", "none.csv", "--out", "no/such/x.csv"), "there is no folder no/such"),
        (("--table", "in.csv", "--out", "x.csv", "--system", "ours"), "--table and --system: its"),
        (("--list", "--system", "ours"), "--list and --system: it stands alone"),
    ],
)
def test_refused(
    arguments: tuple[object, ...], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke(*arguments, code=2)
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert says in result.stderr
    assert not list(tmp_path.iterdir())
    failed = strict(invoke(*arguments, "--json", code=2).stdout)
    assert says in failed["error"]["message"]
