"""What all commands share: common arguments, errors as one message, JSON on stdout."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ray_train_geo.errors import GeoError

__all__ = ["Address", "AsJson", "JobPath", "Overrides", "errors", "print_json"]

JobPath = Annotated[Path, typer.Argument(metavar="JOB.yaml", help="The job spec.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=VALUE", help="Override a field of the job; repeatable."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Address = Annotated[
    str | None,
    typer.Option(
        help="Ray cluster to use (HOST:PORT or auto). Default: RAY_ADDRESS, or a cluster of our "
        "own on this machine."
    ),
]


@contextlib.contextmanager
def errors(as_json: bool = False) -> Iterator[None]:
    """One message for what went wrong, and its exit code; no traceback."""
    try:
        yield
    except GeoError as e:
        if as_json:
            print_json({"error": {"kind": type(e).__name__, "message": str(e)}})
        Console(stderr=True).print(
            f"error: {e}", style="red", markup=False, highlight=False, soft_wrap=True
        )
        raise typer.Exit(e.exit_code) from None
    except KeyboardInterrupt:
        Console(stderr=True).print("ended at once", style="red")
        raise typer.Exit(130) from None


def print_json(obj: Any) -> None:
    """One JSON object on one line of stdout."""
    print(json.dumps(obj), flush=True)
