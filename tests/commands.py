"""Commands as tests call them: in this process, or by the real entry point in one of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, Protocol

import yaml
from typer.testing import CliRunner, Result

from ray_train_geo.cli import app

_ENTRY = """
import sys
from ray_train_geo.cli import main
try:
    main()
finally:
    print([m for m in ("torch", "ray", "matplotlib") if m in sys.modules], file=sys.stderr)
"""


class Invoke(Protocol):
    """Calls a command; ``code`` is the exit code that it must have."""

    def __call__(self, *arguments: object, code: int = 0, columns: int = 80) -> Result: ...


def invoking(command: str) -> Invoke:
    """What calls ``command``, on a terminal of so many columns."""

    def invoke(*arguments: object, code: int = 0, columns: int = 80) -> Result:
        runner = CliRunner(env={"COLUMNS": str(columns)})
        result = runner.invoke(app, [command, *map(str, arguments)])
        assert result.exit_code == code, (result.output, result.exception)
        return result

    return invoke


def refusing(invoke: Invoke) -> Callable[..., str]:
    """What calls with arguments that must be refused: one line, which it returns."""

    def refused(*arguments: object) -> str:
        result = invoke(*arguments, code=2)
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1
        assert "Traceback" not in result.output
        return result.stderr

    return refused


def lightly(*arguments: object) -> str:
    """What the real entry point prints; it must load neither torch nor Ray nor matplotlib."""
    done = subprocess.run(
        [sys.executable, "-c", _ENTRY, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.stderr.strip() == "[]"
    return done.stdout


def strict(text: str) -> Any:
    """JSON as its standard has it: no NaN, no Infinity."""

    def refuse(name: str) -> NoReturn:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def small_job(folder: Path) -> Path:
    """A job file whose data are not there: enough to plan and to predict."""
    spec = {
        "model": {"layers": 4, "dim": 64, "heads": 2},
        "data": {"path": "not/here"},
        "training": {"steps": 5, "global_batch": 8, "seq_len": 64},
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(spec))
    return path
