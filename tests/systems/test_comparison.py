"""All systems side by side: order, measurements, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from system_stand_in import Systems

from ray_train_geo.cluster.topology import Device, Topology
from ray_train_geo.errors import PlanError, SpecError
from ray_train_geo.systems import comparison as comparison_module
from ray_train_geo.systems.catalog import SYSTEMS
from ray_train_geo.systems.comparison import compare
from ray_train_geo.systems.published import Measured

TWO = Topology((Device("a/0", "a"), Device("b/0", "b")))
FEW = ("zero_s3", "megatron_p8", "dtfm_scheduled", "ours")
PUBLIC = [
    Measured("worldwide", "dtfm_scheduled", "GPT3-XL", 24, 1024, (19.0, 21.0)),
    Measured("worldwide", "megatron_p8", "GPT3-XL", 24, 1024, (50.0,)),
    Measured("worldwide", "zero_s3", "GPT3-XL", 24, 1024, (90.0,)),
    Measured("worldwide", "dtfm_scheduled", "GPT3-XL", 32, 2048, (70.0,)),
]


@pytest.fixture
def systems(monkeypatch: pytest.MonkeyPatch) -> Systems:
    stand_in = Systems({"ours": 30.0, "dtfm_scheduled": 22.0, "megatron_p8": 45.0})
    monkeypatch.setattr(comparison_module, "simulate", stand_in)
    monkeypatch.setattr(
        comparison_module, "measured", lambda name: [m for m in PUBLIC if m.scenario == name]
    )
    return stand_in


def test_ours_first_then_the_fastest_and_last_who_cannot(systems: Systems) -> None:
    found = compare("worldwide", systems=FEW)
    assert [row.system for row in found.rows] == [
        "ours",
        "dtfm_scheduled",
        "megatron_p8",
        "zero_s3",
    ]
    assert found.rows[-1].predicted is None
    assert found.rows[-1].why_not == "zero_s3 needs one node: give it less"
    assert (found.place, found.devices, found.model) == ("worldwide", 64, "gpt3-xl-24")


def test_measured_beside_predicted(systems: Systems) -> None:
    rows = {row.system: row for row in compare("case5", systems=FEW).rows}
    scheduled, ours, zero = rows["dtfm_scheduled"], rows["ours"], rows["zero_s3"]
    assert scheduled.measured_s == (19.0, 21.0)
    assert scheduled.mean_measured_s == 20.0
    assert scheduled.prediction_error == pytest.approx(0.1)
    assert (ours.mean_measured_s, ours.prediction_error) == (None, None)
    assert (zero.mean_measured_s, zero.prediction_error) == (90.0, None)
    assert compare("worldwide", systems=FEW).mean_absolute_error == pytest.approx(0.1)


def test_two_names_of_one_model_share_measurements(systems: Systems) -> None:
    rows = compare("worldwide", model="gpt3-xl", systems=["dtfm_scheduled"]).rows
    assert rows[0].measured_s == (19.0, 21.0)


def test_other_work_has_other_measurements(systems: Systems) -> None:
    found = compare("worldwide", model="gpt3-xl-32", global_batch=2048, systems=FEW)
    rows = {row.system: row.measured_s for row in found.rows}
    assert rows == {"ours": (), "dtfm_scheduled": (70.0,), "megatron_p8": (), "zero_s3": ()}
    assert found.also_measured == (("gpt3-xl-24", 1024),)
    assert compare("worldwide", systems=FEW).also_measured == (("gpt3-xl-32", 2048),)


def test_a_topology_has_no_measurements(systems: Systems) -> None:
    found = compare(topology=TWO, systems=FEW)
    assert found.place == "topology"
    assert not any(row.measured_s for row in found.rows)
    assert found.mean_absolute_error is None
    assert all(asked["topology"] is TWO for asked in systems.asked)


def test_all_systems_unless_some_are_named(systems: Systems) -> None:
    seen: list[str] = []
    found = compare("regional", on_system=seen.append)
    assert seen == list(SYSTEMS)
    assert sorted(row.system for row in found.rows) == sorted(SYSTEMS)
    assert len(compare("regional", systems=["ours", "ours"]).rows) == 1


def test_json_has_null_for_what_there_is_not(systems: Systems) -> None:
    text = json.dumps(compare("worldwide", systems=FEW).to_json(), allow_nan=False)
    found = json.loads(text)
    ours, scheduled, _, zero = found["systems"]
    assert ours.keys() == zero.keys()
    assert (ours["step_s"], ours["precision"]) == (30.0, "fp16")
    assert ours["measured_s"] is ours["error"] is None
    assert scheduled["measurements_s"] == [19.0, 21.0]
    assert zero["step_s"] is zero["breakdown"] is zero["prediction_error"] is None
    assert zero["error"] == "zero_s3 needs one node: give it less"
    assert found["also_measured"] == [{"model": "gpt3-xl-32", "global_batch": 2048}]


def test_refused(systems: Systems, tmp_path: Path) -> None:
    for arguments, says in (
        ({"scenario": "world-wide"}, "did you mean worldwide"),
        ({}, "nowhere to simulate"),
        ({"scenario": "worldwide", "topology": tmp_path}, "a scenario and a topology"),
        ({"scenario": "worldwide", "model": "gpt3xl"}, "did you mean 'gpt3-xl'"),
        ({"scenario": "worldwide", "global_batch": 0}, "the global batch is 0"),
        ({"scenario": "worldwide", "systems": []}, "no systems to compare: give some of"),
        ({"scenario": "worldwide", "systems": ["megatron-p8"]}, "did you mean 'megatron_p8'"),
    ):
        with pytest.raises(SpecError, match=says):
            compare(**arguments)
    assert not systems.asked


def test_when_nobody_can_each_reason_is_told_once(
    systems: Systems, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(system: str, *_: object, **__: object) -> None:
        raise PlanError("it does not divide" if system != "ours" else "nothing fits")

    monkeypatch.setattr(comparison_module, "simulate", refuse)
    with pytest.raises(PlanError) as caught:
        compare("worldwide", systems=FEW)
    assert str(caught.value) == (
        "no system can do this: it does not divide (zero_s3, megatron_p8, dtfm_scheduled); "
        "nothing fits (ours)"
    )
