"""``ray-train-geo compare``: its table, its JSON, its pictures, and what it refuses."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from commands import invoking, strict

from ray_train_geo import compare

SYSTEMS = ["dtfm_random", "megatron_p8", "dtfm_gpipe"]
WORLD = ("--scenario", "worldwide", "--systems", ", ".join(SYSTEMS))


invoke = invoking("compare")


def test_json_is_what_the_python_function_finds() -> None:
    found = strict(invoke(*WORLD, "--json").stdout)
    made = compare("worldwide", systems=SYSTEMS)
    assert found == strict(json.dumps(made.to_json()))
    by_name = {row["system"]: row for row in found["systems"]}
    for name in ("dtfm_random", "megatron_p8"):
        assert by_name[name]["step_s"] > 0
        assert by_name[name]["measured_s"] > 0
        assert abs(by_name[name]["prediction_error"]) < 0.5
    assert found["mean_absolute_error"] is not None


@pytest.mark.parametrize("columns", [80, 130])
def test_the_table(columns: int) -> None:
    text = invoke(*WORLD, columns=columns).stdout
    assert max(map(len, text.splitlines())) <= columns
    assert text.startswith("gpt3-xl-24, 1024 sequences a step, on worldwide (64 devices)")
    for word in ("step s", "measured", "error", "PFLOPS", "of peak", "$/Mtoken", "mean error",
                 "in fp32"):  # fmt: skip
        assert word in text
    assert ("█" in text) == (columns > 100)


@pytest.mark.parametrize("name", ["bars.png", "bars.svg"])
def test_a_picture(tmp_path: Path, name: str) -> None:
    invoke(*WORLD, "--picture", tmp_path / name)
    content = (tmp_path / name).read_bytes()
    if name.endswith("png"):
        assert content.startswith(b"\x89PNG")
    else:
        assert ET.fromstring(content.decode()).tag.endswith("svg")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "nowhere to simulate"),
        (("--scenario", "world-wide"), "did you mean worldwide"),
        ((*WORLD, "--topology", "x.yaml"), "a scenario and a topology"),
        ((*WORLD, "--model", "gpt3xl"), "did you mean 'gpt3-xl'"),
        ((*WORLD, "--global-batch", "1023"), "no system can do this: "),
        ((*WORLD, "--global-batch", "0"), "the global batch is 0"),
        ((*WORLD[:2], "--systems", "our"), "did you mean 'ours'"),
        ((*WORLD[:2], "--systems", " , "), "no systems to compare"),
        ((*WORLD, "--picture", "bars.pdf"), "must end in .png or .svg"),
        ((*WORLD, "--picture", "no/such/bars.png"), "there is no folder no/such"),
    ],
)
def test_refused(arguments: tuple[str, ...], says: str) -> None:
    result = invoke(*arguments, code=2)
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert says in result.stderr
    failed = strict(invoke(*arguments, "--json", code=2).stdout)
    assert says in failed["error"]["message"]
