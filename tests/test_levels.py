"""Imports only go down: the table of DESIGN.md, enforced on every import of every module."""

from __future__ import annotations

import ast
import fnmatch
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "ray_train_geo"

# The first pattern that fits counts; a module that none fits is an error: give it a level.
LEVELS: dict[str, int] = {
    "errors": 0,
    "spec": 0,
    "spec_codecs": 0,
    "spec_reference": 0,
    "spec_local_sgd": 0,
    "spec_base": 0,
    "spec_parallelism": 0,
    "spec_sections": 0,
    "cluster": 0,
    "codecs": 1,
    "codecs.*": 1,
    "cluster.*": 0,
    "planning": 0,
    "planning.*": 0,
    "schedule": 0,
    "schedule.*": 0,
    "simulation": 0,
    "systems": 0,
    "systems.*": 0,
    "simulation.*": 0,
    "lab": 0,
    "lab.*": 0,
    "replay": 0,
    "replay.*": 0,
    "model": 0,
    "model.catalog": 0,
    "model.*": 1,
    "data": 0,
    "data.order": 0,
    "data.*": 1,
    "transport": 1,
    "transport.*": 1,
    "training": 1,
    "training.*": 1,
    "observe": 0,
    "observe.comparison_picture": 0,
    "observe.device_timeline": 0,
    "observe.log_failures": 0,
    "observe.log_settings": 0,
    "observe.map_layout": 0,
    "observe.metrics": 0,
    "observe.phases": 0,
    "observe.places": 0,
    "observe.plan_html": 0,
    "observe.plan_map": 0,
    "observe.record": 0,
    "observe.rendering": 0,
    "observe.replay_picture": 0,
    "observe.run_directory": 0,
    "observe.run_speed": 0,
    "observe.simulated_trace": 0,
    "observe.speed_table": 0,
    "observe.status": 0,
    "observe.trace": 0,
    "observe.training_logs": 0,
    "observe.*": 1,
    "actors": 2,
    "actors.*": 2,
    "chaos": 0,
    "chaos.faults": 0,
    "chaos.goodput": 0,
    "chaos.recovery": 0,
    "chaos.spot": 0,
    "chaos.tail": 0,
    "chaos.verify": 0,
    "chaos.*": 3,
    "": 3,
    "__main__": 3,
    "attach_command": 3,
    "chaos_command": 3,
    "cli": 3,
    "compare_command": 3,
    "connection": 3,
    "console": 3,
    "driver": 3,
    "exchange": 3,
    "lab_command": 3,
    "logs_command": 3,
    "outputs": 3,
    "job_options": 3,
    "plan_command": 3,
    "probe_command": 3,
    "progress": 3,
    "replay_command": 3,
    "shape_command": 3,
    "simulate_command": 3,
    "submission": 3,
    "ticker": 3,
    "trainer": 3,
    "watch_command": 3,
}
LEVEL_0_MAY_USE = {"matplotlib", "numpy", "ortools", "pydantic", "scipy", "yaml"}
FORBIDDEN = {0: {"torch", "ray", "cupy"}, 1: {"ray"}, 2: set[str](), 3: set[str]()}
CUPY_HOME = f"{PACKAGE}.transport.nccl"


def modules() -> dict[str, Path]:
    """Every module of the package: dotted name -> file."""
    found = {}
    for folder, prefix in ((ROOT / PACKAGE, PACKAGE), (ROOT / "actors", f"{PACKAGE}.actors")):
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            if parts[-1] == "__init__":
                parts = parts[:-1]
            found[".".join((prefix, *parts))] = path
    return found


MODULES = modules()


def level(module: str) -> int:
    """The module's level by the table."""
    short = module.removeprefix(PACKAGE).removeprefix(".")
    for pattern, value in LEVELS.items():
        if fnmatch.fnmatchcase(short, pattern):
            return value
    raise LookupError(f"{module} is in no level: add it to LEVELS in {__file__}")


def imports(module: str) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that ``module`` imports, also inside functions."""
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        match node:
            case ast.Import(names=names):
                for alias in names:
                    yield node.lineno, alias.name
            case ast.ImportFrom(module=source, names=names, level=dots):
                base = source or ""
                if dots:
                    above = package.split(".")[: len(package.split(".")) - (dots - 1)]
                    base = ".".join([*above, *([source] if source else [])])
                yield node.lineno, base
                for alias in names:
                    if f"{base}.{alias.name}" in MODULES:
                        yield node.lineno, f"{base}.{alias.name}"
            case ast.Call(func=func, args=[ast.Constant(value=str(name)), *_]):
                called = func.attr if isinstance(func, ast.Attribute) else getattr(func, "id", "")
                if called in ("import_module", "__import__"):
                    yield node.lineno, name


def ours(name: str) -> str | None:
    """The module of ours that importing ``name`` runs, if it is one."""
    while name:
        if name in MODULES:
            return name
        name = name.rpartition(".")[0]
    return None


def violations(module: str) -> list[str]:
    mine, found = level(module), []
    for line, name in imports(module):
        top = name.partition(".")[0]
        target = ours(name) if top == PACKAGE else None
        where = f"{module}:{line} (level {mine}) imports {name}"
        if target is not None and level(target) > mine:
            found.append(f"{where} (level {level(target)})")
        if top in FORBIDDEN[mine]:
            found.append(f"{where}, which level {mine} must not know")
        if top == "cupy" and module != CUPY_HOME:
            found.append(f"{where}; only {CUPY_HOME} may")
        if (
            mine == 0
            and top != PACKAGE
            and top not in LEVEL_0_MAY_USE
            and top not in sys.stdlib_module_names
        ):
            found.append(f"{where}; level 0 may use {', '.join(sorted(LEVEL_0_MAY_USE))}")
    return found


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_only_go_down(module: str) -> None:
    assert violations(module) == []


def test_the_walk_sees_what_it_must() -> None:
    """So that the test above can fail: known imports of each kind are found."""
    assert f"{PACKAGE}.actors.coordinator" in MODULES
    assert len(MODULES) > 60
    names = {name for _, name in imports(f"{PACKAGE}.driver")}
    assert {"ray", f"{PACKAGE}.actors.coordinator"} <= names
    assert any(name.startswith("cupy") for _, name in imports(CUPY_HOME)), "inside functions"
    assert level(f"{PACKAGE}.model.catalog") == 0
    assert level(f"{PACKAGE}.model.gpt") == 1
    with pytest.raises(LookupError, match="add it to LEVELS"):
        level(f"{PACKAGE}.something_new")


def test_every_pattern_names_a_module() -> None:
    later = {"simulation", "simulation.*"}  # issue 4
    short = [name.removeprefix(PACKAGE).removeprefix(".") for name in MODULES]
    idle = [p for p in LEVELS if not any(fnmatch.fnmatchcase(name, p) for name in short)]
    assert set(idle) <= later


_IMPORT_WITHOUT = """
import importlib, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
for module in {modules!r}:
    importlib.import_module(module)
print(sorted({{name.partition(".")[0] for name in sys.modules}} & {blocked!r}))
"""


@pytest.mark.parametrize(
    ("highest", "blocked"), [(0, {"torch", "ray", "cupy"}), (1, {"ray", "cupy"})]
)
def test_levels_0_and_1_work_where_the_rest_is_not_installed(
    highest: int, blocked: set[str]
) -> None:
    wanted = sorted(m for m in MODULES if level(m) <= highest)
    assert wanted
    code = _IMPORT_WITHOUT.format(blocked=blocked, modules=wanted)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
