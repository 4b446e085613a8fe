"""What the documentation says is true of the code: made pages, commands, links, examples."""

from __future__ import annotations

import ast
import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer
import yaml
from pydantic import BaseModel
from typer.testing import CliRunner

from ray_train_geo.cli import app
from ray_train_geo.cluster.topology_file import load_topology
from ray_train_geo.planning.planner import plan
from ray_train_geo.planning.validate import validate_plan
from ray_train_geo.spec import JobSpec, load_job
from ray_train_geo.spec_reference import job_spec_reference

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "cluster_configs").rglob("*.md")),
]
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
TOPOLOGY = ROOT / "examples" / "topologies" / "three-regions.yaml"

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
each_example = pytest.mark.parametrize("example", EXAMPLES, ids=lambda p: p.name)


def commands() -> dict[str, set[str]]:
    """The command line's commands and their options."""
    group: Any = typer.main.get_command(app)  # typer's own click or the installed one
    return {
        name: {text for p in command.params for text in (*p.opts, *p.secondary_opts)}
        for name, command in group.commands.items()
    }


def code_of(page: Path) -> Iterator[str]:
    """Every line of a fenced block and every inline code of a page, each on one line."""
    text = page.read_text()
    for _, block in FENCE.findall(text):
        yield from block.replace("\\\n", " ").splitlines()
    for inline in re.findall(r"`([^`]+)`", FENCE.sub("", text)):
        yield " ".join(inline.split())


def anchors(page: Path) -> set[str]:
    """GitHub's anchors of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}


def fields(model: type[BaseModel], path: str = "") -> Iterator[tuple[str, str | None]]:
    """(dotted name, description) of every field, sections included."""
    for name, field in model.model_fields.items():
        yield f"{path}{name}", field.description
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            yield from fields(section, f"{path}{name}.")


def test_job_spec_page_is_up_to_date() -> None:
    made = job_spec_reference()
    written = (ROOT / "docs" / "job-spec.md").read_text()
    assert written == made, (
        "stale: run .venv/bin/python -m ray_train_geo.spec_reference > docs/job-spec.md"
    )


def test_job_spec_page_has_every_field_with_type_default_and_description() -> None:
    rows = dict[str, list[str]]()
    section = ""
    for line in job_spec_reference().splitlines():
        if heading := re.fullmatch(r"## `(.+)`", line):
            section = heading[1]
        elif row := re.fullmatch(r"\| `(\w+)` \| (.+) \| (.+) \| (.+) \|", line):
            rows[f"{section}.{row[1]}"] = [row[2], row[3], row[4]]

    expected = {name for name, _ in fields(JobSpec) if "." in name}
    assert expected <= set(rows)
    assert rows["training.steps"][:2] == ["integer >= 1", "required"]
    assert rows["training.precision"][:2] == ["`fp32` or `bf16` or `fp16`", "`fp32`"]
    assert rows["training.betas"][:2] == ["list of 2 numbers", "`[0.9, 0.95]`"]
    assert rows["parallelism.stages"][1] == "`auto`"
    assert rows["scaling.resources_per_worker"][1] == "`{CPU: 1}`"
    assert rows["model.kv_heads"][1] == "heads"


def test_every_field_of_the_job_spec_has_a_description() -> None:
    bare = [name for name, description in fields(JobSpec) if len(description or "") < 8]
    assert not bare


def test_schema_of_the_examples_is_up_to_date() -> None:
    printed = CliRunner().invoke(app, ["schema"]).stdout
    written = (ROOT / "examples" / "job.schema.json").read_text()
    assert written == printed, (
        "stale: run .venv/bin/ray-train-geo schema > examples/job.schema.json"
    )


@each_example
def test_example_is_valid_for_the_loader_and_for_editors(example: Path) -> None:
    load_job(example)
    schema = json.loads((ROOT / "examples" / "job.schema.json").read_text())
    jsonschema.validate(yaml.safe_load(example.read_text()), schema)


def test_gpt3_xl_example_gets_a_plan_over_three_regions() -> None:
    job, topology = load_job(ROOT / "examples" / "gpt3-xl.yaml"), load_topology(TOPOLOGY)
    made = plan(topology, job)
    validate_plan(made, topology, job, 257)
    used = [topology.device(s.device) for p in made.pipelines for s in p.stages]
    assert len(topology.devices) == 12
    assert {d.region for d in used} == {"virginia", "ohio", "oregon"}
    runs = {s.layers[1] - s.layers[0] for p in made.pipelines for s in p.stages}
    assert len(runs) > 1  # an A100 gets more layers than an A10G
    assert made.certificate.lower_bound < made.predicted_step_s < 600


def test_readme_lists_the_commands() -> None:
    readme = (ROOT / "README.md").read_text()
    listed = re.findall(r"^\| `ray-train-geo ([\w-]+)", readme, re.MULTILINE)
    assert sorted(listed) == sorted(commands())


@each_page
def test_commands_and_options_exist(page: Path) -> None:
    known = commands()
    for code in code_of(page):
        for name, rest in re.findall(r"ray-train-geo ([a-z][\w-]*)\b([^|;&#]*)", code):
            assert name in known, f"no command {name!r}: {code}"
            unknown = set(re.findall(r"(?<=\s)--[a-z-]+", rest)) - known[name]
            assert not unknown, f"{name} has no {unknown}: {code}"


@each_page
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {m[1] for code in code_of(page) if (m := re.match(r"make ([a-z]+)\b", code))}
    assert named <= targets


@each_page
def test_overridden_fields_exist(page: Path) -> None:
    known = {name for name, _ in fields(JobSpec)}
    named = {name for code in code_of(page) for name in re.findall(r"--set ([\w.]+)=", code)}
    assert named <= known


@each_page
def test_relative_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text())):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        found = (page.parent / name).resolve() if name else page
        assert found.exists(), f"dead link {target}"
        if anchor:
            assert anchor in anchors(found), f"no heading for {target}"


@each_page
def test_python_examples_import_what_exists(page: Path) -> None:
    for language, block in FENCE.findall(page.read_text()):
        if language != "python":
            continue
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module or "")
                assert all(hasattr(module, alias.name) for alias in node.names)


def test_pictures_are_small_enough_for_a_repository() -> None:
    pictures = list((ROOT / "docs" / "pictures").glob("*.png"))
    assert len(pictures) == 4
    assert all(picture.stat().st_size < 200_000 for picture in pictures)


def test_files_named_in_the_table_of_folders_exist() -> None:
    text = (ROOT / "README.md").read_text().partition("## Where things are")[2]
    for cell in re.findall(r"^\| (`.+?) \|", text, re.MULTILINE):
        names = re.findall(r"`([^`]+)`", cell)
        folder = ROOT if not names[0].startswith("ray_train_geo") else ROOT / "ray_train_geo"
        for name in names:
            path = folder / name.removeprefix("ray_train_geo/")
            assert path.exists(), name
