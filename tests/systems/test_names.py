"""Published names of scenarios and models."""

from __future__ import annotations

import pytest

from ray_train_geo.cluster.scenarios import SCENARIOS
from ray_train_geo.errors import SpecError
from ray_train_geo.model.catalog import CATALOG
from ray_train_geo.systems.names import catalog_model, scenario_name


def test_the_published_cases_are_scenarios_of_ours() -> None:
    cases = [f"case{i}" for i in range(1, 6)] + ["fluidstack2", "fluidstack3"]
    assert [scenario_name(case) for case in cases] == list(SCENARIOS[:7])
    assert scenario_name("Case5") == "worldwide"


@pytest.mark.parametrize("name", [*SCENARIOS, "random-7", "nowhere"])
def test_other_scenarios_stay(name: str) -> None:
    assert scenario_name(name) == name


@pytest.mark.parametrize("name", CATALOG)
def test_the_catalogs_names_stay_with_and_without_their_layers(name: str) -> None:
    assert catalog_model(name) == name
    assert CATALOG[catalog_model(name, CATALOG[name].layers)] == CATALOG[name]


@pytest.mark.parametrize(
    ("name", "layers", "found"),
    [
        ("GPT3-XL", 24, "gpt3-xl-24"),
        ("GPT3-XL", 32, "gpt3-xl-32"),
        ("GPT3-XL", 40, "gpt3-xl-40"),
        ("GPT3-XL", None, "gpt3-xl"),
        ("gpt3-xl-32", 32, "gpt3-xl-32"),
        ("GPT3-6.7B", 32, "gpt3-6.7b"),
        ("GPT3-13B", 40, "gpt3-13b"),
    ],
)
def test_published_models(name: str, layers: int | None, found: str) -> None:
    assert catalog_model(name, layers) == found


@pytest.mark.parametrize(
    ("name", "layers", "says"),
    [
        ("GPT3-XL", 48, "no model 'GPT3-XL' with 48 layers in the catalog .*gpt3-xl-40 has 40"),
        ("gpt3-xl-24", 32, "with 32 layers in the catalog .gpt3-xl-24 has 24"),
        ("gpt3xl", None, r"unknown model 'gpt3xl'; did you mean 'gpt3-xl'\? .there are: gpt-tiny"),
        ("mistral", 32, "unknown model 'mistral'"),
    ],
)
def test_refused(name: str, layers: int | None, says: str) -> None:
    with pytest.raises(SpecError, match=says):
        catalog_model(name, layers)
